"""FP8 products: every implementation against float64 products of what the 8-bit numbers stand for."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import fp8
from pallas_kernels.fp8 import tpu
from pallas_kernels.fp8.cases import CASES

# Sums of at most 256 products in float32, relative to the largest; bfloat16 rounds the result once, to 8 bits.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-8}


def stands_for(z):
    """Number by number, in float64."""
    value, scale = np.asarray(z.value).astype(np.float64), np.asarray(z.scale, np.float64)
    *_, rows, columns = value.shape
    row = np.arange(rows) if scale.shape[-2] == rows else np.arange(rows) // 128
    return value * scale[..., row[:, None], np.arange(columns) // 128]


def problem(case, dtype="float32", seed=0):
    """x, its tail poisoned, and w whose blocks differ in size."""
    rng = np.random.default_rng(seed)
    shape = (len(case.sizes), case.D, case.M) if case.sizes else (case.D, case.M)
    x, w = (rng.normal(size=s) * np.exp(3 * rng.normal(size=(*s[:-1], 1))) for s in ((case.X, case.D), shape))
    if case.sizes:
        x[sum(case.sizes) :] = np.nan
    return jnp.asarray(x, dtype), fp8.quantize(jnp.asarray(w, "float32"))


@partial(jax.jit, static_argnames="implementation")
def run(x, w, sizes, implementation=None):
    if sizes is None:
        return fp8.matmul(x, w, implementation=implementation)
    return fp8.grouped_matmul(x, w, sizes, implementation=implementation)


def expected(x, w, sizes):
    x, w = stands_for(jax.jit(fp8.quantize_rows)(x)), stands_for(w)
    if sizes is None:
        return x @ w
    ends, y = np.cumsum(sizes), np.zeros((len(x), w.shape[2]))
    for e, (end, size) in enumerate(zip(ends, sizes, strict=True)):
        y[end - size : end] = x[end - size : end] @ w[e]
    return y


def check(case, implementation, dtype="float32", seed=0):
    x, w = problem(case, dtype, seed)
    sizes = jnp.asarray(case.sizes, jnp.int32) if case.sizes else None
    got, want = run(x, w, sizes, implementation), expected(x, w, case.sizes or None)
    assert got.dtype == dtype
    size = np.abs(want).max(1, keepdims=True) + 1e-30  # of a row's own: rows differ by orders of magnitude
    np.testing.assert_allclose(np.asarray(got, np.float64) / size, want / size, atol=8 * TOLERANCE[dtype], rtol=0)


ANY = [(name, one) for name, case in CASES.items() if "test" in case.tags for one in ("reference", "xla")]
TPU = [pytest.param(name, "tpu", marks=pytest.mark.slow) for name in ("lanes", "lanes_odd", "lanes_groups")]


@pytest.mark.parametrize(("name", "implementation"), [*ANY, *TPU])
def test_products_are_those_of_the_numbers_that_the_bits_stand_for(name, implementation):
    check(CASES[name], implementation)
    if implementation != "reference":
        check(CASES[name], implementation, "bfloat16", seed=1)


@pytest.mark.slow
def test_weights_widened_by_words_are_the_same(monkeypatch):
    monkeypatch.setattr(tpu, "by_words", lambda: True)
    x, w = problem(CASES["lanes"], seed=2)
    every = jnp.asarray(
        np.delete(np.arange(256, dtype="uint8"), [0x7F, 0xFF])
    )  # but NaN: all normal and subnormal numbers
    bits = jnp.resize(every, w.value.shape)
    w = w._replace(value=jax.lax.bitcast_convert_type(bits, fp8.E4M3))
    got, want = jax.jit(partial(fp8.matmul, implementation="tpu"))(x, w), expected(x, w, None)
    size = np.abs(want).max(1, keepdims=True)
    np.testing.assert_allclose(np.asarray(got, np.float64) / size, want / size, atol=8 * TOLERANCE["float32"], rtol=0)


@partial(jax.jit, static_argnames=("at_once", "implementation"))
def mlp(x, layer, experts, weights, at_once=None, implementation=None):
    return fp8.expert_mlp(x, *layer, experts, weights, at_once=at_once, implementation=implementation)


def layer_and_choices(X=24, D=140, M=130, E=5, A=2, seed=0):
    """Tokens, a layer in 8 bits, distinct choices of which some are another device's, and weights."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(X, D)), "float32")
    shapes = (E, D, M), (E, D, M), (E, M, D)
    layer = tuple(fp8.quantize(jnp.asarray(rng.normal(size=shape) / shape[1] ** 0.5, "float32")) for shape in shapes)
    experts = np.stack([rng.choice(np.arange(-1, E + 1), A, replace=False) for _ in range(X)])
    return x, layer, jnp.asarray(experts, jnp.int32), jnp.asarray(rng.random((X, A)), "float32")


def narrow():
    """Tokens, and a layer whose last matrix is of fewer experts."""
    (x, (gate, up, _), *_), (_, (*_, down), *_) = layer_and_choices(M=7), layer_and_choices(M=7, E=4)
    return x, (gate, up, down)


