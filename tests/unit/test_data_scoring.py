"""Scorers from examples to buckets: features, the classifier, contrasts, ranks, an LLM's scores."""

import http.server
import json
import os
import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pytest

from experiments import recipes
from glm_jax.config import ConfigError, Data, Scoring
from glm_jax.data import classifier, contrasts, features, judge, language, prepare, quality, scoring
from glm_jax.data.classifier import Classifier
from glm_jax.data.document import DataError, Document

TEXTS = ["def f(x):\n    return x + 12", "The quick brown fox.", "", "数据处理 and 345", "def f(x):\n    return x + 12"]


def _document(text, name="x", domain="general", source="docstrings:x"):
    return Document.of(text, domain=domain, source=source, path=name, group=name)


def _rows(bags):
    return [
        dict(zip(bags.columns[a:b].tolist(), bags.values[a:b].tolist(), strict=True))
        for a, b in zip(bags.offsets[:-1], bags.offsets[1:], strict=True)
    ]


@pytest.mark.parametrize("of", [features.of_words, features.of_characters])
def test_a_text_has_the_same_bag_alone_and_among_others(of):
    together = _rows(of(TEXTS, 16))
    assert together == [_rows(of([text], 16))[0] for text in TEXTS]
    assert together[0] == together[4] != together[1]
    assert not together[2]
    assert all(abs(sum(v * v for v in row.values()) - 1) < 1e-5 for row in together if row)
    bags = of(TEXTS, 16)
    assert _rows(bags[np.array([3, 0])]) == [together[3], together[0]]


def test_words_are_told_apart_by_what_matters():
    def same(a, b):
        one, other = _rows(features.of_words([a, b], 20))
        return one == other

    assert same("The Fox", "the fox")
    assert same("in 1999", "in 2024")
    assert not same("in 1999", "in 99")
    assert not same("a\n    b", "a\n  b")
    assert not same("a b", "b a")
    assert len(_rows(features.of_words(["数据"], 20))[0]) == 3  # two characters and their pair


def _two_kinds(count, seed=0):
    random = np.random.default_rng(seed)
    labels = random.random(count) < 0.5
    words = np.where(labels[:, None], random.integers(0, 300, (count, 60)), random.integers(200, 500, (count, 60)))
    return [" ".join(f"w{chr(97 + w % 26)}{chr(97 + w // 26)}" for w in row) for row in words.tolist()], labels


def test_a_classifier_learns_is_the_same_bits_again_and_survives_its_file(tmp_path):
    texts, labels = _two_kinds(400)
    bags, targets = features.of_words(texts, 14), labels.astype(np.float32)[:, None]
    one, again = (classifier.train(bags, targets, ("a",), reads="words", bits=14) for _ in range(2))
    one.save(tmp_path / "one.npz")
    again.save(tmp_path / "again.npz")
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "again.npz").read_bytes()
    others, truth = _two_kinds(300, seed=1)
    loaded = Classifier.load(tmp_path / "one.npz")
    scores = loaded.scores(loaded.bags(others))[:, 0]
    assert np.array_equal(scores, one.scores(one.bags(others))[:, 0])
    assert classifier.auc(scores, truth) > 0.97
    other_seed = classifier.train(bags, targets, ("a",), reads="words", bits=14, seed=1)
    assert not np.array_equal(other_seed.weights, one.weights)


def test_a_classifier_of_shares_orders_by_them():
    texts, _ = _two_kinds(2)
    random = np.random.default_rng(2)
    shares = random.integers(0, 6, 500) / 5
    texts = [" ".join("good" + "xyz"[w % 3] if w < 50 * s else "bad" + "uvw"[w % 3] for w in range(50)) for s in shares]
    bags = features.of_words(texts, 14)
    held = classifier.train(bags, shares[:, None], ("share",), reads="words", bits=14)
    scores = held.scores(bags)[:, 0]
    means = [scores[shares == s].mean() for s in np.unique(shares)]
    assert means == sorted(means)


def test_auc_is_the_chance_of_the_right_order():
    assert classifier.auc(np.array([0.1, 0.2, 0.3, 0.4]), np.array([False, False, True, True])) == 1
    assert classifier.auc(np.array([0.0, 0.0, 1.0]), np.array([False, True, True])) == 0.75
    assert np.isnan(classifier.auc(np.array([0.0]), np.array([True])))


