"""The definition: softmax over all keys at once."""

import jax.numpy as jnp
from jax import Array


def visible_BTS(
    q_positions_BT: Array,
    k_positions_BS: Array,
    q_segments_BT: Array,
    k_segments_BS: Array,
    q_prefixes_BT: Array | None,
) -> Array:
    """Boolean [B, T, S]: the key is not later than the query, and of its segment or its prefix; segment 0 is padding."""
    earlier_BTS = k_positions_BS[:, None, :] <= q_positions_BT[:, :, None]
    of_BTS = k_segments_BS[:, None, :] == q_segments_BT[:, :, None]
    if q_prefixes_BT is not None:
        of_BTS |= k_segments_BS[:, None, :] == q_prefixes_BT[:, :, None]
    return earlier_BTS & of_BTS & (q_segments_BT != 0)[:, :, None]


def joined(shared_KSH, k_BSKH, v_BSKH, k_positions_BS, q_segments_BT, k_segments_BS):
    """Keys, values and their positions and segments with the shared ones in front, as a segment of their own; then the
    queries' segments, and their prefixes."""
    B, shared = len(k_BSKH), shared_KSH[0].shape[1]

    def front(z_KSH, z_BSKH):
        rows_BSKH = jnp.broadcast_to(z_KSH.swapaxes(0, 1), (B, shared, *z_BSKH.shape[2:]))
        return jnp.concatenate([rows_BSKH, z_BSKH], axis=1)

    def number(z_BS, first):
        return jnp.pad(z_BS, [(0, 0), (shared, 0)], constant_values=first)

    k_BSKH, v_BSKH = (front(*pair) for pair in zip(shared_KSH, (k_BSKH, v_BSKH), strict=True))
    q_segments_BT, k_segments_BS = (jnp.where(z > 0, z + 1, 0) for z in (q_segments_BT, k_segments_BS))
    keys = (k_BSKH, v_BSKH, number(k_positions_BS, -1), number(k_segments_BS, 1))
    return *keys, q_segments_BT, jnp.ones_like(q_segments_BT)


def attention(
    q_BTNH, k_BSKH, v_BSKH, q_positions_BT, k_positions_BS, q_segments_BT, k_segments_BS, q_prefixes_BT, scale,
    shared_KSH=None,
) -> Array:  # fmt: skip
    if shared_KSH is not None:
        k_BSKH, v_BSKH, k_positions_BS, k_segments_BS, q_segments_BT, q_prefixes_BT = joined(
            shared_KSH, k_BSKH, v_BSKH, k_positions_BS, q_segments_BT, k_segments_BS
        )
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
