"""Chunks of tokens in a scan, gradients formed beside the loss: three matmuls in all, and a chunk's logits at a time.

On a CPU a chunk's logits stay in cache. On an accelerator a chunk is as large as memory allows: each reads the whole output
matrix and adds to the whole of its gradient, float32, so that small chunks would only move memory.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.choose import platform

CHUNK_LOGITS = {"cpu": 2**20, "tpu": 5 * 2**25, "gpu": 5 * 2**25}  # logits alive at once: 4 MiB in float32; 640 MiB
CHUNK_LOGITS_OF = {"TPU7x": 13 * 2**22}  # XLA holds them twice there, and those of what is left over
ROWS = 32  # a chunk on an accelerator is a multiple of
TokenLoss = Callable[..., Array]


def chunk_tokens(tokens: int, vocabulary: int) -> int:
    """As many tokens as a chunk's logits may be: a divisor of all if a large one is among them, else some are left over."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    logits = CHUNK_LOGITS_OF.get(device.device_kind if device else "", CHUNK_LOGITS[platform()])
    most = max(1, min(tokens, logits // vocabulary))
    if platform() != "cpu" and most > ROWS:
        most -= most % ROWS
    return next((n for n in range(most, 3 * most // 4, -1) if tokens % n == 0), most)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def linear_softmax(
    token_loss: TokenLoss, vocabulary_axis: str | tuple[str, ...] | None, x_XD: Array, w_DV: Array, *rows: Array
):
    """`rows`: targets, one over the temperature, and what `token_loss` takes besides. (loss, log-probabilities, lse)."""

    def chunk(total, piece):
        x_CD, targets_C, sharpness_C, *of_token = piece
        _, lse_C, log_prob_C = _log_prob(vocabulary_axis, x_CD, w_DV, targets_C, sharpness_C)
        return total + jnp.sum(token_loss(log_prob_C, *of_token)), (log_prob_C, lse_C)

    loss, (log_prob_X, lse_X) = _scan(chunk, _zero(x_XD), w_DV.shape[1], x_XD, *rows)
    return _common(loss, vocabulary_axis), log_prob_X, lse_X


def _forward(
    token_loss: TokenLoss, vocabulary_axis: str | tuple[str, ...] | None, x_XD: Array, w_DV: Array, *rows: Array
):
    def chunk(carry, piece):
        total, dw_DV = carry
        x_CD, targets_C, sharpness_C, *of_token = piece
        logits_CV, lse_C, log_prob_C = _log_prob(vocabulary_axis, x_CD, w_DV, targets_C, sharpness_C)
        loss_C, slope_C = jax.jvp(lambda z: token_loss(z, *of_token), (log_prob_C,), (jnp.ones_like(log_prob_C),))
        used_C = slope_C[:, None] != 0  # what a token that is not used holds, NaN included, reaches nothing
        hit_CV = _hits(vocabulary_axis, w_DV, targets_C)
        dlogits_CV = (hit_CV - jnp.exp(logits_CV - lse_C[:, None])) * (slope_C * sharpness_C)[:, None]
        dlogits_CV = jnp.where(used_C, dlogits_CV, 0).astype(x_CD.dtype)
        dx_CD = jnp.einsum("cv,dv->cd", dlogits_CV, w_DV)
        x_CD = jnp.where(used_C, x_CD, 0)
        dw_DV = dw_DV + jnp.matmul(_turned(x_CD), dlogits_CV, preferred_element_type=jnp.float32)
        return (total + jnp.sum(loss_C), dw_DV), (log_prob_C, lse_C, dx_CD)

    start = _zero(x_XD), jnp.zeros_like(w_DV, jnp.float32) + _zero(x_XD)
    (loss, dw_DV), (log_prob_X, lse_X, dx_XD) = _scan(chunk, start, w_DV.shape[1], x_XD, *rows)
    return (_common(loss, vocabulary_axis), log_prob_X, lse_X), (dx_XD, dw_DV.astype(w_DV.dtype), (None,) * len(rows))


def _backward(
    token_loss: TokenLoss,
    vocabulary_axis: str | tuple[str, ...] | None,
    saved: tuple[Array, Array, tuple[None, ...]],
    cotangents: tuple[Array, Array, Array],
):
    dx_XD, dw_DV, none_of_rows = saved
    scale = cotangents[0]
    return dx_XD * scale.astype(dx_XD.dtype), dw_DV * scale.astype(dw_DV.dtype), *none_of_rows


linear_softmax.defvjp(_forward, _backward)


def _turned(x_CD: Array) -> Array:
    """The transpose. On a CPU in memory: its product with the logits' gradient takes half as long then."""
    return jax.lax.optimization_barrier(x_CD.T) if platform() == "cpu" else x_CD.T


def _zero(x_XD: Array) -> Array:
    """A float32 zero that varies over the same mesh axes as the inputs."""
    zero = (0 * x_XD[0, 0]).astype(jnp.float32)
    return jnp.where(jnp.isnan(zero), 0, zero)


def _common(loss: Array, vocabulary_axis: str | tuple[str, ...] | None) -> Array:
    """What is equal on all of the axis, known to be."""
    return loss if vocabulary_axis is None else jax.lax.pmean(loss, vocabulary_axis)


def _scan(step: Callable, carry, vocabulary: int, *rows: Array):
    """`step` over chunks of tokens, then over those left over: the last carry, and values per token."""
    X = rows[0].shape[0]
    size = chunk_tokens(X, vocabulary)
    even = X - X % size
    carry, values = jax.lax.scan(step, carry, tuple(z[:even].reshape(-1, size, *z.shape[1:]) for z in rows))
    values = jax.tree.map(lambda z: z.reshape(even, *z.shape[2:]), values)
    if even < X:
        carry, last = step(carry, tuple(z[even:] for z in rows))
        values = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), values, last)
    return carry, values


def _hits(vocabulary_axis: str | tuple[str, ...] | None, w_DV: Array, targets_C: Array) -> Array:
    """Which of this device's columns is the target."""
    V = w_DV.shape[1]
    first = 0 if vocabulary_axis is None else V * jax.lax.axis_index(vocabulary_axis)
    return targets_C[:, None] == first + jnp.arange(V, dtype=targets_C.dtype)


def _log_prob(
    vocabulary_axis: str | tuple[str, ...] | None, x_CD: Array, w_DV: Array, targets_C: Array, sharpness_C: Array
) -> tuple[Array, Array, Array]:
    """Logits of this device's columns over the temperature; over all columns, log-sum-exp and the target's log-probability."""
    logits_CV = jnp.einsum("cd,dv->cv", x_CD, w_DV, preferred_element_type=jnp.float32) * sharpness_C[:, None]
    target_C = jnp.sum(jnp.where(_hits(vocabulary_axis, w_DV, targets_C), logits_CV, 0), axis=-1)
    if vocabulary_axis is None:
        lse_C = jax.nn.logsumexp(logits_CV, axis=-1)
    else:
        top_C = jax.lax.pmax(jnp.max(logits_CV, axis=-1), vocabulary_axis)
        lse_C = top_C + jnp.log(jax.lax.psum(jnp.sum(jnp.exp(logits_CV - top_C[:, None]), axis=-1), vocabulary_axis))
        target_C = jax.lax.psum(target_C, vocabulary_axis)
    return logits_CV, lse_C, target_C - lse_C
