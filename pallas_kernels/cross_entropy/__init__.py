"""Linear + log-softmax + a loss of each token's log-probability: hidden states against an output matrix, without all
logits at once.

One operation for the main loss, the multi-token-prediction loss, per-token log-probabilities and the policy gradient.
Softmax and sums are float32 whatever the inputs are.

Inside `shard_map(check_vma=True)` all inputs must vary over the same axes: `jax.lax.pcast` them before the call. The output
matrix may be split by vocabulary over one of them (`vocabulary_axis`): the results are then the same on all of that axis.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.choose import choose
from pallas_kernels.cross_entropy import reference, xla

IMPLEMENTATIONS = {"reference": reference, "xla": xla}
TokenLoss = Callable[..., Array]


class Scored(NamedTuple):
    """Float32, nats. Only `loss` carries a gradient."""

    loss: Float[Array, ""]
    log_prob_X: Float[Array, " X"]  # of every target
    lse_X: Float[Array, " X"]  # log-sum-exp of the logits over the temperature


def linear_softmax(
    token_loss: TokenLoss,
    x_XD: Float[Array, "X D"],
    w_DV: Float[Array, "D V"],
    targets_X: Int[Array, " X"],
    *of_token: Float[Array, " X"],
    temperature_X: Float[Array, " X"] | None = None,
    vocabulary_axis: str | tuple[str, ...] | None = None,
    implementation: str | None = None,
) -> Scored:
    """The sum over tokens of token_loss(log_prob_X, *of_token), with every target's log-probability and the normaliser.

    `token_loss` is an elementwise function of a target's log-probability and of what else is known of each token
    (weights, advantages). The sum is differentiable in x and w only. A token's logits are divided by its temperature.
    With `vocabulary_axis`, a mesh axis (or several) of the `shard_map` around the call, w_DV is this device's columns of the matrix and
    targets still number all columns; gradients are those of this device's columns, and x's sum over the axis is formed where
    the caller's pcast of x is transposed. Raises ValueError for shapes that do not fit or an unknown name.
    """
    X, D = x_XD.shape
    of_token = (jnp.ones(X) if temperature_X is None else temperature_X, *of_token)
    if w_DV.shape[0] != D or any(z.shape != (X,) for z in (targets_X, *of_token)):
        raise ValueError(
            f"linear_softmax: x {x_XD.shape}, w {w_DV.shape}, targets {targets_X.shape}, of_token "
            f"{[z.shape for z in of_token[1:]]}, temperature {of_token[0].shape} do not fit; x is [X, D], w [D, V], "
            "everything else [X]"
        )
    if not jnp.issubdtype(targets_X.dtype, jnp.integer):
        raise ValueError(f"linear_softmax: targets are {targets_X.dtype}; use integers")
    module = choose("linear_softmax", IMPLEMENTATIONS, implementation, x_XD, w_DV)
    if vocabulary_axis is not None and module is reference:
        raise NotImplementedError(
            "linear_softmax: implementation 'reference' holds the whole vocabulary; leave vocabulary_axis out"
        )
    scale_X, *rest = (z.astype(jnp.float32) for z in of_token)
    loss, log_prob_X, lse_X = module.linear_softmax(
        token_loss, vocabulary_axis, x_XD, w_DV, targets_X.astype(jnp.int32), 1 / scale_X, *rest
    )
    return Scored(loss, jax.lax.stop_gradient(log_prob_X), jax.lax.stop_gradient(lse_X))


def linear_token_loss(
    token_loss: TokenLoss,
    x_XD: Float[Array, "X D"],
    w_DV: Float[Array, "D V"],
    targets_X: Int[Array, " X"],
    *of_token: Float[Array, " X"],
    implementation: str | None = None,
) -> tuple[Float[Array, ""], Float[Array, " X"]]:
    """(loss, log-probability of every target) of `linear_softmax` at temperature 1."""
    scored = linear_softmax(token_loss, x_XD, w_DV, targets_X, *of_token, implementation=implementation)
    return scored.loss, scored.log_prob_X


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
    return linear_token_loss(negative_log_likelihood, x_XD, w_DV, targets_X, weights_X, implementation=implementation)


def negative_log_likelihood(log_prob_X: Array, weights_X: Array) -> Array:
    """The usual token loss: -weight * log-probability, and nothing where the weight is 0."""
    return jnp.where(weights_X != 0, -weights_X * log_prob_X, 0)
