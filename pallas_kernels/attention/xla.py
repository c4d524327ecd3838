"""Attention for XLA's CPU back end, in blocks: T x S is never stored, and blocks in which nothing is visible are skipped.

Which blocks those are is decided while running, from each block's smallest and largest position and segment. Scores are
held transposed, [keys, rows], so that the softmax's maximum and sum run over the leading dimension, which vectorises.
A query's G heads lie beside it, so a row is (query, head of its group) and keys and values are never repeated.
A token that is not finite reaches exactly those that see it: keys, and in the backward pass queries, carry NaN into scores,
where the mask stops it, and everything that invisible pairs would multiply by zero has been made finite.
In block shapes i is a block of queries, j of keys, r of rows.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.attention import reference

F32 = jnp.float32
BLOCK = 64  # at most so many queries, and keys, in a block: its scores stay in the cache
FEW_QUERIES = 8  # up to here the keys' way from memory is the whole cost
NEVER = jnp.iinfo(jnp.int32).max


def attention(
    q_BTNH, k_BSKH, v_BSKH, q_positions_BT, k_positions_BS, q_segments_BT, k_segments_BS, q_prefixes_BT, scale,
    shared_KSH=None,
) -> Array:  # fmt: skip
    (B, T, N, H), K = q_BTNH.shape, k_BSKH.shape[2]
    if T <= FEW_QUERIES:
        see_BTS = reference.visible_BTS(q_positions_BT, k_positions_BS, q_segments_BT, k_segments_BS, q_prefixes_BT)
        return _few_queries(q_BTNH, k_BSKH, v_BSKH, see_BTS, q_segments_BT, scale, shared_KSH)
    if shared_KSH is not None:
        k_BSKH, v_BSKH, k_positions_BS, k_segments_BS, q_segments_BT, q_prefixes_BT = reference.joined(
            shared_KSH, k_BSKH, v_BSKH, k_positions_BS, q_segments_BT, k_segments_BS
        )
    q_prefixes_BT = q_segments_BT if q_prefixes_BT is None else q_prefixes_BT
    q_BTNH, *q_at_BT = (_pad(z) for z in (q_BTNH, q_positions_BT, q_segments_BT, q_prefixes_BT))
    k_BSKH, v_BSKH, *k_at_BS = (_pad(z) for z in (k_BSKH, v_BSKH, k_positions_BS, k_segments_BS))
    q_BKRH, k_BKSH, v_BKSH = _rows(q_BTNH, K), k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    y_BKRH = _blocked(q_BKRH, k_BKSH, v_BKSH, tuple(q_at_BT), tuple(k_at_BS), scale)
    y_BTKGH = y_BKRH.reshape(B, K, -1, N // K, H).swapaxes(1, 2)
    return y_BTKGH.reshape(B, -1, N, H)[:, :T].astype(q_BTNH.dtype)


def _few_queries(q_BTNH, k_BSKH, v_BSKH, see_BTS, q_segments_BT, scale, shared_KSH) -> Array:
    """Decoding: batched over K. A cache that lies in memory as [B, K, S, H] is read in place, whatever its name here;
    shared keys and values are read once for all rows, in one product."""
    (B, T, N, H), K = q_BTNH.shape, k_BSKH.shape[2]
    q_BKRH, k_BKSH, v_BKSH = _rows(q_BTNH, K), k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)

    def seen(score_BKRS: Array, see_BTS: Array) -> Array:
        score_BKTGS = (score_BKRS * scale).reshape(B, K, T, N // K, -1)
        return jnp.where(see_BTS[:, None, :, None], score_BKTGS, -jnp.inf).reshape(score_BKRS.shape)

    scores = [seen(_dot(q_BKRH, k_BKSH, 3, 3), see_BTS)]
    if shared_KSH is not None:
        score_BKRS = jnp.einsum("bkrh,ksh->bkrs", q_BKRH, shared_KSH[0], preferred_element_type=F32)
        scores.append(seen(score_BKRS, (q_segments_BT != 0)[:, :, None]))
    top_BKR1 = jnp.max(jnp.stack([score.max(-1, keepdims=True) for score in scores]), axis=0)
    p_BKRS, *p_shared = (jnp.exp(score - jnp.where(top_BKR1 == -jnp.inf, 0, top_BKR1)) for score in scores)
    total_BKR1 = sum((p.sum(-1, keepdims=True) for p in p_shared), p_BKRS.sum(-1, keepdims=True))
    total_BKR1 = jnp.where(total_BKR1 == 0, 1, total_BKR1)
    y_BKRH = _dot((p_BKRS / total_BKR1).astype(v_BSKH.dtype), v_BKSH, 3, 2)
    if shared_KSH is not None:
        p_BKRS = (p_shared[0] / total_BKR1).astype(v_BSKH.dtype)
        y_BKRH += jnp.einsum("bkrs,ksh->bkrh", p_BKRS, shared_KSH[1], preferred_element_type=F32)
    y_BTKGH = y_BKRH.reshape(B, K, T, N // K, H).swapaxes(1, 2)
    return y_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype)


def _blocks(length: int) -> int:
    return -(-length // BLOCK)


def _pad(z: Array) -> Array:
    """Zeros (in segments: padding) after dimension 1, up to a whole number of equal blocks."""
    missing = -z.shape[1] % _blocks(z.shape[1])
    return jnp.pad(z, [(0, 0), (0, missing), *[(0, 0)] * (z.ndim - 2)]) if missing else z


def _rows(z_BTNH: Array, K: int) -> Array:
    """[B, K, T*G, H]: query by query, its group's heads side by side."""
    B, T, N, H = z_BTNH.shape
    return z_BTNH.reshape(B, T, K, N // K, H).swapaxes(1, 2).reshape(B, K, T * (N // K), H)


def _block(z: Array, i: Array, blocks: int, dim: int) -> Array:
    """The i-th of `blocks` equal pieces of dimension `dim`."""
    size = z.shape[dim] // blocks
    return lax.dynamic_slice_in_dim(z, i * size, size, dim, allow_negative_indices=False)


def _put_block(z: Array, piece: Array, i: Array, dim: int = 2) -> Array:
    return lax.dynamic_update_slice_in_dim(z, piece, i * piece.shape[dim], dim, allow_negative_indices=False)


def _add_block(z_BKHS: Array, piece_BKHj: Array, j: Array, blocks: int) -> Array:
    return _put_block(z_BKHS, _block(z_BKHS, j, blocks, 3) + piece_BKHj, j, 3)


def _turned(z_BKrH: Array) -> Array:
    """[B, K, H, r] in memory: as a first factor it is summed over innermost, a fifth faster than over its rows."""
    return lax.optimization_barrier(z_BKrH.swapaxes(2, 3))


def _dot(a: Array, b: Array, contract_a: int, contract_b: int) -> Array:
    """Product over the last two dimensions' chosen one, batched over B and K."""
    dims = (((contract_a,), (contract_b,)), ((0, 1), (0, 1)))
    return lax.dot_general(a, b, dims, preferred_element_type=F32)


def _finite(z: Array) -> Array:
    return jnp.where(jnp.isfinite(z), z, 0)


def _speaking_for(z: Array, other: Array) -> Array:
    """`z`, with NaN where the other's vector is not finite."""
    return jnp.where(jnp.isfinite(other).all(-1, keepdims=True), z, jnp.nan)


def _overlaps(q_at_BT: tuple[Array, ...], k_at_BS: tuple[Array, ...]) -> Array:
    """Boolean [blocks of queries, blocks of keys]: false only where no query of the one sees a key of the other."""
    (q_positions_BT, q_segments_BT, q_prefixes_BT), (k_positions_BS, k_segments_BS) = q_at_BT, k_at_BS

    def of_blocks(reduce, otherwise, z, segments):
        shape = (z.shape[0], _blocks(z.shape[1]), -1)
        return reduce(jnp.where(segments == 0, otherwise, z).reshape(shape), axis=-1)

    lowest, highest = partial(of_blocks, jnp.min, NEVER), partial(of_blocks, jnp.max, -NEVER)
    first_seen_BT = jnp.minimum(q_segments_BT, q_prefixes_BT)
    in_time_BIJ = lowest(k_positions_BS, k_segments_BS)[:, None] <= highest(q_positions_BT, q_segments_BT)[:, :, None]
    in_reach_BIJ = (
        lowest(k_segments_BS, k_segments_BS)[:, None] <= highest(q_segments_BT, q_segments_BT)[:, :, None]
    ) & (lowest(first_seen_BT, q_segments_BT)[:, :, None] <= highest(k_segments_BS, k_segments_BS)[:, None])
    return (in_time_BIJ & in_reach_BIJ).any(0)


def _scores(
    q_BKrH: Array, k_BKjH: Array, q_at_Bi: tuple[Array, ...], k_at_Bj: tuple[Array, ...], scale: float
) -> Array:
    """Float32 [B, K, r, j], -inf where invisible; `at` is positions, segments and, of queries, prefixes."""
    (q_position_Bi, q_segment_Bi, q_prefix_Bi), (k_position_Bj, k_segment_Bj) = q_at_Bi, k_at_Bj
    see_Bij = reference.visible_BTS(q_position_Bi, k_position_Bj, q_segment_Bi, k_segment_Bj, q_prefix_Bi)
    score_BKrj = _dot(q_BKrH, k_BKjH, 3, 3) * scale
    B, K, _, j = score_BKrj.shape
    score_BKiGj = score_BKrj.reshape(B, K, see_Bij.shape[1], -1, j)
    return jnp.where(see_Bij[:, None, :, None], score_BKiGj, -jnp.inf).reshape(score_BKrj.shape)


def _over_keys(sees_J: Array, body, carry):
    """`carry = body(j, carry)` for each block of keys that is not skipped."""
    last = jnp.where(sees_J, jnp.arange(sees_J.size), -1).max()

    def step(j, carry):
        return lax.cond(sees_J[j], lambda c: body(j, c), lambda c: c, carry)

    return lax.fori_loop(0, last + 1, step, carry)


def _forward(q_BKRH, k_BKSH, v_BKSH, q_at_BT, k_at_BS, scale):
    """The result, float32, and each row's log of its sum of exponentials (+inf where nothing is visible)."""
    sees_IJ = _overlaps(q_at_BT, k_at_BS)
    q_blocks, k_blocks = sees_IJ.shape
    k_BKSH, v_BKSH = _speaking_for(k_BKSH, v_BKSH), _finite(v_BKSH)

    def queries(out, i):
        q_BKrH = _block(q_BKRH, i, q_blocks, 2)
        q_at = tuple(_block(z_BT, i, q_blocks, 1) for z_BT in q_at_BT)

        def keys(j, carry):
            top_BKr, sum_BKr, y_BKrH = carry
            k_at = tuple(_block(z_BS, j, k_blocks, 1) for z_BS in k_at_BS)
            score_BKrj = _scores(q_BKrH, _block(k_BKSH, j, k_blocks, 2), q_at, k_at, scale)
            new_BKr = jnp.maximum(top_BKr, score_BKrj.max(3))
            safe_BKr = jnp.where(new_BKr == -jnp.inf, 0, new_BKr)
            p_BKrj = jnp.exp(score_BKrj - safe_BKr[..., None])
            shrink_BKr = jnp.exp(top_BKr - safe_BKr)
            y_BKrH = y_BKrH * shrink_BKr[..., None] + _dot(
                p_BKrj.astype(v_BKSH.dtype), _block(v_BKSH, j, k_blocks, 2), 3, 2
            )
            return new_BKr, sum_BKr * shrink_BKr + p_BKrj.sum(3), y_BKrH

        zero_BKrH = jnp.zeros_like(q_BKrH, F32)
        start = (zero_BKrH[..., 0] - jnp.inf, zero_BKrH[..., 0], zero_BKrH)
        top_BKr, sum_BKr, y_BKrH = _over_keys(sees_IJ[i], keys, start)
        total_BKr = jnp.where(sum_BKr == 0, 1, sum_BKr)
        lse_BKr = jnp.where(sum_BKr == 0, jnp.inf, top_BKr + jnp.log(total_BKr))
        y_BKRH, lse_BKR = out
        return (_put_block(y_BKRH, y_BKrH / total_BKr[..., None], i), _put_block(lse_BKR, lse_BKr, i)), None

    zero_BKRH = jnp.zeros_like(q_BKRH, F32)
    return lax.scan(queries, (zero_BKRH, zero_BKRH[..., 0]), jnp.arange(q_blocks))[0]


def _backward(scale, saved, dy_BKRH):
    q_BKRH, k_BKSH, v_BKSH, q_at_BT, k_at_BS, y_BKRH, lse_BKR = saved
    sees_IJ = _overlaps(q_at_BT, k_at_BS)
    q_blocks, k_blocks = sees_IJ.shape
    dtype = q_BKRH.dtype
    delta_BKR = (dy_BKRH * y_BKRH).sum(-1)
    q_BKRH = _speaking_for(q_BKRH, delta_BKR[..., None])
    k_BKSH, v_BKSH = _speaking_for(k_BKSH, v_BKSH), _finite(v_BKSH)
    dy_BKRH, delta_BKR, lse_BKR = _finite(dy_BKRH), _finite(delta_BKR), jnp.where(jnp.isnan(lse_BKR), 0, lse_BKR)

    def queries(carry, i):
        q_BKrH, dy_BKrH = _block(q_BKRH, i, q_blocks, 2), _block(dy_BKRH, i, q_blocks, 2).astype(dtype)
        known_q_BKHr, dy_BKHr = _turned(_finite(q_BKrH)), _turned(dy_BKrH)
        lse_BKr1, delta_BKr1 = (_block(z, i, q_blocks, 2)[..., None] for z in (lse_BKR, delta_BKR))
        q_at = tuple(_block(z_BT, i, q_blocks, 1) for z_BT in q_at_BT)

        def keys(j, carry):
            dq_BKrH, dk_BKHS, dv_BKHS = carry
            k_BKjH, v_BKjH = _block(k_BKSH, j, k_blocks, 2), _block(v_BKSH, j, k_blocks, 2)
            k_at = tuple(_block(z_BS, j, k_blocks, 1) for z_BS in k_at_BS)
            p_BKrj = jnp.exp(_scores(q_BKrH, k_BKjH, q_at, k_at, scale) - lse_BKr1)
            ds_BKrj = (p_BKrj * (_dot(dy_BKrH, v_BKjH, 3, 3) - delta_BKr1) * scale).astype(dtype)
            dv_BKHS = _add_block(dv_BKHS, _dot(dy_BKHr, p_BKrj.astype(dtype), 3, 2), j, k_blocks)
            dk_BKHS = _add_block(dk_BKHS, _dot(known_q_BKHr, ds_BKrj, 3, 2), j, k_blocks)
            return dq_BKrH + _dot(ds_BKrj, _finite(k_BKjH), 3, 2), dk_BKHS, dv_BKHS

        dq_BKRH, *dkv = carry
        dq_BKrH, *dkv = _over_keys(sees_IJ[i], keys, (jnp.zeros_like(q_BKrH, F32), *dkv))
        return (_put_block(dq_BKRH, dq_BKrH, i), *dkv), None

    zeros = tuple(jnp.zeros_like(z, F32) for z in (q_BKRH, k_BKSH.swapaxes(2, 3), v_BKSH.swapaxes(2, 3)))
    dq_BKRH, *dkv_BKHS = lax.scan(queries, zeros, jnp.arange(q_blocks))[0]
    grads = dq_BKRH, *(d.swapaxes(2, 3) for d in dkv_BKHS)
    return *(d.astype(dtype) for d in grads), (None,) * 3, (None,) * 2


def _result(q_BKRH, k_BKSH, v_BKSH, q_at_BT, k_at_BS, scale) -> Array:
    return _forward(q_BKRH, k_BKSH, v_BKSH, q_at_BT, k_at_BS, scale)[0]


def _blocked_fwd(*inputs):
    y_BKRH, lse_BKR = _forward(*inputs)
    y_BKRH, lse_BKR = checkpoint_name(y_BKRH, "attention_out"), checkpoint_name(lse_BKR, "attention_lse")
    return y_BKRH, (*inputs[:5], y_BKRH, lse_BKR)


_blocked = jax.custom_vjp(_result, nondiff_argnums=(5,))
_blocked.defvjp(_blocked_fwd, _backward)
