"""Routing: the position map against the definition by a stable sort, and the choice against its laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import routing

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


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-1, GROUPS), min_size=ROWS, max_size=ROWS))
def test_any_choice_of_experts(experts):
    position, sizes = position_map(jnp.asarray(experts, jnp.int32), GROUPS)
    for z, want in zip((position, sizes), by_sorting(np.array(experts), GROUPS), strict=True):
        np.testing.assert_array_equal(z, want)
    np.testing.assert_array_equal(routing.row_order(position), np.argsort(position))


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
