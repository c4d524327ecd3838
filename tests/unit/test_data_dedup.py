import json
import random
from collections import Counter

import numpy as np
import pytest

from glm_jax.config import Data
from glm_jax.data import cleaning, dedup
from glm_jax.data.document import DataError, Document
from glm_jax.data.engine import Engine
from glm_jax.data.measure import Known, measure


def _document(text, name="x"):
    return Document.of(text, domain="general", source="s", path=name, group=name)


def _clean(documents, **settings):
    """(kept, removed) of training documents beside none that are held out."""
    kept, _, _, removed = cleaning.clean(documents, [], Data(**settings))
    return kept, removed


def _text(seed, words=300):
    source = random.Random(seed)
    return " ".join(f"w{source.randrange(5000)}" for _ in range(words))


def _edited(text, changes, seed=0):
    words, source = text.split(" "), random.Random(seed)
    for place in source.sample(range(len(words)), changes):
        words[place] = "changed"
    return " ".join(words)


def test_exact_duplicates_leave_the_first_path_whatever_the_order():
    documents = [_document("same", "b"), _document("same", "a"), _document("other", "c"), _document("same", "d")]
    for order in (documents, documents[::-1]):
        kept, removed = dedup.exact(order)
        assert {d.path for d in kept} == {"a", "c"}
        assert {(r.path, r.reason, r.cluster) for r in removed} == {
            (name, "exact duplicate", documents[0].id) for name in "bd"
        }


def test_near_duplicates_leave_the_smallest_id_and_different_texts_stay():
    texts = [_text(i) for i in range(30)]
    copies = [_edited(text, 4, seed=i) for i, text in enumerate(texts[:10])]
    documents = [_document(text) for text in texts + copies]
    kept, removed = _clean(documents)
    assert len(kept) == 30
    pairs = {frozenset((_document(a).id, _document(b).id)) for a, b in zip(texts, copies, strict=False)}
    assert {frozenset((r.id, r.cluster)) for r in removed} == pairs
    assert all(r.reason == "near duplicate" and r.id > r.cluster and 0.8 <= r.similarity < 1 for r in removed)
    assert _clean(documents[::-1])[0] == kept


