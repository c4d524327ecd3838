"""The definition: softmax over all keys at once."""

import jax.numpy as jnp
from jax import Array


def visible_BTS(
    q_positions_BT: Array, k_positions_BS: Array, q_segments_BT: Array, k_segments_BS: Array, q_prefixes_BT: Array
) -> Array:
    """Boolean [B, T, S]: the key is not later than the query, and of its segment or its prefix; segment 0 is padding."""
    earlier_BTS = k_positions_BS[:, None, :] <= q_positions_BT[:, :, None]
    own_BTS, before_BTS = (k_segments_BS[:, None, :] == z[:, :, None] for z in (q_segments_BT, q_prefixes_BT))
    return earlier_BTS & (own_BTS | before_BTS) & (q_segments_BT != 0)[:, :, None]


def attention(
    q_BTNH, k_BSKH, v_BSKH, q_positions_BT, k_positions_BS, q_segments_BT, k_segments_BS, q_prefixes_BT, scale
) -> Array:
    B, T, N, H = q_BTNH.shape
    q_BTKGH = q_BTNH.reshape(B, T, k_BSKH.shape[2], -1, H)
    see_BTS = visible_BTS(q_positions_BT, k_positions_BS, q_segments_BT, k_segments_BS, q_prefixes_BT)
    score_BKGTS = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * scale
    score_BKGTS = jnp.where(see_BTS[:, None, None], score_BKGTS, -jnp.inf)
    top_BKGT1 = score_BKGTS.max(-1, keepdims=True)
    p_BKGTS = jnp.exp(
        score_BKGTS - jnp.where(jnp.isfinite(top_BKGT1), top_BKGT1, 0)
    )  # all zero where nothing is visible
    total_BKGT1 = p_BKGTS.sum(-1, keepdims=True)
    p_BKGTS = (p_BKGTS / jnp.where(total_BKGT1 == 0, 1, total_BKGT1)).astype(v_BSKH.dtype)
    y_BTKGH = jnp.einsum("bkgts,bskh->btkgh", p_BKGTS, v_BSKH, preferred_element_type=jnp.float32)
    return y_BTKGH.astype(q_BTNH.dtype).reshape(B, T, N, H)
