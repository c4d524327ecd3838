"""Linear + log-softmax + a loss of each token's log-probability: hidden states against an output matrix, without all
logits at once.

One operation for the main loss, the multi-token-prediction loss, per-token log-probabilities and the policy gradient.
Softmax and sums are float32 whatever the inputs are.

Inside `shard_map(check_vma=True)` all inputs must vary over the same axes: `jax.lax.pcast` them before the call.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.choose import choose
from pallas_kernels.cross_entropy import reference, xla

IMPLEMENTATIONS = {"reference": reference, "xla": xla}
TokenLoss = Callable[..., Array]


def linear_token_loss(
    token_loss: TokenLoss,
    x_XD: Float[Array, "X D"],
    w_DV: Float[Array, "D V"],
    targets_X: Int[Array, " X"],
    *of_token: Float[Array, " X"],
    implementation: str | None = None,
) -> tuple[Float[Array, ""], Float[Array, " X"]]:
    """(sum over tokens of token_loss(log_prob_X, *of_token), log-probability of every target), float32, nats.

    `token_loss` is an elementwise function of a target's log-probability and of what else is known of each token
    (weights, advantages). The sum is differentiable in x and w only; the log-probabilities are for looking at and carry
    no gradient. Raises ValueError for shapes that do not fit or an unknown name.
    """
    X, D = x_XD.shape
    if w_DV.shape[0] != D or any(z.shape != (X,) for z in (targets_X, *of_token)):
        raise ValueError(
            f"linear_token_loss: x {x_XD.shape}, w {w_DV.shape}, targets {targets_X.shape}, of_token "
            f"{[z.shape for z in of_token]} do not fit; x is [X, D], w [D, V], everything else [X]"
        )
    if not jnp.issubdtype(targets_X.dtype, jnp.integer):
        raise ValueError(f"linear_token_loss: targets are {targets_X.dtype}; use integers")
    module = choose("linear_token_loss", IMPLEMENTATIONS, implementation, x_XD, w_DV)
    of_token = tuple(z.astype(jnp.float32) for z in of_token)
    loss, log_prob_X = module.linear_token_loss(token_loss, x_XD, w_DV, targets_X, *of_token)
    return loss, jax.lax.stop_gradient(log_prob_X)


def linear_cross_entropy(
    x_XD: Float[Array, "X D"],
    w_DV: Float[Array, "D V"],
    targets_X: Int[Array, " X"],
    weights_X: Float[Array, " X"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, ""], Float[Array, " X"]]:
    """(sum of weight * negative log-likelihood, log-probability of every target): `linear_token_loss` of the usual loss.

    A token of weight 0 adds nothing and gets no gradient.
    """
    return linear_token_loss(_negative_log_likelihood, x_XD, w_DV, targets_X, weights_X, implementation=implementation)


def _negative_log_likelihood(log_prob_X: Array, weights_X: Array) -> Array:
    return jnp.where(weights_X != 0, -weights_X * log_prob_X, 0)