def test_planted_near_duplicates_are_found_and_nothing_else():
    words, source = dedup.Words(), random.Random(0)
    texts = [_text(i, source.randrange(60, 600)) for i in range(600)]
    copies = [_edited(text, source.randrange(len(text.split(" ")) // 30), seed=i) for i, text in enumerate(texts[:300])]
    sets = [dedup.grams(words(text), 5) for text in texts + copies]
    alike = {600 + i: i for i in range(300) if dedup.jaccard(sets[i], sets[600 + i]) >= 0.8}
    found = dedup.near(sets, dedup.signatures(sets, 120), 0.8, 6)
    assert len(alike) > 200
    assert len(found.items() & alike.items()) >= 0.95 * len(alike)
    assert len(found.items() & alike.items()) >= 0.99 * len(found)


def test_pages_of_one_template_go_where_minhash_sees_none():
    names = random.Random(1)
    templates = [_text(1000 + t, 120).split(" ") for t in range(4)]
    filled = []
    for template in templates:
        for _ in range(15):
            page = [f"name{names.randrange(10**6)}" if place % 9 == 4 else w for place, w in enumerate(template)]
            filled.append(_document(" ".join(page)))
    rest = [_document(_text(i, 100)) for i in range(240)]
    assert not _clean(filled, minhash=(20, 6))[1]
    kept, _, removed = cleaning.without_templates(rest + filled, measure(rest + filled, [], 1), 0.8)
    gone = {removal.id for removal in removed}
    assert len(gone & {page.id for page in filled}) >= 0.9 * len(filled)
    assert len(gone & {page.id for page in rest}) <= 0.02 * len(rest)
    assert {d.id for d in kept} | gone == {d.id for d in rest + filled}
    assert all(r.similarity > 0.5 and r.cluster != r.id for r in removed if r.id in {page.id for page in filled})
    assert not gone & {removal.cluster for removal in removed}
    assert cleaning.without_templates(rest + filled, measure(rest + filled, [], 1), 1.0)[::2] == (rest + filled, [])


def test_candidates_are_verified_by_exact_similarity():
    words = dedup.Words()
    base = _text(1)
    sets = [dedup.grams(words(text), 5) for text in (base, _edited(base, 4), _edited(base, 30))]
    assert dedup.jaccard(sets[0], sets[1]) > 0.8 > dedup.jaccard(sets[0], sets[2])
    assert dedup.near(sets, dedup.signatures(sets, 112), 0.8, 8) == {1: 0}
    assert dedup.near(sets, dedup.signatures(sets, 112), 0.99, 8) == {}


def test_minhash_estimates_jaccard():
    words = dedup.Words()
    base = _text(2, 2000)
    a, b = (dedup.grams(words(text), 5) for text in (base, _edited(base, 100)))
    signature = dedup.signatures([a, b], 112)
    estimate = (signature[0] == signature[1]).mean()
    assert abs(estimate - dedup.jaccard(a, b)) < 3 * np.sqrt(0.25 / 112)  # three standard errors of 112 hashes


def test_training_loses_what_repeats_held_out_text():
    held_out = _document(_text(3, 400), "held out")
    near = _document(_edited(held_out.text, 3), "near")
    inside = _document(_text(4, 4000) + " " + held_out.text, "contains it")
    part = _document(" ".join(held_out.text.split(" ")[100:180]), "part of it")
    other = _document(_text(5), "other")
    kept, _, kept_held_out, removed = cleaning.clean([near, inside, part, other, held_out], [held_out], Data())
    assert kept == [other]
    assert kept_held_out == [held_out]
    reasons = Counter(removal.reason for removal in removed)
    assert reasons == {"overlaps held-out text": 3, "held-out text again": 1}
    assert {removal.cluster for removal in removed} == {held_out.id}


def test_problems_of_named_benchmarks_are_found_inside_longer_texts(tmp_path):
    question, solution = _text(50, 60), _text(51, 30)
    records = [{"task_id": "B/1", "prompt": question, "test": {"lines": [solution, "short"]}}, {"prompt": _text(52, 9)}]
    (tmp_path / "human-bench.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "sums.txt").write_text(_text(53, 200))
    asks = _document(_text(54, 900) + " " + question + " " + _text(55, 900), "asks")
    solves = _document(_text(56, 200) + " " + " ".join(solution.split(" ")[:20]), "solves most of it")
    cites = _document(_text(57, 200) + " " + " ".join(solution.split(" ")[:12]), "cites a line")
    copy = _document(_edited((tmp_path / "sums.txt").read_text(), 3), "nearly the file")
    short = _document(_text(58, 100) + " " + records[1]["prompt"], "has what is too short to tell")
    benchmarks = tuple(str(tmp_path / name) for name in ("human-bench.jsonl", "sums.txt"))
    kept, removed = _clean([asks, solves, cites, copy, short], benchmarks=benchmarks)
    assert {d.path for d in kept} == {"cites a line", "has what is too short to tell"}
    assert {(r.path, r.reason) for r in removed} == {
        ("asks", "contains a problem of human-bench"),
        ("solves most of it", "contains a problem of human-bench"),
        ("nearly the file", "contains a problem of sums"),
    }


@pytest.mark.parametrize("problem", [True, False], ids=["a problem", "held-out text"])
def test_of_near_duplicates_one_stays_though_the_first_repeats_what_it_must_not(tmp_path, problem):
    text, known = _text(70, 1200), _text(71, 150 if problem else 400)
    plain = _document(text, "plain")
    repeats = (_document(f"{text} {known} t{number}", "repeats") for number in range(99))
    first = next(document for document in repeats if document.id < plain.id)
    (tmp_path / "bench.txt").write_text(known)
    held_out = [] if problem else [_document(known, "held out")]
    benchmarks = (str(tmp_path / "bench.txt"),) if problem else ()
    data = Data(benchmarks=benchmarks, duplicate_jaccard=0.6)
    kept, _, _, removed = cleaning.clean([first, plain], held_out, data)
    assert kept == [plain]
    assert [removal.path for removal in removed] == ["repeats"]


@pytest.mark.parametrize("content", ["", "too short\n"])
def test_a_benchmark_without_problems_is_refused(tmp_path, content):
    (tmp_path / "empty.jsonl").write_text(content)
    with pytest.raises(DataError, match="has no text of 10 words"):
        cleaning.benchmark(tmp_path / "empty.jsonl")


def test_duplicates_may_be_kept_but_nothing_that_is_held_out():
    same = [_document("the same words again " * 20, name) for name in ("a", "b")]
    held_out = _document(_text(60, 400), "held out")
    kept, _, _, removed = cleaning.clean([*same, held_out], [held_out], Data(keep_duplicates=True))
    assert kept == same
    assert [r.reason for r in removed] == ["held-out text again"]


def test_measures_by_shards_are_those_of_all_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(cleaning, "_SHARD_BYTES", 4000)
    documents = [_document(_text(i), f"{i}") for i in range(9)] + [_document(_text(3), "3 again")]
    known = [Known.of([_text(4)], 13, 100), Known.of([_text(5, 50)], 10, 1)]
    whole = measure(documents, known, 24)
    parts = cleaning.by_engine(Engine("one"), tmp_path / "cleaning", lambda done, total: None)(documents, known, 24)
    for name in ("signature", "repeats", "shares", "signals", "counts"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name))
    assert all(np.array_equal(whole.grams[i], parts.grams[i]) for i in range(10))
    assert all(np.array_equal(whole.words[i], parts.words[i]) for i in range(10))
    assert whole.repeats[4].tolist() == [0, -1] and whole.repeats[5, 0] == -1
    assert not (tmp_path / "cleaning").exists()


def test_empty_and_tiny_texts_do_not_collide():
    sets = [dedup.grams(dedup.Words()(text), 5) for text in ("", "", "a", "b c")]
    signature = np.concatenate([np.zeros((2, 112), np.uint64), dedup.signatures(sets[2:], 112)])
    assert dedup.near(sets, signature, 0.8, 8) == {}
