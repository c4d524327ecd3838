"""Losses as pure functions of arrays. A training loss is a sum of components, each over its own global token count."""

import jax
import jax.numpy as jnp
from jax import Array


def cross_entropy(logits_BTV: Array, targets_BT: Array) -> Array:
    """Negative log-likelihood of each target in nats, float32 [B, T].

    The target's logit is picked by a masked sum, not a gather, so that V may be split over devices.
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    is_target_BTV = targets_BT[..., None] == jnp.arange(logits_BTV.shape[-1], dtype=targets_BT.dtype)
    target_BT = jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0), axis=-1)
    return jax.nn.logsumexp(logits_BTV, axis=-1) - target_BT


def weighted_sum(values_BT: Array, weights_BT: Array) -> Array:
    """Sum of values where weights count; a value of weight 0 never reaches the sum, not even as a NaN."""
    return jnp.sum(jnp.where(weights_BT != 0, values_BT * weights_BT, 0))
