"""Bits per byte against a plain loop over tokens, and the byte model against Witten and Bell's formula by hand."""

import math
from collections import Counter
from dataclasses import replace as with_fields

import jax
import numpy as np
import pytest

from experiments import recipes
from glm_jax import mesh, model
from glm_jax.config import ConfigError, Mesh, replace
from glm_jax.data.document import Document, write_documents
from glm_jax.evals import bits_per_byte as bpb
from glm_jax.evals.baselines import ByteModel
from glm_jax.text.tokenizer import train

TEXTS = ("short", "a somewhat longer text, which needs more than one window " * 3, "naïve – ünïcode", "x = 1\n" * 20)


@pytest.fixture(scope="module")
def tokenizer():
    return train(TEXTS, 384)


@pytest.fixture(scope="module")
def cfg(tokenizer):
    tiny = recipes.get("tiny").model
    return with_fields(tiny, V=tokenizer.vocab_size, L=2, D=32, F=64, M=32, E=4, A=2, mtp_layers=0)


@pytest.fixture(scope="module")
def weights(cfg):
    params, router_bias_LE = jax.jit(model.init, static_argnums=0)(cfg, jax.random.key(0))
    return jax.tree.map(lambda w: 5 * w, params), router_bias_LE  # far from uniform predictions


_forward = jax.jit(model.forward, static_argnums=0)


def plain_bits(cfg, weights, tokenizer, text: str, seq_len: int) -> float:
    """One window at a time, by the definition: a token sees what its window holds before it."""
    tokens = [tokenizer.end, *tokenizer.encode(text)]
    nats, counted, first = 0.0, 1, 0
    while counted < len(tokens):
        window = tokens[first : first + seq_len + 1]
        padded = np.array([window[:-1] + [0] * (seq_len + 1 - len(window))], np.int32)  # nobody looks ahead
        log_p_TV = jax.nn.log_softmax(_forward(cfg, *weights, padded)[0][0])
        for at in range(counted, first + len(window)):
            nats -= float(log_p_TV[at - first - 1, tokens[at]])
        counted = first + len(window)
        first += seq_len - seq_len // 4
    return nats / math.log(2)


def test_windows_in_shared_rows_cost_what_they_cost_alone(cfg, weights, tokenizer):
    windows = bpb.cut(TEXTS, tokenizer, seq_len=32, rows=2)
    assert windows.size.tolist() == [len(text.encode()) for text in TEXTS]
    assert {z.shape for batch in windows.batches for z in batch.values()} == {(2, 32)}
    paid = bpb.bits(cfg, *weights, windows)
    np.testing.assert_allclose(paid, [plain_bits(cfg, weights, tokenizer, text, 32) for text in TEXTS], rtol=1e-4)
    total = bpb.bits_per_byte(cfg, *weights, windows)
    assert total == pytest.approx(paid.sum() / sum(len(text.encode()) for text in TEXTS))


def test_every_token_is_counted_once(tokenizer):
    for seq_len in (8, 31, 64):
        windows = bpb.cut(TEXTS, tokenizer, seq_len, rows=4)
        counted = Counter(int(i) for batch in windows.batches for i in batch["owner"][batch["owner"] >= 0])
        assert counted == {i: len(tokenizer.encode(text)) for i, text in enumerate(TEXTS)}


def test_a_mesh_changes_nothing(cfg, weights, tokenizer):
    windows = bpb.cut(TEXTS, tokenizer, seq_len=32, rows=2)
    alone = bpb.bits(cfg, *weights, windows)
    with jax.set_mesh(mesh.make(Mesh(), jax.devices()[:1])):
        params = jax.device_put(weights[0], mesh.shardings(jax.sharding.get_mesh(), model.specs(cfg)))
        np.testing.assert_allclose(bpb.bits(cfg, params, weights[1], windows), alone, rtol=1e-5)


def test_one_compilation_per_length(cfg, weights, tokenizer):
    bpb.negative_log_likelihood.clear_cache()
    for texts in (TEXTS, TEXTS[:2], TEXTS[::-1]):
        bpb.bits(cfg, *weights, bpb.cut(texts, tokenizer, seq_len=32, rows=2))
    assert bpb.negative_log_likelihood._cache_size() == 1