def test_bins_have_equal_bytes_and_buckets_are_whole_bins():
    random = np.random.default_rng(0)
    sizes = random.integers(100, 1000, 2000)
    scores = random.normal(size=2000)
    ids = np.array([f"{i:05}" for i in range(2000)])
    bins = scoring.rank_bins(scores, sizes, ids)
    assert set(bins.tolist()) == set(range(scoring.BINS))
    share = np.bincount(bins, weights=sizes) / sizes.sum()
    assert np.abs(share - 1 / scoring.BINS).max() < 0.002
    assert (np.diff(bins[np.argsort(scores)]) >= 0).all()
    order = random.permutation(2000)
    assert np.array_equal(scoring.rank_bins(scores[order], sizes[order], ids[order]), bins[order])
    best = np.maximum(bins, scoring.rank_bins(random.normal(size=2000), sizes, ids))
    buckets = scoring.merged(best, sizes, np.arange(1, 5) / 5)
    assert all(len(set(buckets[best == number].tolist())) <= 1 for number in range(scoring.BINS))
    assert (np.diff(buckets[np.argsort(best, kind="stable")]) >= 0).all()
    assert set(buckets.tolist()) == set(range(5))


def test_marks_of_listings_are_taken_out_and_counted():
    page = "Use it:\n\n>>> f(1)\n2\n\n```python\ndef g():\n    return 1\n```\nDone.\n"
    plain, share = contrasts.without_marks(page)
    assert ">>>" not in plain and "```" not in plain
    assert "f(1)\n" in plain and "def g():\n    return 1\n" in plain
    assert share == 3 / page.count("\n")


def test_code_laid_bare_is_the_same_program_without_a_word_for_its_reader():
    source = '''
def total(values, start=0):
    """Sum."""
    result = start
    for value in values:
        result += value
    return result
'''
    bare = contrasts._bare(source)
    assert "Sum" not in bare and "result" not in bare
    held = {}
    exec(compile(bare, "bare", "exec"), held)
    assert held["total"]([1, 2, 3]) == 6


@pytest.mark.slow
def test_examples_are_the_same_in_every_process():
    program = """
import hashlib
from glm_jax.data import contrasts
found = contrasts.gather([], ())
assert len(found["prose"]) > 100 and len(found["code"]) > 100
print(hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest())
"""
    told = {
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in "12"
    }
    assert len(told) == 1


class _Endpoint(http.server.BaseHTTPRequestHandler):
    """Speaks OpenAI's protocol: a page with more formulas teaches more; the first questions meet a busy server."""

    busy = 2
    torn = 0  # answers that end in their middle
    seen: Counter

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"].split("<document>")[1]
        type(self).seen[self.path, body["model"], self.headers.get("Authorization")] += 1
        if type(self).busy > 0:
            type(self).busy -= 1
            self.send_response(503)
            self.end_headers()
            return
        reply = "I cannot say." if "speechless" in text else f"It has some.\n**Score: {min(text.count('formula'), 5)}**"
        data = json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        type(self).torn -= 1
        self.wfile.write(data[: len(data) // 2 if self.torn >= 0 else None])

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setattr(judge, "_WAIT_S", 0.01)
    monkeypatch.setenv(judge.KEY, "secret")
    _Endpoint.busy, _Endpoint.torn, _Endpoint.seen = 2, 0, Counter()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Endpoint)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_endpoint_is_asked_once_for_each_document_and_its_answers_are_kept(endpoint, tmp_path):
    documents = [_document(f"page {n} " + "formula " * (n % 6)) for n in range(30)]
    documents.append(_document("speechless"))
    kept = tmp_path / "judged.jsonl"
    scores = judge.ask(endpoint, "wise", documents[:10], kept, lambda *_: None)
    with kept.open("a") as lines:
        lines.write('{"id": "torn')  # a run that was killed while it wrote
    scores = judge.ask(endpoint, "wise", documents, kept, lambda *_: None)
    assert scores == {document.id: min(n % 6, 5) for n, document in enumerate(documents[:-1])}
    assert _Endpoint.seen == {("/v1/chat/completions", "wise", "Bearer secret"): 31 + 2}
    assert len(kept.read_text().splitlines()) == 31


def test_an_answer_that_ends_in_its_middle_is_asked_for_again_and_then_told(endpoint, tmp_path):
    _Endpoint.busy, _Endpoint.torn = 0, 2
    page = _document("page formula formula")
    assert judge.ask(endpoint, "wise", [page], tmp_path / "kept", lambda *_: None) == {page.id: 2}
    _Endpoint.torn = 99
    with pytest.raises(DataError, match=r"no answer \(IncompleteRead.* check the address"):
        judge.ask(endpoint, "wise", [_document("another")], tmp_path / "kept", lambda *_: None)


def test_an_endpoint_that_is_not_there_is_a_message_with_a_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "_WAIT_S", 0.01)
    with pytest.raises(DataError, match="check the address"):
        judge.ask("http://127.0.0.1:9/v1", "m", [_document("x")], tmp_path / "kept", lambda *_: None)


