"""Chunks of tokens in a scan, gradients formed beside the loss: three matmuls in all, and logits that stay in cache."""

import jax
import jax.numpy as jnp
from jax import Array

CHUNK_LOGITS = 2**20  # logits alive at once: 4 MiB in float32


def chunk_tokens(tokens: int, vocabulary: int) -> int:
    """The largest divisor of `tokens` whose logits fit in a chunk."""
    most = max(1, min(tokens, CHUNK_LOGITS // vocabulary))
    return next(n for n in range(most, 0, -1) if tokens % n == 0)


@jax.custom_vjp
def linear_cross_entropy(x_XD: Array, w_DV: Array, targets_X: Array, weights_X: Array) -> tuple[Array, Array]:
    def chunk(total, piece):
        x_CD, targets_C, weights_C = piece
        _, _, log_prob_C = _log_prob(x_CD, w_DV, targets_C)
        return total + _weighted_nll(log_prob_C, weights_C), log_prob_C

    zero = 0 * weights_X[0]  # varies over the same mesh axes as the inputs
    loss, log_prob = jax.lax.scan(chunk, zero, _chunks(w_DV, x_XD, targets_X, weights_X))
    return loss, log_prob.reshape(-1)


def _forward(x_XD: Array, w_DV: Array, targets_X: Array, weights_X: Array):
    def chunk(carry, piece):
        total, dw_DV = carry
        x_CD, targets_C, weights_C = piece
        logits_CV, lse_C, log_prob_C = _log_prob(x_CD, w_DV, targets_C)
        hit_CV = targets_C[:, None] == jnp.arange(w_DV.shape[1], dtype=targets_C.dtype)
        dlogits_CV = (jnp.exp(logits_CV - lse_C[:, None]) - hit_CV) * weights_C[:, None]
        dlogits_CV = jnp.where(weights_C[:, None] != 0, dlogits_CV, 0).astype(x_CD.dtype)
        dx_CD = jnp.einsum("cv,dv->cd", dlogits_CV, w_DV)
        dw_DV = dw_DV + jnp.einsum("cd,cv->dv", x_CD, dlogits_CV, preferred_element_type=jnp.float32)
        return (total + _weighted_nll(log_prob_C, weights_C), dw_DV), (log_prob_C, dx_CD)

    start = (0 * weights_X[0], jnp.zeros_like(w_DV, jnp.float32) + 0 * weights_X[0])
    (loss, dw_DV), (log_prob, dx) = jax.lax.scan(chunk, start, _chunks(w_DV, x_XD, targets_X, weights_X))
    return (loss, log_prob.reshape(-1)), (dx.reshape(x_XD.shape), dw_DV.astype(w_DV.dtype))


def _backward(saved: tuple[Array, Array], cotangents: tuple[Array, Array]):
    dx_XD, dw_DV = saved
    scale, _ = cotangents
    return dx_XD * scale.astype(dx_XD.dtype), dw_DV * scale.astype(dw_DV.dtype), None, None


linear_cross_entropy.defvjp(_forward, _backward)


def _chunks(w_DV: Array, *rows: Array) -> tuple[Array, ...]:
    size = chunk_tokens(rows[0].shape[0], w_DV.shape[1])
    return tuple(z.reshape(-1, size, *z.shape[1:]) for z in rows)


def _log_prob(x_CD: Array, w_DV: Array, targets_C: Array) -> tuple[Array, Array, Array]:
    logits_CV = jnp.einsum("cd,dv->cv", x_CD, w_DV, preferred_element_type=jnp.float32)
    lse_C = jax.nn.logsumexp(logits_CV, axis=-1)
    hit_CV = targets_C[:, None] == jnp.arange(w_DV.shape[1], dtype=targets_C.dtype)
    return logits_CV, lse_C, jnp.sum(jnp.where(hit_CV, logits_CV, 0), axis=-1) - lse_C


def _weighted_nll(log_prob_C: Array, weights_C: Array) -> Array:
    return -jnp.sum(jnp.where(weights_C != 0, weights_C * log_prob_C, 0))