def test_excerpts_fill_the_budget_without_one_text_taking_it():
    texts = ["a" * 1000, "é" * 50, "", "b" * 3, *["c" * 90] * 20]
    chosen = bpb._excerpts(texts, 800)
    assert chosen[:3] == ["a" * 100, "é" * 50, "bbb"]
    assert sum(len(text.encode()) for text in chosen) == 800
    assert bpb._excerpts(["é" * 50], 24) == ["é"]  # never half a character


def test_evaluator_reports_every_domain(tmp_path, monkeypatch, cfg, weights, tokenizer):
    small = {
        f"{stage}.{field}": n
        for stage in ("pretrain.0", "midtrain.0")
        for field, n in (("seq_len", 32), ("microbatch_rows", 2))
    }
    run = replace(recipes.get("tiny"), **{"model": cfg, "loop.eval_bytes": 400, **small})
    monkeypatch.setattr(bpb, "load_tokenizer", lambda data, vocab_size: tokenizer)
    documents = [
        Document.of(TEXTS[1], domain="general", source="pydoc", path="t", group="pydoc:t"),
        Document.of(TEXTS[3], domain="code", source="stdlib", path="m.py", group="stdlib:m"),
        Document.of(TEXTS[2], domain="math", source="doc", path="d", group="doc:d"),
        Document.of(TEXTS[1] * 4, domain="long", source="pydoc", path="t", group="pydoc:t"),
    ]
    write_documents(tmp_path / "heldout.jsonl", documents[:2])
    with pytest.raises(ConfigError, match=r"no held-out documents in math, long; raise data.held_out"):
        bpb.evaluator(tmp_path, run, run.stages[0])
    write_documents(tmp_path / "heldout.jsonl", documents)
    evaluate = bpb.evaluator(tmp_path, run, run.stages[0])
    values = evaluate(cfg, *weights)
    assert set(values) == {"general", "code", "math", "long", "stdlib", bpb.CODE_AND_MATH}
    assert (
        values["stdlib"]
        == values["code"]
        == pytest.approx(plain_bits(cfg, weights, tokenizer, TEXTS[3][:50], 32) / 50, rel=1e-4)
    )
    assert min(values["code"], values["math"]) < values[bpb.CODE_AND_MATH] < max(values["code"], values["math"])
    assert evaluate(cfg, *weights) == values


def slow_byte_model(training: list[bytes], text: bytes) -> float:
    """Witten-Bell by dictionaries: the same formula, one byte at a time."""
    counts = Counter()
    for document in training:
        padded = b"\0\0\0" + document
        counts.update(padded[i - order : i + 1] for i in range(3, len(padded)) for order in range(4))
    bits, padded = 0.0, b"\0\0\0" + text
    for i in range(3, len(padded)):
        p = 1 / 256
        for order in range(4):
            context = padded[i - order : i]
            followers = [n for gram, n in counts.items() if len(gram) == order + 1 and gram[:order] == context]
            if followers:
                n, kinds = sum(followers), len(followers)
                p = (counts[padded[i - order : i + 1]] + kinds * p) / (n + kinds)
        bits -= math.log2(p)
    return bits / len(text)


def test_byte_model_is_witten_bell():
    training = [b"abracadabra", "häuser".encode(), b"aa", b"\0\xff\xff"]
    fast = ByteModel(training)
    for text in (b"abra", b"zzz", "bäh".encode(), b"\xff\xff\0a"):
        assert fast.bits_per_byte([text]) == pytest.approx(slow_byte_model(training, text), rel=1e-9)


def test_byte_model_is_a_distribution():
    fast = ByteModel([b"the cat sat on the mat"])
    every = [
        2 ** -(4 * fast.bits_per_byte([b"the" + bytes([c])]) - 3 * fast.bits_per_byte([b"the"])) for c in range(256)
    ]
    assert sum(every) == pytest.approx(1)
