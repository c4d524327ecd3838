"""Attention: every implementation against a loop over queries in float64, forward and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import attention as kernels
from pallas_kernels.attention.cases import CASES, Case
from tests.kernels import test_attention_tpu as on_tpu

IMPLEMENTATIONS = ["reference", "xla"]  # an accelerator's has larger shapes, an interpreter and a file of its own
# Means of unit normals in float32; bfloat16 rounds probabilities and the result to 8 bits.
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}


def problem(case, dtype="float32", seed=0):
    """q, k, v and where they stand: the queries are the last T of S tokens."""
    rng = np.random.default_rng(seed)
    shapes = (case.B, case.T, case.N, case.H), (case.B, case.S, case.K, case.H), (case.B, case.S, case.K, case.H)
    q, k, v = (jnp.asarray(rng.normal(size=s), dtype) for s in shapes)
    length = -(-case.S // case.documents)
    at = np.arange(case.S)
    segments = np.where(at < case.S - case.padding, at // length + 1, 0)
    positions, segments = (np.broadcast_to(z, (case.B, case.S)).astype(np.int32) for z in (at % length, segments))
    return q, k, v, positions[:, -case.T :], positions, segments[:, -case.T :], segments


def forward(q, k, v, q_positions, k_positions, q_segments, k_segments, implementation=None, q_prefixes=None):  # noqa: PLR0913 (the door's)
    return kernels.attention(
        q,
        k,
        v,
        q_positions_BT=q_positions,
        k_positions_BS=k_positions,
        q_segments_BT=q_segments,
        k_segments_BS=k_segments,
        q_prefixes_BT=q_prefixes,
        scale=q.shape[-1] ** -0.5,
        implementation=implementation,
    )


@partial(jax.jit, static_argnames="implementation")
def value_and_gradients(  # noqa: PLR0913 (the door's)
    q, k, v, q_positions, k_positions, q_segments, k_segments, implementation=None, q_prefixes=None
):
    def run(q, k, v):
        return forward(q, k, v, q_positions, k_positions, q_segments, k_segments, implementation, q_prefixes)

    y, vjp = jax.vjp(run, q, k, v)
    dy = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape).astype(y.dtype)
    return y, *vjp(dy)


def query_by_query(q, k, v, q_positions, k_positions, q_segments, k_segments):
    q, k, v = (np.asarray(z, np.float64) for z in (q, k, v))
    y = np.zeros_like(q)
    for b, t, n in np.ndindex(*q.shape[:3]):
        see = (k_positions[b] <= q_positions[b, t]) & (k_segments[b] == q_segments[b, t]) & (k_segments[b] != 0)
        if see.any():
            head = n // (q.shape[2] // k.shape[2])
            p = np.exp(k[b, see, head] @ q[b, t, n] * q.shape[-1] ** -0.5)
            y[b, t, n] = p @ v[b, see, head] / p.sum()
    return y


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["blocks_packed_padded", "prefill_after_cache", "draft"])
def test_forward_equals_a_loop_over_queries(name, implementation):
    inputs = problem(CASES[name])
    y = value_and_gradients(*inputs, implementation)[0]
    np.testing.assert_allclose(y, query_by_query(*inputs), atol=TOLERANCE["float32"])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("blocks_packed_padded", "bfloat16"), *((name, "float32") for name, case in CASES.items() if "test" in case.tags)],
)
def test_gradients_equal_the_definition(name, dtype):
    inputs = problem(CASES[name], dtype)
    want = value_and_gradients(*inputs, "reference")
    for got, expected in zip(value_and_gradients(*inputs, "xla"), want, strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(got.astype("float32"), expected.astype("float32"), atol=TOLERANCE[dtype])


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_any_positions_and_segments(seed):
    """Not even in order: what is visible is data."""
    q, k, v, *_ = problem(Case(B=2, T=10, S=300, N=4, K=2, H=8), seed=seed)
    rng = np.random.default_rng(seed)
    at = [rng.integers(0, 4, shape, dtype=np.int32) for shape in 2 * [(2, 10), (2, 300)]]
    prefixes = rng.integers(1, np.maximum(at[2], 1) + 1, dtype=np.int32)
    want = value_and_gradients(q, k, v, *at, "reference", prefixes)
    for got, expected in zip(value_and_gradients(q, k, v, *at, None, prefixes), want, strict=True):
        np.testing.assert_allclose(got, expected, atol=TOLERANCE["float32"])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_continuations_of_a_shared_prompt_see_what_they_see_alone(implementation):
    """A prompt of 300 tokens and three continuations of 40: once in one row, once each with a prompt of its own."""
    prompt, own, count = 300, 40, 3
    q, k, v, *_ = problem(Case(B=1, T=prompt + count * own, S=prompt + count * own, N=4, K=2, H=8))
    segments = np.array([[1] * prompt + [n + 2 for n in range(count) for _ in range(own)]], np.int32)
    prefixes = np.ones_like(segments)
    positions = np.array([[*range(prompt), *[prompt + i for _ in range(count) for i in range(own)]]], np.int32)
    shared = value_and_gradients(q, k, v, positions, positions, segments, segments, implementation, prefixes)[0]
    for n in range(count):
        at = np.r_[0:prompt, prompt + n * own : prompt + (n + 1) * own]
        ones = np.ones((1, len(at)), np.int32)
        places = (np.arange(len(at), dtype=np.int32)[None],) * 2
        alone = value_and_gradients(q[:, at], k[:, at], v[:, at], *places, ones, ones, implementation)[0]
        np.testing.assert_allclose(shared[:, at], alone, atol=TOLERANCE["float32"])


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_shared_keys_are_keys_that_stand_before_every_row(implementation, queries):
    q, k, v, q_at, k_at, q_segments, k_segments = problem(Case(B=3, T=queries, S=50, N=4, K=2, H=8, padding=10))
    shared = tuple(z[0, :17].swapaxes(0, 1) for z in problem(Case(B=1, T=17, S=17, N=4, K=2, H=8), seed=1)[1:3])
    call = partial(kernels.attention, scale=8**-0.5, implementation=implementation)
    at = dict(zip(("q_segments_BT", "k_segments_BS"), (q_segments, k_segments), strict=True))
    got = call(q, k, v, q_positions_BT=q_at, k_positions_BS=k_at, **at, shared_KSH=shared)
    k, v = (jnp.concatenate([jnp.stack([z.swapaxes(0, 1)] * 3), own], 1) for z, own in zip(shared, (k, v), strict=True))
    k_at = np.concatenate([np.broadcast_to(np.arange(17), (3, 17)), k_at + 17], 1).astype(np.int32)
    at["k_segments_BS"] = np.pad(k_segments, [(0, 0), (17, 0)], constant_values=1)  # one document in each row
    want = call(q, k, v, q_positions_BT=q_at + 17, k_positions_BS=k_at, **at)
    np.testing.assert_allclose(got, want, atol=TOLERANCE["float32"])


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_query_that_sees_nothing_is_zero_and_has_no_gradient(queries, implementation):
    inputs = problem(Case(B=1, T=queries, S=20, N=2, K=1, H=8, padding=20))
    for z in value_and_gradients(*inputs, implementation):
        np.testing.assert_array_equal(z, 0)


@pytest.mark.parametrize("spoiled", ["qv", "k", "dy"])
def test_what_is_not_finite_reaches_only_who_sees_it(spoiled):
    run = jax.jit(partial(on_tpu.value_and_gradients, implementation="xla"))
    on_tpu.assert_only_who_sees_it_is_spoiled(spoiled, run)


def test_bad_input_names_the_rule():
    q, k, v, *at = problem(CASES["one_block"])
    where = dict(zip(("q_positions_BT", "k_positions_BS", "q_segments_BT", "k_segments_BS"), at, strict=True))
    shared = k[0].swapaxes(0, 1), v[0].swapaxes(0, 1)
    with pytest.raises(ValueError, match="leave q_prefixes_BT out"):
        kernels.attention(q, k, v, **where, q_prefixes_BT=at[2], shared_KSH=shared, scale=1.0)
    with pytest.raises(ValueError, match="any length"):
        kernels.attention(q, k, v, **where, shared_KSH=(k[0], v[0]), scale=1.0)
    with pytest.raises(ValueError, match="known: reference, xla"):
        value_and_gradients(q, k, v, *at, implementation="cuda")
    with pytest.raises(ValueError, match="N a multiple of K"):
        value_and_gradients(q[:, :, :3], k, v, *at)
    with pytest.raises(ValueError, match="cast them to one dtype"):
        value_and_gradients(q.astype("bfloat16"), k, v, *at)
    with pytest.raises(ValueError, match="k_segments"):
        value_and_gradients(q, k, v, *at[:3], at[3][:, 1:])
