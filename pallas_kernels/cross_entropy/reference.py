"""The definition: all logits at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array


def linear_token_loss(
    token_loss: Callable[..., Array], x_XD: Array, w_DV: Array, targets_X: Array, *of_token: Array
) -> tuple[Array, Array]:
    logits_XV = jnp.einsum("xd,dv->xv", x_XD, w_DV, preferred_element_type=jnp.float32)
    log_prob_X = jnp.take_along_axis(jax.nn.log_softmax(logits_XV), targets_X[:, None], axis=1)[:, 0]
    return jnp.sum(token_loss(log_prob_X, *of_token)), log_prob_X
