"""For XLA: a page of every row at a time, up to the longest row's last one; the cache is never copied together.

R counts rows of scores: a query and a head of its group.
"""

import jax.numpy as jnp
from jax import Array, lax

F32 = jnp.float32


def rows(q_BTNH: Array, K: int) -> Array:
    """[B, K, R, H]: query by query, its group's heads side by side."""
    B, T, N, H = q_BTNH.shape
    return q_BTNH.reshape(B, T, K, N // K, H).swapaxes(1, 2).reshape(B, K, -1, H)


def heads(y_BKRH: Array, T: int) -> Array:
    """Back to [B, T, N, H]."""
    B, K, R, H = y_BKRH.shape
    return y_BKRH.reshape(B, K, T, R // T, H).swapaxes(1, 2).reshape(B, T, -1, H)


def decode_attention(q_BTNH, k_PKZH, v_PKZH, pages_BC, lengths_B, scale) -> Array:
    (_, T, N, _), (P, K, Z, _) = q_BTNH.shape, k_PKZH.shape
    q_BKRH = rows(q_BTNH, K)
    query_BR = lengths_B[:, None] - T + jnp.arange(T * N // K) // (N // K)

    def page(c, carry):
        top_BKR, total_BKR, y_BKRH = carry
        page_B = jnp.clip(pages_BC[:, c], 0, P - 1)
        token_Z = c * Z + jnp.arange(Z)
        v_BKZH = jnp.where((token_Z < lengths_B[:, None])[:, None, :, None], v_PKZH[page_B], 0)
        score_BKRZ = jnp.einsum("bkrh,bkzh->bkrz", q_BKRH, k_PKZH[page_B], preferred_element_type=F32) * scale
        score_BKRZ = jnp.where((token_Z <= query_BR[:, :, None])[:, None], score_BKRZ, -jnp.inf)
        new_BKR = jnp.maximum(top_BKR, score_BKRZ.max(-1))
        safe_BKR = jnp.where(new_BKR == -jnp.inf, 0, new_BKR)
        p_BKRZ, shrink_BKR = jnp.exp(score_BKRZ - safe_BKR[..., None]), jnp.exp(top_BKR - safe_BKR)
        add_BKRH = jnp.einsum("bkrz,bkzh->bkrh", p_BKRZ.astype(v_BKZH.dtype), v_BKZH, preferred_element_type=F32)
        return new_BKR, total_BKR * shrink_BKR + p_BKRZ.sum(-1), y_BKRH * shrink_BKR[..., None] + add_BKRH

    zero_BKRH = jnp.zeros_like(q_BKRH, F32)
    start = zero_BKRH[..., 0] - jnp.inf, zero_BKRH[..., 0], zero_BKRH
    used = jnp.minimum(-(-lengths_B.max() // Z), pages_BC.shape[1])
    _, total_BKR, y_BKRH = lax.fori_loop(0, used, page, start)
    y_BKRH = y_BKRH / jnp.where(total_BKR == 0, 1, total_BKR)[..., None]
    return heads(y_BKRH, T).astype(q_BTNH.dtype)
