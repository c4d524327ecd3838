"""The router, whatever the scores: which experts, with which weights, and what the balance loss counts (spec 2)."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.config import Model, replace
from glm_jax.model.moe import balance_loss, choose
from glm_jax.optim.balance import balance

SMALL = Model(V=8, D=4, L=1, dense_layers=0, N=1, K=1, H=4, F=4, M=4, E=7, A=3, routed_scale=2.5, dtype="float32")
B, T = 2, 5

# One shape, so that nothing recompiles: hypothesis varies the numbers.
draws = given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.3, 3.0]))
examples = settings(max_examples=40, deadline=None)


def scores_and_bias(seed, spread):
    random = np.random.default_rng(seed)
    scores_BTE = 1 / (1 + np.exp(-random.normal(size=(B, T, SMALL.E))))
    return jnp.asarray(scores_BTE, jnp.float32), jnp.asarray(spread * random.normal(size=SMALL.E), jnp.float32)


@draws
@examples
def test_experts_are_distinct_and_the_largest_by_biased_score(seed, spread):
    scores_BTE, bias_E = scores_and_bias(seed, spread)
    experts_BTA, chosen_BTE, _ = choose(SMALL, scores_BTE, bias_E)
    assert (jnp.diff(jnp.sort(experts_BTA), axis=-1) > 0).all()
    assert (chosen_BTE.sum(-1) == SMALL.A).all() and chosen_BTE.max() == 1
    ranked_BTE = scores_BTE + bias_E
    lowest_in = jnp.where(chosen_BTE > 0, ranked_BTE, jnp.inf).min(-1)
    highest_out = jnp.where(chosen_BTE > 0, -jnp.inf, ranked_BTE).max(-1)
    assert (lowest_in >= highest_out).all()


@draws
@examples
def test_weights_sum_to_the_scale_and_know_nothing_of_the_bias(seed, spread):
    scores_BTE, bias_E = scores_and_bias(seed, spread)
    experts_BTA, _, weights_BTA = choose(SMALL, scores_BTE, bias_E)
    np.testing.assert_allclose(weights_BTA.sum(-1), SMALL.routed_scale, rtol=1e-6)
    picked_BTA = np.take_along_axis(np.asarray(scores_BTE), np.asarray(experts_BTA), axis=-1)
    np.testing.assert_allclose(weights_BTA, 2.5 * picked_BTA / picked_BTA.sum(-1, keepdims=True), rtol=1e-6)
    shifted, _, same_BTA = choose(SMALL, scores_BTE, bias_E + 0.25)  # the same for all experts: the same choice
    if (shifted == experts_BTA).all():
        np.testing.assert_array_equal(weights_BTA, same_BTA)


def test_the_bias_alone_can_choose():
    scores_BTE, _ = scores_and_bias(0, 0.0)
    bias_E = jnp.where(jnp.arange(SMALL.E) < SMALL.A, 10.0, 0.0)
    experts_BTA, _, _ = choose(SMALL, scores_BTE, bias_E)
    assert (jnp.sort(experts_BTA) == jnp.arange(SMALL.A)).all()


def test_no_gradient_reaches_the_bias_and_the_choice():
    scores_BTE, bias_E = scores_and_bias(0, 0.3)
    to_bias_E = jax.grad(lambda bias_E: choose(SMALL, scores_BTE, bias_E)[2][..., 0].sum())(bias_E)
    assert (to_bias_E == 0).all()
    to_scores_BTE = jax.grad(lambda s: choose(SMALL, s, bias_E)[2][..., 0].sum())(scores_BTE)
    _, chosen_BTE, _ = choose(SMALL, scores_BTE, bias_E)
    assert (to_scores_BTE[chosen_BTE == 0] == 0).all() and jnp.abs(to_scores_BTE).max() > 0


@draws
@examples
def test_balance_loss_is_the_sum_of_share_times_score(seed, spread):
    scores_BTE, bias_E = scores_and_bias(seed, spread)
    _, chosen_BTE, _ = choose(SMALL, scores_BTE, bias_E)
    lengths = np.random.default_rng(seed).integers(0, T + 1, B)
    real_BT = np.arange(T) < lengths[:, None]
    rows = []
    for b in np.flatnonzero(lengths):
        share_TE = np.asarray(scores_BTE[b] / scores_BTE[b].sum(-1, keepdims=True))[: lengths[b]]
        f_E = np.asarray(chosen_BTE[b])[: lengths[b]].mean(0) * SMALL.E / SMALL.A
        rows.append(f_E @ share_TE.mean(0))
    want = np.mean(rows) if rows else 0.0
    np.testing.assert_allclose(balance_loss(SMALL, scores_BTE, chosen_BTE, real_BT), want, rtol=1e-5)


def test_an_even_router_has_balance_loss_one():
    cfg = replace(SMALL, E=6)
    even_BTE = jnp.full((1, 4, 6), 0.5)
    chosen_BTE = jnp.asarray(np.tile(np.repeat(np.eye(2), 3, axis=1), (2, 1))[None])  # each expert twice of four
    np.testing.assert_allclose(balance_loss(cfg, even_BTE, chosen_BTE, np.ones((1, 4), bool)), 1.0, rtol=1e-6)


@draws
@examples
def test_the_bias_moves_by_one_rate_towards_the_mean_and_rests_when_even(seed, spread):
    load_LE = jnp.asarray(np.random.default_rng(seed).integers(0, 4, (2, SMALL.E)) * (spread > 0), jnp.float32)
    moved_LE = balance(jnp.zeros((2, SMALL.E)), load_LE, 1e-3)
    mean_L1 = load_LE.mean(-1, keepdims=True)
    assert (jnp.sign(moved_LE) == jnp.sign(mean_L1 - load_LE)).all()
    assert jnp.isin(jnp.abs(moved_LE), jnp.asarray([0, 1e-3])).all()