def test_scores_of_a_file_are_by_id_or_text_and_a_bad_line_is_named(tmp_path):
    path = tmp_path / "scores.jsonl"
    path.write_text('{"id": "ab", "score": 4}\n{"text": "hello", "score": 1.5}\n')
    assert judge.from_file(path) == {"ab": 4.0, _document("hello").id: 1.5}
    for line in ('{"id": "x", "score": 7}', '{"score": 1}', "no json", '{"id": "x", "score": null}'):
        path.write_text('{"id": "ab", "score": 4}\n' + line + "\n")
        with pytest.raises(DataError, match="line 2"):
            judge.from_file(path)


@pytest.mark.parametrize(
    "reply, score",
    [
        ("Score: 3", 3),
        ("**Score:** 4.5", 4.5),
        ("2", 2),
        ("score 1 ... Score: 5", 5),
        ("Score: 10", None),
        ("Score (0-5): 4", 4),
        ("Score (out of 5): **3.5**", 3.5),
        ("Score (2).", 2),
        ("Score: 4/5", 4),
        ("Score (0-5)", None),
        ("My score, 0 - 5, follows", None),
        ("no", None),
    ],
)
def test_a_reply_is_read_by_its_last_score(reply, score):
    assert judge.parse(reply) == score


def test_an_llms_scores_train_the_scorer_of_mathematics(endpoint, tmp_path):
    random = np.random.default_rng(0)
    words = ("formula", "theorem", "lemma", "proof"), ("menu", "button", "window", "click")
    documents = []
    for n in range(120):
        mathematical = int(random.integers(0, 2))
        count = int(random.integers(3, 6)) if mathematical else int(random.integers(0, 3))
        text = " ".join(random.choice(words[1 - mathematical], 60).tolist()).replace("formula", "proof")
        documents.append(_document(f"page {n} {text} " + "formula " * count, name=f"g{n}"))
    config = Scoring(by="classifiers", judge=endpoint, judge_model="wise")
    taught, facts = scoring._taught(documents, config, tmp_path / "judged.jsonl", lambda *_: None)
    assert facts["auc"] > 0.95
    assert facts["rank_correlation"] > 0.7
    assert sum(facts["scores"].values()) == 120
    file = tmp_path / "scores.jsonl"
    file.write_text((tmp_path / "judged.jsonl").read_text())
    config = Scoring(by="classifiers", judge=str(file))
    again, _ = scoring._taught(documents, config, tmp_path / "none", lambda *_: None)
    assert np.array_equal(again.weights, taught.weights)


def test_a_users_folder_of_contrasts_is_read_and_another_is_refused(tmp_path):
    for label in ("good", "bad"):
        (tmp_path / "prose" / label).mkdir(parents=True)
        (tmp_path / "prose" / label / "a.txt").write_text(f"{label} text of somebody. " * 20)
    found = contrasts._own(tmp_path)
    assert {(name, e.good, e.group) for name, e in found} == {
        ("prose", True, "own:prose/good/a.txt"),
        ("prose", False, "own:prose/bad/a.txt"),
    }
    with pytest.raises(DataError, match="has none of the folders"):
        list(contrasts._own(tmp_path / "prose"))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"judge": "scores.jsonl"}, "reads no judge"),
        ({"by": "classifiers", "judge": "http://localhost/v1"}, "judge_model"),
        ({"by": "classifiers", "judge_sample": 0}, "at least 1"),
    ],
)
def test_settings_that_say_nothing_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Scoring(**fields)


