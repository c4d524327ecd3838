"""Losses on arrays: GRPO's surrogate beside its formula written out."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax import losses

RNG = np.random.default_rng(0)
HIDDEN, HEAD = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((2, 6, 8), (8, 20)))
TARGETS = jnp.asarray(RNG.integers(0, 20, (2, 6)))
WEIGHTS = jnp.asarray([[0, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]], jnp.float32)
ADVANTAGES = jnp.asarray([[0.5] * 6, [-1.0] * 6], jnp.float32)


def log_probs(hidden_BTD, temperature=1.0):
    return jnp.take_along_axis(jax.nn.log_softmax(hidden_BTD @ HEAD / temperature), TARGETS[..., None], -1)[..., 0]


def surrogate(hidden_BTD, old_BT, **settings):
    return losses.policy_gradient(hidden_BTD, HEAD, TARGETS, WEIGHTS, ADVANTAGES, old_BT, losses.Policy(**settings))[0]


def written_out(hidden_BTD, old_BT, temperature=1.0, low=0.2, high=0.28):
    ratio = jnp.exp(log_probs(hidden_BTD, temperature) - old_BT)
    per_token = jnp.minimum(ratio * ADVANTAGES, jnp.clip(ratio, 1 - low, 1 + high) * ADVANTAGES)
    return -jnp.sum(WEIGHTS * per_token)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("away", [0.0, 0.1, 0.6])
def test_the_surrogate_is_its_formula(temperature, away):
    old_BT = log_probs(HIDDEN, temperature) + away * jnp.asarray(RNG.normal(size=(2, 6)), jnp.float32)
    got = jax.value_and_grad(surrogate)(HIDDEN, old_BT, temperature=temperature)
    want = jax.value_and_grad(written_out)(HIDDEN, old_BT, temperature)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)  # float32


def test_a_temperature_divides_the_logits_and_rounds_no_hidden_state_again():
    """In bfloat16 the sampler's log-probabilities, which divide float32 logits, are the trainer's."""
    hidden_BTD, head_DV = HIDDEN.astype(jnp.bfloat16), HEAD.astype(jnp.bfloat16)
    of_token = TARGETS, WEIGHTS, ADVANTAGES, jnp.zeros((2, 6))
    got_BT = losses.policy_gradient(hidden_BTD, head_DV, *of_token, losses.Policy(temperature=0.7))[1]
    logits_BTV = jnp.matmul(hidden_BTD, head_DV, preferred_element_type=jnp.float32)
    want_BTV = jax.nn.log_softmax(logits_BTV / jnp.float32(0.7))
    np.testing.assert_allclose(got_BT, jnp.take_along_axis(want_BTV, TARGETS[..., None], -1)[..., 0], atol=5e-6)


def test_beyond_the_clip_a_token_has_no_gradient_unless_it_was_made_worse():
    """Positive advantage: held where the ratio has passed 1.28. Negative: where it has fallen below 0.8."""
    old_BT = log_probs(HIDDEN) - jnp.asarray([[0, 0.3, -0.3, 0, 0, 0], [0.3, -0.3, 0, 0, 0, 0]], jnp.float32)
    gradient_BTD = jax.grad(surrogate)(HIDDEN, old_BT)
    moved_BT = jnp.any(gradient_BTD != 0, axis=-1)
    np.testing.assert_array_equal(moved_BT, [[0, 0, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0]])


def test_no_ratio_counts_beyond_clip_c():
    """The one token made worse by a ratio of e^0.7 counts as much as at 1.5, and has no gradient; the others are as they were."""
    away_BT = jnp.asarray([[0, 0.3, -0.3, 0, 0, 0], [0.7, -0.3, 0, 0, 0, 0]], jnp.float32)
    old_BT = log_probs(HIDDEN) - away_BT
    free, held = (jax.value_and_grad(surrogate)(HIDDEN, old_BT, clip_c=c) for c in (0.0, 1.5))
    worse = WEIGHTS[1, 0] * ADVANTAGES[1, 0]
    np.testing.assert_allclose(held[0] - free[0], worse * (math.exp(0.7) - 1.5), rtol=1e-4)
    np.testing.assert_array_equal(held[1][1, 0], 0)
    assert worse < 0 and jnp.any(free[1][1, 0] != 0)
    np.testing.assert_array_equal(held[1][0], free[1][0])


def test_on_policy_the_gradient_is_advantage_weighted_likelihood():
    def reinforce(hidden_BTD):
        return -jnp.sum(WEIGHTS * ADVANTAGES * log_probs(hidden_BTD))

    got, want = jax.grad(surrogate)(HIDDEN, log_probs(HIDDEN)), jax.grad(reinforce)(HIDDEN)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)  # float32


def test_padding_with_any_old_log_probability_changes_nothing():
    old_BT = jnp.where(WEIGHTS == 0, 1e4, log_probs(HIDDEN))
    assert bool(jnp.isfinite(surrogate(HIDDEN, old_BT)))
    np.testing.assert_array_equal(jax.grad(surrogate)(HIDDEN, old_BT)[WEIGHTS == 0], 0)