def by_token(x, layer, experts, weights):
    """Choice by choice in float64, rounded to 8 bits where the layer rounds."""
    rows, (gate, up, down) = stands_for(fp8.quantize_rows(x)), map(stands_for, layer)
    y = np.zeros(x.shape)
    for t, a in np.argwhere((np.asarray(experts) >= 0) & (np.asarray(experts) < len(gate))):
        e = experts[t, a]
        g = rows[t] @ gate[e]
        hidden = jnp.asarray((g / (1 + np.exp(-g)) * (rows[t] @ up[e]))[None], "float32")
        y[t] += float(weights[t, a]) * (stands_for(fp8.quantize_rows(hidden))[0] @ down[e])
    return y


@pytest.mark.parametrize("at_once", [None, 7])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_experts_equal_a_loop_over_tokens(implementation, at_once):
    inputs = layer_and_choices()
    want = by_token(*inputs)
    # a hidden number next to the middle of two of e4m3 may go to the other one: 1/16 of it, of 130 in a sum
    np.testing.assert_allclose(mlp(*inputs, at_once, implementation), want, atol=5e-3 * np.abs(want).max())
    close = np.abs(np.asarray(mlp(*inputs, at_once, implementation)) - want) < 1e-5 * np.abs(want).max()
    assert close.mean() > 0.8


def test_a_loop_does_not_hold_all_its_weights_widened():
    """As a sampler's: each token goes through every matrix."""

    w = fp8.Quantized(jax.ShapeDtypeStruct((256, 256), fp8.E4M3), jax.ShapeDtypeStruct((2, 2), "float32"))

    def temporaries(count):
        def tokens(x, weights):
            return jax.lax.fori_loop(0, 4, lambda _, x: functools.reduce(fp8.matmul, weights, x), x)

        by = jax.jit(tokens, compiler_options={"xla_backend_optimization_level": 3})
        compiled = by.lower(jax.ShapeDtypeStruct((4, 256), "float32"), [w] * count).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(8) < temporaries(1) + 2 * 4 * 256**2


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=4, max_size=4), st.integers(0, 2**32 - 1))
def test_any_group_sizes(sizes, seed):
    check(type(CASES["groups"])(40, 140, 24, tuple(sizes)), None, seed=seed)


@pytest.mark.parametrize("quantize", [fp8.quantize, fp8.quantize_rows])
def test_eight_bits_are_within_half_of_their_last(quantize):
    x = np.random.default_rng(0).normal(size=(130, 300)).astype("float32") * np.logspace(-20, 20, 300, dtype="float32")
    x[:, :3] = 0
    z = quantize(jnp.asarray(x))
    assert z.value.dtype == fp8.E4M3 and z.scale.dtype == jnp.float32
    assert z.scale.shape == ((2 if quantize is fp8.quantize else 130), 3)
    rows = np.arange(130) // (128 if quantize is fp8.quantize else 1)
    smallest = np.asarray(z.scale, np.float64)[rows[:, None], np.arange(300) // 128] * 2**-10
    error = np.abs(stands_for(z) - x)
    assert (error <= np.maximum(np.abs(x) * 2**-4, smallest) * (1 + 1e-5)).all()  # three bits behind the first
    np.testing.assert_array_equal(np.abs(np.asarray(z.value, np.float32)).max() == fp8.LARGEST, True)
    np.testing.assert_allclose(fp8.dequantize(z), stands_for(z), rtol=1e-6)


def test_zeros_stay_zeros_and_nan_stays_in_its_row():
    x, w = problem(CASES["edges"])
    x = x.at[1].set(0).at[2, 3].set(jnp.nan).at[3, 150].set(jnp.inf)
    y = np.asarray(run(x, w, None))
    assert (y[1] == 0).all()
    np.testing.assert_array_equal(np.isnan(y).all(1), [False, False, True, True, False])
    np.testing.assert_array_equal(np.isfinite(y).all(1), [True, True, False, False, True])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x, w: fp8.matmul(x[:, :8], w), "do not fit"),
        (lambda x, w: fp8.matmul(x, w._replace(scale=w.scale[:1])), "do not fit"),
        (lambda x, w: fp8.matmul(x, w._replace(value=w.value.astype("float32"))), "fp8.quantize"),
        (lambda x, w: fp8.grouped_matmul(x, w, jnp.zeros(1, jnp.int32)), r"\[E, D, M\]"),
        (lambda x, w: fp8.grouped_matmul(x, jax.tree.map(lambda z: z[None], w), jnp.zeros(1)), "must be integers"),
        (lambda x, w: fp8.quantize(x[0]), "quantize_rows"),
        (lambda x, w: fp8.matmul(x, w, implementation="gpu"), "known: reference, xla, tpu"),
        (lambda x, w: mlp(x, (w, w, w), *layer_and_choices()[2:]), r"gate and up are \[E,D,M\]"),
        (lambda x, w: mlp(*layer_and_choices()[:2], *layer_and_choices(3)[2:]), r"experts and weights are \[X,A\]"),
        (
            lambda x, w: mlp(*narrow(), *layer_and_choices()[2:]),
            r"down \(4, 7, 140\), .* do not fit",
        ),
    ],
)
def test_bad_input_names_the_rule(call, words):
    with pytest.raises(ValueError, match=words):
        call(*problem(CASES["edges"]))


def test_a_tpu_takes_whole_blocks():
    with pytest.raises(NotImplementedError, match="multiples of 128"):
        fp8.matmul(*problem(CASES["edges"]), implementation="tpu")
