"""The definition: every page of the table side by side, softmax over all their tokens at once."""

import jax.numpy as jnp
from jax import Array

F32 = jnp.float32


def decode_attention(q_BTNH, k_PKZH, v_PKZH, pages_BC, lengths_B, scale) -> Array:
    (B, T, N, H), K = q_BTNH.shape, k_PKZH.shape[1]
    k_BKSH, v_BKSH = (z[pages_BC].swapaxes(1, 2).reshape(B, K, -1, H).astype(F32) for z in (k_PKZH, v_PKZH))
    token_S = jnp.arange(k_BKSH.shape[2])
    query_BT = lengths_B[:, None] - T + jnp.arange(T)
    see_BTS = token_S <= query_BT[:, :, None]
    v_BKSH = jnp.where((token_S < lengths_B[:, None])[:, None, :, None], v_BKSH, 0)
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H).astype(F32)
    score_BKGTS = jnp.einsum("btkgh,bksh->bkgts", q_BTKGH, k_BKSH) * scale
    score_BKGTS = jnp.where(see_BTS[:, None, None], score_BKGTS, -jnp.inf)
    top_BKGT1 = score_BKGTS.max(-1, keepdims=True)
    p_BKGTS = jnp.exp(score_BKGTS - jnp.where(top_BKGT1 == -jnp.inf, 0, top_BKGT1))
    total_BKGT1 = p_BKGTS.sum(-1, keepdims=True)
    p_BKGTS /= jnp.where(total_BKGT1 == 0, 1, total_BKGT1)
    y_BTKGH = jnp.einsum("bkgts,bksh->btkgh", p_BKGTS, v_BKSH)
    return y_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype)
