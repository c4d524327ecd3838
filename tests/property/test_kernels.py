"""Every kernel on every back end that runs here, against float64, on shapes, groups and documents that nobody chose.

`EXAMPLES=500 pytest tests/property/test_kernels.py` is the long form. A simulated example takes seconds: those tests have a
fiftieth of as many. Whatever nobody is to read holds NaN, simulated memory before it is written included; so does often
one of the routed rows, which must reach exactly what it reaches in the definition.
"""

import os
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import cross_entropy, newton_schulz, routing
from pallas_kernels.attention import tpu as attention_tpu
from pallas_kernels.cross_entropy import xla as cross_entropy_xla
from pallas_kernels.decode_attention.cases import Case as Decode
from pallas_kernels.grouped_matmul.cases import Gmm, Mlp
from pallas_kernels.newton_schulz.cases import Case as Matrices
from tests.kernels import test_attention_tpu as attending
from tests.kernels import test_decode_attention as decoding
from tests.kernels import test_grouped_matmul as grouped
from tests.kernels import test_newton_schulz as iterating
from tests.kernels.hopper_simulator import hopper
from tests.kernels.test_routing import by_sorting

EXAMPLES = int(os.environ.get("EXAMPLES", 2))
unhurried = settings(deadline=None, suppress_health_check=list(HealthCheck))
examples = settings(unhurried, max_examples=EXAMPLES)
simulated = settings(unhurried, max_examples=max(1, EXAMPLES // 50))
compiled = pytest.mark.parametrize("implementation", [pytest.param("reference", marks=pytest.mark.slow), "xla"])
seeds = st.integers(0, 2**32 - 1)
TPU = pltpu.InterpretParams(uninitialized_memory="nan")


def assert_close(got, want, tolerance):
    """Of the largest value; NaN where, and only where, the definition has it."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    size = np.abs(want[np.isfinite(want)]).max(initial=1.0)
    np.testing.assert_allclose(got / size, want / size, atol=tolerance, rtol=0)


@st.composite
def group_sizes(draw, rows, count):
    """Of `count` groups and a tail; among them nothing at all, everything in one group, and groups of one row."""
    kind = draw(st.sampled_from(["cuts", "cuts", "one", "ones"]))
    if kind == "one":
        full = draw(st.integers(0, count - 1))
        return tuple(rows * (e == full) for e in range(count))
    if kind == "ones":
        return tuple(int(e < rows) for e in range(count))
    cuts = sorted(draw(st.lists(st.integers(0, rows), min_size=count, max_size=count)))
    return tuple(np.diff([0, *cuts]).tolist())


@st.composite
def grouped_cases(draw, rows, counts, widths):
    R, (D, M) = draw(st.sampled_from(rows)), draw(st.sampled_from(widths))
    return Gmm(R, D, M, draw(group_sizes(R, draw(st.sampled_from(counts)))))


def spoilt_product(case, seed, dtype="float32"):
    """x, w, sizes and the gradient; in every other one, a row of x holds NaN."""
    x, *rest = grouped.problem(case, dtype, seed)
    return (x.at[seed % case.R, 0].set(jnp.nan) if seed % 2 else x), *rest


@compiled
@examples
@given(grouped_cases([1, 33, 130, 301], [1, 4, 9], [(8, 16), (24, 40)]), seeds)
@example(Gmm(33, 8, 16, (0, 33, 0, 0)), 0)
@example(Gmm(33, 8, 16, (1, 1, 1, 1)), 1)
def test_grouped_matmul_and_its_gradients(implementation, case, seed):
    inputs = spoilt_product(case, seed)
    results = grouped.gmm_and_gradients(*inputs, implementation)
    for got, want in zip(results, grouped.by_group(*inputs), strict=True):
        assert_close(got, want, grouped.TOLERANCE["float32"])


@pytest.mark.slow
@simulated
@given(grouped_cases([1, 7, 600, 1100], [1, 3], [(128, 128), (128, 256)]), seeds)
def test_grouped_matmul_on_a_simulated_tpu(case, seed):
    inputs = spoilt_product(case, seed)
    with pltpu.force_tpu_interpret_mode(TPU):
        results = grouped.gmm_and_gradients.__wrapped__(*inputs, "tpu")
    for got, want in zip(results, grouped.by_group(*inputs), strict=True):
        assert_close(got, want, grouped.TOLERANCE["float32"])


@pytest.mark.slow
@simulated
@given(grouped_cases([5, 290], [1, 3], [(128, 128)]), seeds)
def test_grouped_matmul_on_a_simulated_hopper(case, seed):
    inputs = spoilt_product(case, seed, "bfloat16")
    with hopper():
        results = grouped.gmm_and_gradients.__wrapped__(*inputs, "gpu")
    for got, want in zip(results, grouped.by_group(*inputs), strict=True):
        assert_close(got, want, grouped.TOLERANCE["bfloat16"])


def networks(x, gate, up, down, experts, weights, dy):
    """The routed layer and its gradients for x, gate, up, down and weights: pair by pair, in float64."""
    x, gate, up, down, weights, dy = (np.asarray(z, np.float64) for z in (x, gate, up, down, weights, dy))
    y, dx, dgate, dup, ddown, dweights = (np.zeros_like(z) for z in (x, x, gate, up, down, weights))
    for t, a in zip(*np.nonzero((experts >= 0) & (experts < len(gate))), strict=True):
        e, weight = experts[t, a], weights[t, a]
        g, u = x[t] @ gate[e], x[t] @ up[e]
        sigmoid = 1 / (1 + np.exp(-g))
        active, dactive = g * sigmoid * u, down[e] @ dy[t]
        dg, du = dactive * weight * u * sigmoid * (1 + g * (1 - sigmoid)), dactive * weight * g * sigmoid
        y[t] += weight * active @ down[e]
        dx[t] += gate[e] @ dg + up[e] @ du
        dgate[e] += np.outer(x[t], dg)
        dup[e] += np.outer(x[t], du)
        ddown[e] += weight * np.outer(active, dy[t])
        dweights[t, a] = active @ dactive
    return y, dx, dgate, dup, ddown, dweights


@examples
@given(st.sampled_from([1, 8, 45, 130]), st.sampled_from([(3, 1), (6, 3)]), st.sampled_from([1.0, 6.0]), seeds)
def test_routed_experts_and_their_gradients(tokens, experts, skew, seed):
    x, *rest = grouped.routed(Mlp(tokens, 16, 24, *experts, skew=skew), seed)
    inputs = x.at[seed % tokens, 0].set(jnp.nan) if seed % 2 else x, *rest
    dy = np.cos(np.arange(x.size)).reshape(x.shape).astype("float32")
    want = networks(*inputs[:4], np.asarray(inputs[4]), inputs[5], dy)
    for got, expected in zip(grouped.value_and_gradients(inputs, "xla"), want, strict=True):
        assert_close(got, expected, grouped.TOLERANCE["float32"])


@examples
@given(st.sampled_from([1, 127, 128, 300]), st.sampled_from([1, 7, 160]), seeds, st.booleans())
def test_the_position_map(rows, groups, seed, one):
    experts = np.random.default_rng(seed).integers(-1, groups + 1, rows) * (not one)
    got = jax.jit(routing.position_map, static_argnums=1)(jnp.asarray(experts, jnp.int32), groups)
    for z, want in zip(got, by_sorting(experts, groups), strict=True):
        np.testing.assert_array_equal(z, want)
    np.testing.assert_array_equal(routing.row_order(got[0]), np.argsort(got[0]))


@examples
@given(st.sampled_from([1, 30]), st.sampled_from([(1, 1), (7, 3), (160, 8)]), seeds)
def test_the_choice_of_experts(tokens, experts, seed):
    E, A = experts
    rng = np.random.default_rng(seed)
    x, router, bias = (rng.normal(size=s).astype("float32") for s in ((tokens, 12), (12, E), (E,)))
    scores = routing.scores(jnp.asarray(x), jnp.asarray(router))
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-x.astype("float64") @ router)), rtol=1e-5)
    chosen, onehot, weights = routing.choose_experts(scores, jnp.asarray(bias), A, 2.5)
    np.testing.assert_array_equal(chosen, np.argsort(-np.asarray(scores + bias), axis=-1, kind="stable")[:, :A])
    picked = np.take_along_axis(np.asarray(scores, "float64"), np.asarray(chosen), -1)
    np.testing.assert_allclose(weights, 2.5 * picked / picked.sum(-1, keepdims=True), rtol=1e-5)
    np.testing.assert_array_equal(onehot.sum(0), np.bincount(np.asarray(chosen).ravel(), minlength=E))


@st.composite
def packed_rows(draw, length):
    """Positions and segments of documents one after another, those of one token among them, and padding behind."""
    kind = draw(st.sampled_from(["cuts", "cuts", "ones", "whole"]))
    cuts = {"ones": range(1, length), "whole": []}.get(kind) or draw(st.lists(st.integers(0, length), max_size=6))
    ends = np.unique([*cuts, length])
    ends = ends[ends > 0]
    lengths = np.diff([0, *ends]) if kind != "whole" else np.array([length])
    padding = draw(st.integers(0, length // 2))
    positions = np.concatenate([np.arange(n) for n in lengths])
    segments = np.repeat(np.arange(len(lengths)) + 1, lengths)
    real = np.arange(length) < length - padding
    return [np.where(real, z, 0).astype(np.int32)[None] for z in (positions, segments)]


ATTENTION_SHAPES = [(1, 9, 2, 1, 8), (2, 64, 2, 2, 8), (1, 130, 4, 2, 16), (1, 301, 2, 1, 8)]


@st.composite
def attention_inputs(draw, shapes, dtype="float32"):
    """q, k, v, dy and places of packed rows, or of anything anywhere."""
    B, T, N, K, H = draw(st.sampled_from(shapes))
    seed = draw(seeds)
    q, k, v, dy = attending.arrays(B, T, T, N, K, H, seed, dtype)
    if draw(st.booleans()):
        position, segment = (np.repeat(z, B, 0) for z in draw(packed_rows(T)))
        places = position, position, segment, segment, draw(st.sampled_from([None, segment]))
    else:
        rng = np.random.default_rng(seed)
        places = [rng.integers(0, 4, (B, T), dtype=np.int32) for _ in range(4)]
        places.append(rng.integers(1, np.maximum(places[2], 1) + 1, dtype=np.int32))
    return (q, k, v, dy), tuple(places)


attend = jax.jit(attending.value_and_gradients, static_argnames="implementation")


@compiled
@examples
@given(attention_inputs(ATTENTION_SHAPES))
def test_attention_and_its_gradients(implementation, inputs):
    arrays, places = inputs
    got = attend(*arrays, places, implementation=implementation)
    attending.assert_as_defined(got, attending.by_the_definition(*arrays, places))


@pytest.mark.slow
@simulated
@given(attention_inputs([(1, 100, 2, 1, 64), (1, 260, 1, 1, 128)]))
def test_attention_on_a_simulated_tpu(inputs):
    arrays, places = inputs
    with mock.patch.object(attention_tpu, "_config", return_value=attending.SMALL), pltpu.force_tpu_interpret_mode(TPU):
        got = attending.value_and_gradients(*arrays, places)
    attending.assert_as_defined(got, attending.by_the_definition(*arrays, places))


@pytest.mark.slow
@simulated
@given(attention_inputs([(1, 70, 2, 1, 64), (1, 150, 1, 1, 128)], "bfloat16"))
def test_attention_on_a_simulated_hopper(inputs):
    arrays, places = inputs
    with hopper(late=False):
        got = attending.value_and_gradients(*arrays, places, "gpu")
    attending.assert_as_defined(got, attending.by_the_definition(*arrays, places), "bfloat16")


@st.composite
def paged_caches(draw, dtype="float32"):
    case = Decode(5, draw(st.sampled_from([1, 3])), 6, 2, 64, Z=16, C=draw(st.sampled_from([1, 6])))
    lengths = draw(st.lists(st.integers(0, case.C * case.Z), min_size=case.B, max_size=case.B))
    return decoding.problem(case, dtype, draw(seeds), lengths)


@compiled
@examples
@given(paged_caches())
def test_decode_attention(implementation, inputs):
    want = decoding.row_by_row(*inputs, 0.1)
    np.testing.assert_allclose(decoding.run(implementation, *inputs), want, atol=decoding.TOLERANCE["float32"])


@pytest.mark.slow
@simulated
@given(paged_caches())
def test_decode_attention_on_a_simulated_tpu(inputs):
    want = decoding.row_by_row(*inputs, 0.1)
    np.testing.assert_allclose(decoding.run("tpu", *inputs), want, atol=decoding.TOLERANCE["float32"])


def by_the_logits(x, w, targets, weights, temperature):
    """Loss, log-probabilities, and gradients of x and w, in float64; a row of weight 0 is not looked at."""
    x, w, weights, temperature = (np.asarray(z, np.float64) for z in (x, w, weights, temperature))
    logits = x @ w / temperature[:, None]
    log_prob = logits - logits.max(1, keepdims=True)
    log_prob -= np.log(np.exp(log_prob).sum(1, keepdims=True))
    of_target = log_prob[np.arange(len(x)), targets]
    slope = (np.exp(log_prob) - np.eye(w.shape[1])[targets]) * (weights / temperature)[:, None]
    slope, used_x = (np.where(weights[:, None] == 0, 0, z) for z in (slope, x))
    return -np.where(weights == 0, 0, weights * of_target).sum(), of_target, slope @ w.T, used_x.T @ slope


@partial(jax.jit, static_argnames="implementation")
def scored(x, w, targets, weights, temperature, implementation):
    def loss(x, w):
        of = cross_entropy.linear_softmax(
            cross_entropy.negative_log_likelihood, x, w, targets, weights,
            temperature_X=temperature, implementation=implementation,
        )  # fmt: skip
        return of.loss, of.log_prob_X

    (loss, log_prob), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, w)
    return loss, log_prob, *gradients


@compiled
@examples
@given(st.sampled_from([1, 7, 33]), st.sampled_from([5, 64]), seeds)
def test_cross_entropy_and_its_gradients(implementation, tokens, vocabulary, seed):
    rng = np.random.default_rng(seed)
    x, w = (jnp.asarray(rng.normal(size=s), "float32") for s in ((tokens, 8), (8, vocabulary)))
    weights = rng.random(tokens) * (rng.random(tokens) < 0.7)
    if seed % 2 and implementation == "xla":  # the definition multiplies by a weight of zero
        weights[0], x = 0, x.at[0].set(jnp.nan)
    of_token = (z.astype("float32") for z in (weights, rng.uniform(0.5, 2, tokens)))
    arrays = x, w, rng.integers(0, vocabulary, tokens), *of_token
    with mock.patch.dict(cross_entropy_xla.CHUNK_LOGITS, cpu=4 * vocabulary):  # several chunks, and some left over
        got = scored(*arrays, implementation)
    for z, want in zip(got, by_the_logits(*arrays), strict=True):
        assert_close(z, want, 1e-5)  # float32 sums in another order


@st.composite
def matrices(draw, sizes, steps):
    batch = draw(st.sampled_from([(), (2,)]))
    return Matrices(batch, draw(st.sampled_from(sizes)), draw(st.sampled_from(sizes)), steps)


iterate = jax.jit(newton_schulz.newton_schulz, static_argnames=("quintics", "implementation"))


@compiled
@examples
@given(matrices([1, 7, 40], 3), seeds)
def test_newton_schulz(implementation, case, seed):
    x = iterating.matrices(case, "float32", seed)
    y = iterate(x, (iterating.QUINTIC,) * case.steps, implementation=implementation)
    assert iterating.error(y, x, case.steps) < 1e-4  # float32 rounding, amplified by three steps of slope up to 3.4


@pytest.mark.slow
@simulated
@given(matrices([1, 130, 200], 1), seeds)
def test_newton_schulz_on_a_simulated_tpu(case, seed):
    x = iterating.matrices(case, "bfloat16", seed)
    quintics = (iterating.QUINTIC,)
    with pltpu.force_tpu_interpret_mode(TPU):
        y = newton_schulz.newton_schulz(x, quintics, implementation="tpu")
    near = iterating.error(newton_schulz.newton_schulz(x, quintics, implementation="xla"), x, 1)
    assert iterating.error(y, x, 1) < 1.5 * near + 2**-8  # bfloat16: two roundings more of the polynomial
