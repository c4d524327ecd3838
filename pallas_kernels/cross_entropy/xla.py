"""Chunks of tokens in a scan, gradients formed beside the loss: three matmuls in all, and logits that stay in cache."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

CHUNK_LOGITS = 2**20  # logits alive at once: 4 MiB in float32


def chunk_tokens(tokens: int, vocabulary: int) -> int:
    """The largest divisor of `tokens` whose logits fit in a chunk."""
    most = max(1, min(tokens, CHUNK_LOGITS // vocabulary))
    return next(n for n in range(most, 0, -1) if tokens % n == 0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear_token_loss(
    token_loss: Callable[..., Array], x_XD: Array, w_DV: Array, targets_X: Array, *of_token: Array
) -> tuple[Array, Array]:
    def chunk(total, piece):
        x_CD, targets_C, *of_token = piece
        _, _, log_prob_C = _log_prob(x_CD, w_DV, targets_C)
        return total + jnp.sum(token_loss(log_prob_C, *of_token)), log_prob_C

    loss, log_prob = jax.lax.scan(chunk, _zero(x_XD), _chunks(w_DV, x_XD, targets_X, *of_token))
    return loss, log_prob.reshape(-1)


def _forward(token_loss: Callable[..., Array], x_XD: Array, w_DV: Array, targets_X: Array, *of_token: Array):
    def chunk(carry, piece):
        total, dw_DV = carry
        x_CD, targets_C, *of_token = piece
        logits_CV, lse_C, log_prob_C = _log_prob(x_CD, w_DV, targets_C)
        loss_C, slope_C = jax.jvp(lambda z: token_loss(z, *of_token), (log_prob_C,), (jnp.ones_like(log_prob_C),))
        hit_CV = targets_C[:, None] == jnp.arange(w_DV.shape[1], dtype=targets_C.dtype)
        dlogits_CV = (hit_CV - jnp.exp(logits_CV - lse_C[:, None])) * slope_C[:, None]
        dlogits_CV = jnp.where(slope_C[:, None] != 0, dlogits_CV, 0).astype(x_CD.dtype)
        dx_CD = jnp.einsum("cv,dv->cd", dlogits_CV, w_DV)
        dw_DV = dw_DV + jnp.einsum("cd,cv->dv", x_CD, dlogits_CV, preferred_element_type=jnp.float32)
        return (total + jnp.sum(loss_C), dw_DV), (log_prob_C, dx_CD)

    start = (_zero(x_XD), jnp.zeros_like(w_DV, jnp.float32) + _zero(x_XD))
    (loss, dw_DV), (log_prob, dx) = jax.lax.scan(chunk, start, _chunks(w_DV, x_XD, targets_X, *of_token))
    return (loss, log_prob.reshape(-1)), (dx.reshape(x_XD.shape), dw_DV.astype(w_DV.dtype), (None,) * len(of_token))


def _backward(
    token_loss: Callable[..., Array],
    saved: tuple[Array, Array, tuple[None, ...]],
    cotangents: tuple[Array, Array],
):
    dx_XD, dw_DV, none_of_token = saved
    scale, _ = cotangents
    return dx_XD * scale.astype(dx_XD.dtype), dw_DV * scale.astype(dw_DV.dtype), None, *none_of_token


linear_token_loss.defvjp(_forward, _backward)


def _zero(x_XD: Array) -> Array:
    """A float32 zero that varies over the same mesh axes as the inputs."""
    return (0 * x_XD[0, 0]).astype(jnp.float32)


def _chunks(w_DV: Array, *rows: Array) -> tuple[Array, ...]:
    size = chunk_tokens(rows[0].shape[0], w_DV.shape[1])
    return tuple(z.reshape(-1, size, *z.shape[1:]) for z in rows)


def _log_prob(x_CD: Array, w_DV: Array, targets_C: Array) -> tuple[Array, Array, Array]:
    logits_CV = jnp.einsum("cd,dv->cv", x_CD, w_DV, preferred_element_type=jnp.float32)
    lse_C = jax.nn.logsumexp(logits_CV, axis=-1)
    hit_CV = targets_C[:, None] == jnp.arange(w_DV.shape[1], dtype=targets_C.dtype)
    return logits_CV, lse_C, jnp.sum(jnp.where(hit_CV, logits_CV, 0), axis=-1) - lse_C
