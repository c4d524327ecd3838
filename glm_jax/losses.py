"""Losses as pure functions of arrays. A training loss is a sum of components, each over its own global token count."""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array, lax

from glm_jax import mesh
from glm_jax.parallel import collectives
from pallas_kernels.cross_entropy import linear_softmax, negative_log_likelihood


@dataclass(frozen=True)
class Policy:
    """How the tokens of a batch were sampled, and how far from that policy one step may go (clip-higher)."""

    clip: tuple[float, float] = (0.2, 0.28)
    temperature: float = 1.0
    clip_c: float = 0.0  # that no ratio counts beyond (dual clip); 0: none


def next_token(
    hidden_BTD: Array, head_DV: Array, targets_BT: Array, weights_BT: Array, implementation: str | None = None
) -> tuple[Array, Array]:
    """(sum over all devices of weight * negative log-likelihood, log-probability of each target), float32, nats.

    The sum is differentiable; a target of weight 0 adds nothing. Divide by the weights' global sum for a mean.
    """

    return _over_shards(negative_log_likelihood, hidden_BTD, head_DV, implementation, targets_BT, weights_BT)


def policy_gradient(
    hidden_BTD: Array,
    head_DV: Array,
    targets_BT: Array,
    weights_BT: Array,
    advantages_BT: Array,
    old_log_prob_BT: Array,
    policy: Policy = Policy(),
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """GRPO's clipped surrogate without KL (spec section 8): (sum of weight * loss, log-probability of each target).

    loss = -min(r A, clip(r, 1 - low, 1 + high) A) with r = exp(log_prob - old_log_prob), (low, high) the policy's
    clip, r at most its clip_c where it has one, and logits divided by its temperature. Divide the sum by the weights' global
    sum: weights of 1 give the token-weighted mean, of 1/|y| the mean over sequences.
    """
    low, high = policy.clip

    def token_loss(log_prob_X, weights_X, advantages_X, old_X):
        ratio_X = jnp.exp(jnp.where(weights_X != 0, log_prob_X - old_X, 0))
        ratio_X = jnp.minimum(ratio_X, policy.clip_c) if policy.clip_c else ratio_X
        clipped_X = jnp.clip(ratio_X, 1 - low, 1 + high)
        return -weights_X * jnp.minimum(ratio_X * advantages_X, clipped_X * advantages_X)

    of_token = targets_BT, weights_BT, advantages_BT, old_log_prob_BT
    return _over_shards(token_loss, hidden_BTD, head_DV, implementation, *of_token, temperature=policy.temperature)


def _over_shards(
    token_loss: Callable[..., Array],
    hidden_BTD: Array,
    head_DV: Array,
    implementation: str | None,
    *of_token: Array,
    temperature: float = 1.0,
) -> tuple[Array, Array]:
    """Its sum over all devices, and every target's log-probability. Where the head is split by vocabulary, the devices
    that share it take their tokens together, each with its part of the vocabulary."""

    def local(hidden_BTD, head_DV, *of_token):
        x_XD = collectives.gathered(collectives.copied(hidden_BTD.reshape(-1, hidden_BTD.shape[-1])))
        flat = [collectives.gathered(z.reshape(-1)) for z in of_token]
        value, per_token_X, _ = linear_softmax(
            token_loss,
            x_XD,
            collectives.vary(head_DV),
            *flat,
            temperature_X=None if temperature == 1 else lax.full_like(flat[0], temperature, dtype=jnp.float32),
            vocabulary_axis=collectives.sharing() or None,
            implementation=implementation,
        )
        return collectives.total(value), collectives.own(per_token_X).reshape(of_token[0].shape)

    run = mesh.per_shard(local, ("BTD", "DV", *["BT"] * len(of_token)), ("", "BT"))
    return run(hidden_BTD, head_DV, *(mesh.constrain(z, "BT") for z in of_token))
