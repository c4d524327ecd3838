"""The definition: all logits at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array


def linear_softmax(
    token_loss: Callable[..., Array],
    vocabulary_axis: None,
    x_XD: Array,
    w_DV: Array,
    targets_X: Array,
    sharpness_X: Array,
    *of_token: Array,
) -> tuple[Array, Array, Array]:
    logits_XV = sharpness_X[:, None] * jnp.einsum("xd,dv->xv", x_XD, w_DV, preferred_element_type=jnp.float32)
    lse_X = jax.nn.logsumexp(logits_XV, axis=1)
    log_prob_X = jnp.take_along_axis(logits_XV, targets_X[:, None], axis=1)[:, 0] - lse_X
    return jnp.sum(token_loss(log_prob_X, *of_token)), log_prob_X, lse_X
