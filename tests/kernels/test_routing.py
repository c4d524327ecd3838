"""Routing: the position map against the definition by a stable sort, and the choice against its laws."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import routing
from pallas_kernels.routing import thirds

IMPLEMENTATIONS = list(routing.IMPLEMENTATIONS)
ROWS, GROUPS = 301, 7
position_map = jax.jit(routing.position_map, static_argnames=("groups", "implementation"))


def by_sorting(experts, groups):
    """Position and sizes, in numpy."""
    expert = np.where((experts >= 0) & (experts < groups), experts, groups)
    return np.argsort(np.argsort(expert, kind="stable")), np.bincount(expert, minlength=groups + 1)[:groups]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "experts",
    [
        np.random.default_rng(0).integers(-2, GROUPS + 2, ROWS),
        np.full(ROWS, 3),
        np.full(ROWS, GROUPS),
        np.arange(ROWS)[::-1],
        np.zeros(1, int),
        np.arange(256) % GROUPS,
    ],
    ids=["random", "one_expert", "none_here", "falling", "one_row", "whole_blocks"],
)
def test_the_position_map_is_the_inverse_of_a_stable_argsort(experts, implementation):
    got = position_map(jnp.asarray(experts, jnp.int32), GROUPS, implementation=implementation)
    for z, want in zip(got, by_sorting(experts, GROUPS), strict=True):
        assert z.dtype == jnp.int32
        np.testing.assert_array_equal(z, want)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "groups"), [("int8", 128), ("int8", 160), ("uint8", 256), ("uint32", 7)])
def test_experts_of_any_integer_type_find_their_place(dtype, groups, implementation):
    experts = np.random.default_rng(4).integers(0, min(groups, 128), ROWS).astype(dtype)
    got = position_map(jnp.asarray(experts), groups, implementation=implementation)
    for z, want in zip(got, by_sorting(experts.astype(int), groups), strict=True):
        np.testing.assert_array_equal(z, want)
    np.testing.assert_array_equal(routing.chosen(jnp.asarray(experts)[:, None], groups).argmax(-1), experts)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-1, GROUPS), min_size=ROWS, max_size=ROWS))
def test_any_choice_of_experts(experts):
    position, sizes = position_map(jnp.asarray(experts, jnp.int32), GROUPS)
    for z, want in zip((position, sizes), by_sorting(np.array(experts), GROUPS), strict=True):
        np.testing.assert_array_equal(z, want)
    np.testing.assert_array_equal(routing.row_order(position), np.argsort(position))


@pytest.mark.parametrize("implementation", routing.LOGITS)
def test_scores_and_their_gradients_are_float32s(implementation):
    """Those that matrix units could round, by 2^-9, are not."""
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(3, 50, 64)), "bfloat16")
    router = jnp.asarray(rng.normal(size=(64, GROUPS)) / 8, "float32")
    dy = jnp.asarray(rng.normal(size=(3, 50, GROUPS)), "float32")
    got, vjp = jax.vjp(partial(routing.scores, implementation=implementation), x, router)
    dx, drouter = vjp(dy)
    wide_x, wide_router = (np.asarray(z, "float64") for z in (x, router))
    want = 1 / (1 + np.exp(-wide_x @ wide_router))
    dlogits = np.asarray(dy) * want * (1 - want)
    np.testing.assert_allclose(got, want, rtol=3e-6)
    np.testing.assert_allclose(drouter, np.einsum("btd,bte->de", wide_x, dlogits), atol=1e-5)
    np.testing.assert_allclose(dx.astype("float64"), dlogits @ wide_router.T, rtol=2**-8, atol=2**-8 * 1e-2)


@settings(deadline=None)
@given(st.floats(-(2.0**100), 2.0**100, width=32).filter(lambda z: z == 0 or abs(z) > 2.0**-100))
def test_a_float32_is_three_bfloat16(z):
    parts = thirds._thirds(jnp.float32(z))
    assert all(part == part.astype(jnp.bfloat16) for part in parts)
    assert sum(np.float64(part) for part in parts) == z


@pytest.mark.parametrize("active", [1, 3, GROUPS])
def test_the_best_are_top_ks(active):
    scores = jnp.asarray(np.random.default_rng(3).integers(0, 4, (5, 6, GROUPS)), "float32").at[1, 2, 3].set(jnp.nan)
    np.testing.assert_array_equal(routing.best(scores, active), jax.lax.top_k(scores, active)[1])


def test_the_bias_moves_the_choice_and_not_the_weights():
    rng = np.random.default_rng(1)
    x, router = (
        jnp.asarray(rng.normal(size=(5, 6, 8)), "bfloat16"),
        jnp.asarray(rng.normal(size=(8, GROUPS)), "float32"),
    )
    scores = routing.scores(x, router)
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-np.asarray(x, "float64") @ np.asarray(router))), rtol=1e-5)
    bias = jnp.asarray(rng.normal(size=GROUPS), "float32")
    experts, chosen, weights = routing.choose_experts(scores, bias, 3, 2.5)
    best = np.argsort(-np.asarray(scores + bias), axis=-1)[..., :3]
    np.testing.assert_array_equal(experts, best)
    np.testing.assert_array_equal(chosen, routing.chosen(experts, GROUPS))
    picked = np.take_along_axis(np.asarray(scores), best, -1)
    np.testing.assert_allclose(weights, 2.5 * picked / picked.sum(-1, keepdims=True), rtol=1e-6)
    real = np.arange(6) < np.arange(1, 6)[:, None]
    np.testing.assert_array_equal(routing.counts(chosen, real), np.bincount(best[real].ravel(), minlength=GROUPS))


def test_bad_input_names_the_rule():
    with pytest.raises(ValueError, match=r"experts \(2, 3\) int32 must be a vector of integers"):
        routing.position_map(jnp.zeros((2, 3), jnp.int32), 4)
    with pytest.raises(ValueError, match="9 of 7 experts cannot be active"):
        routing.choose_experts(jnp.zeros((2, 7)), jnp.zeros(7), 9)
    with pytest.raises(ValueError, match="known: reference, xla"):
        routing.position_map(jnp.zeros(3, jnp.int32), 4, implementation="tpu")
