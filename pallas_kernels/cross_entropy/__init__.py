"""Linear + softmax cross-entropy: the loss of hidden states against an output matrix, without all logits at once.

One operation for the main loss, the multi-token-prediction loss and (issue B) per-token log-probabilities.
Softmax and sums are float32 whatever the inputs are.

Inside `shard_map(check_vma=True)` all inputs must vary over the same axes: `jax.lax.pcast` them before the call.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.cross_entropy import reference, xla

IMPLEMENTATIONS = {"reference": reference.linear_cross_entropy, "xla": xla.linear_cross_entropy}


def linear_cross_entropy(
    x_XD: Float[Array, "X D"],
    w_DV: Float[Array, "D V"],
    targets_X: Int[Array, " X"],
    weights_X: Float[Array, " X"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, ""], Float[Array, " X"]]:
    """(sum of weight * negative log-likelihood, log-probability of every target), float32, nats.

    The sum is differentiable in x and w; the log-probabilities are for looking at and carry no gradient. A token of
    weight 0 adds nothing and gets no gradient. Raises ValueError for shapes that do not fit or an unknown name.
    """
    X, D = x_XD.shape
    if w_DV.shape[0] != D or targets_X.shape != (X,) or weights_X.shape != (X,):
        raise ValueError(
            f"linear_cross_entropy: x {x_XD.shape}, w {w_DV.shape}, targets {targets_X.shape}, weights {weights_X.shape} "
            "do not fit; x is [X, D], w [D, V], targets and weights [X]"
        )
    if not jnp.issubdtype(targets_X.dtype, jnp.integer):
        raise ValueError(f"linear_cross_entropy: targets are {targets_X.dtype}; use integers")
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"linear_cross_entropy: unknown implementation {implementation!r}; known: {', '.join(IMPLEMENTATIONS)}"
        )
    run = IMPLEMENTATIONS[implementation or "xla"]
    loss, log_prob_X = run(x_XD, w_DV, targets_X, weights_X.astype(jnp.float32))
    return loss, jax.lax.stop_gradient(log_prob_X)