SAID = {
    "en": "The committee agreed that the road should be repaired before the winter, although nobody knew who would pay.",
    "de": "Der Ausschuss war sich einig, dass die Straße vor dem Winter repariert werden sollte, obwohl niemand zahlen wollte.",
    "fr": "Le comité a décidé que la route devait être réparée avant l'hiver, bien que personne ne sache qui paierait.",
    "es": "El comité acordó que la carretera debía repararse antes del invierno, aunque nadie sabía quién la pagaría.",
    "zh": "委员会同意在冬天之前修好这条路，虽然没有人知道由谁来付钱。",
    "ja": "委員会は冬になる前に道路を修理することに同意したが、誰が払うのかは分からなかった。",
    "ru": "Комитет согласился, что дорогу надо починить до зимы, хотя никто не знал, кто за это заплатит.",
}


def test_languages_are_told_apart_by_a_sentence():
    assert language.identify([*SAID.values(), "", "12 + 34"]) == [*SAID, "unknown", "unknown"]


def test_documents_are_sorted_among_their_peers_and_other_languages_go(tmp_path):
    """Scorers trained on what this machine has, on a corpus of a few documents of each kind."""
    random = np.random.default_rng(0)
    texts, labels = _two_kinds(300)
    bags, targets = features.of_words(texts, scoring._BITS), labels.astype(np.float32)[:, None]
    folder, to = tmp_path / "scorers", tmp_path / "documents"
    folder.mkdir()
    to.mkdir()
    held = classifier.train(bags, targets, ("any",), reads="words", bits=scoring._BITS)
    for name in contrasts.NAMES:
        held.save(folder / f"{name}.npz")
    documents = [_document(f"{SAID['en']} {n} " * 8 + text, f"p{n}") for n, text in enumerate(texts[:200])]
    documents += [_document(text, f"m/{n}.py", "code", "stdlib") for n, text in enumerate(texts[200:])]
    documents.append(_document(SAID["ru"], "russian"))
    drops = Counter()
    data = Data(scoring=Scoring(by="classifiers", languages=("en",)))
    signals = np.array([quality.score(document) for document in documents])
    kept = scoring.sort(documents, signals, folder, to, data, drops)
    assert drops == {scoring.OTHER_LANGUAGE: 1}
    assert [d.id for d in kept] == [d.id for d in documents[:-1]]
    lines = [json.loads(line) for line in (to / "attributes.jsonl").read_text().splitlines()]
    assert [(line["id"], line["bucket"]) for line in lines] == [(d.id, d.bucket) for d in kept]
    facts = json.loads((to / "quality.json").read_text())
    assert facts["languages"] == {"en": 200, "python": 100}
    assert set(facts["peers"]["code_python"]["buckets"]) == {"0", "2", "4"}
    assert sum(sum(held["bins"]) for held in facts["peers"].values()) == 300
    order = random.permutation(len(documents))
    shuffled = [documents[i] for i in order]
    again = {d.id: d.bucket for d in scoring.sort(shuffled, signals[order], folder, to, data, Counter())}
    assert again == {d.id: d.bucket for d in kept}


@pytest.mark.slow
def test_minis_scorers_tell_their_contrasts_apart_and_nothing_low_is_read(tmp_path):
    run = recipes.get("mini")
    manifest = prepare.read_manifest(prepare.prepare(run, tmp_path / "mini", lambda *_: None))
    assert {*contrasts.NAMES, "code_python"} <= set(manifest["scorers"])
    for name, facts in manifest["scorers"].items():
        assert facts["auc"] >= 0.95, name
        assert min(facts["held_out"]["good"], facts["held_out"]["bad"]) >= 10, name
    assert {"general", "math", "code_page", "code_python"} <= set(manifest["quality"]["peers"])
    for held in manifest["quality"]["peers"].values():
        assert sum(held["bins"]) == sum(bucket["documents"] for bucket in held["buckets"].values())
    assert manifest["buckets"]["code"][0]["documents"] > 0
    for stage in manifest["stages"]:
        assert all("0" not in epochs for epochs in stage["epochs_by_bucket"].values())
        assert stage["epochs_by_bucket"]["code"]["4"] == pytest.approx(
            3.2 * stage["epochs_by_bucket"]["code"]["2"], rel=0.02
        )
