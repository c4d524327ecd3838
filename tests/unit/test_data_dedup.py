import random
from collections import Counter

import numpy as np

from glm_jax.config import Data
from glm_jax.data import cleaning, dedup
from glm_jax.data.document import Document
from glm_jax.data.measure import measure


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


def test_empty_and_tiny_texts_do_not_collide():
    sets = [dedup.grams(dedup.Words()(text), 5) for text in ("", "", "a", "b c")]
    signature = np.concatenate([np.zeros((2, 112), np.uint64), dedup.signatures(sets[2:], 112)])
    assert dedup.near(sets, signature, 0.8, 8) == {}
