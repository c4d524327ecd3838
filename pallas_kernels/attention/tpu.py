"""Attention for TPUs, in Pallas: scores exist one tile at a time, and only tiles in which something is visible are visited.

Which tiles those are is decided on the device: `tpu_tiles.visible_tiles` lists them, and the list, prefetched into scalar
memory, drives a grid as long as itself. A tile in which every query sees every key needs no mask. The forward pass walks
a block of queries' tiles one after another and rescales its sums (online softmax); the backward pass walks a block of
keys' tiles, all heads of its group at each, and adds dq to high-bandwidth memory tile by tile, so that five products do
and no partial dq is kept.

Matmul units wait for scores and vector units for products, so each tile is cut into parts, and the next part's scores are
asked for before this one's softmax. Scores are scaled to base 2: the chip has a power of two and no exponential. In the
backward pass scores lie transposed, [keys, queries], where what belongs to a query broadcasts for nothing.

A token that is not finite reaches exactly those that see it: keys carry it into scores, where the mask stops it, and
everything that invisible pairs would multiply by zero has been made finite.
In block shapes i is a block of queries, j of keys, r a part of either.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import reference
from pallas_kernels.attention.tpu_sums import sum_in_memory
from pallas_kernels.attention.tpu_tiles import FIRST, FRESH, FULL, LAST, PREFIXED, visible_tiles
from pallas_kernels.results import result_like

F32 = jnp.float32
LANES = 128
DEVICES = ("TPU v5", "TPU v6", "TPU7")  # older ones have less fast memory
HEAD_DIMS = (64, 128)
FEW_QUERIES = 8  # decoding: up to here the keys' way from memory is the whole cost, and a tile would be mostly padding
MOST_TILES = 1 << 15  # whose list fits scalar memory
VMEM_BYTES = 48 << 20
TURN_BYTES = 1 << 29  # of queries: beyond it the heads take turns, so that copies in the kernels' layout stay small
LOG2_E = 1.4426950408889634
UNSEEN = -1e30  # a score that no real one comes near; finite, so that a row's first visible key is no special case
LATEST = jnp.iinfo(jnp.int32).max


@dataclass(frozen=True)
class Config:
    """Most queries and keys in a tile, and rows in one of its parts (of queries forward, of keys backward); whether queries may
    have prefixes, else tiles' masks are made without them."""

    queries: int = 1024
    keys: int = 1024
    forward_part: int = 256
    backward_part: int = 256
    prefixes: bool = True


# By the compiler's static schedule for 1024 x 1024 tiles, head dim 128: the shortest of parts of 64, 128, 256 and 512.
TUNED = {"TPU v5": Config(forward_part=64, backward_part=512), "TPU v5p": Config(forward_part=64, backward_part=512)}


def refusal(operation: str, q_BTNH: Array, k_BSKH: Array, v_BSKH: Array) -> str | None:
    """Why these arrays are not for this module, or None."""
    (B, T, _, H), S = q_BTNH.shape, k_BSKH.shape[1]
    if H not in HEAD_DIMS:
        return f"q {q_BTNH.shape} has head dim {H}, and tiles are written for {HEAD_DIMS}"
    if q_BTNH.dtype not in (jnp.bfloat16, F32):
        return f"q {q_BTNH.shape} is {q_BTNH.dtype}, and the matmul units take bfloat16 and float32"
    if T <= FEW_QUERIES:
        return f"q {q_BTNH.shape} has {T} queries in a row, and up to {FEW_QUERIES} a tile would be mostly padding"
    config = _config()
    tiles = B * -(-T // config.queries) * -(-S // config.keys)
    return (
        f"q {q_BTNH.shape}, k {k_BSKH.shape} make {tiles} tiles, more than {MOST_TILES}" if tiles > MOST_TILES else None
    )


def attention(
    q_BTNH, k_BSKH, v_BSKH, q_positions_BT, k_positions_BS, q_segments_BT, k_segments_BS, q_prefixes_BT, scale,
    shared_KSH=None,
) -> Array:  # fmt: skip
    if shared_KSH is not None:
        k_BSKH, v_BSKH, k_positions_BS, k_segments_BS, q_segments_BT, q_prefixes_BT = reference.joined(
            shared_KSH, k_BSKH, v_BSKH, k_positions_BS, q_segments_BT, k_segments_BS
        )
    q_real_BT, k_real_BS = q_segments_BT != 0, k_segments_BS != 0
    q_at_B3T = jnp.stack(
        [
            jnp.where(q_real_BT, q_positions_BT, -LATEST),  # padding sees nothing, and is seen by nothing
            q_segments_BT,
            jnp.where(q_real_BT, q_segments_BT if q_prefixes_BT is None else q_prefixes_BT, 0),
        ],
        axis=1,
    )
    k_at_B2S = jnp.stack([jnp.where(k_real_BS, k_positions_BS, LATEST), k_segments_BS], axis=1)
    config = replace(_config(), prefixes=q_prefixes_BT is not None)
    return _attention(q_BTNH, k_BSKH, v_BSKH, q_at_B3T.astype(jnp.int32), k_at_B2S.astype(jnp.int32), scale, config)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(q_BTNH, k_BSKH, v_BSKH, q_at_B3T, k_at_B2S, scale, config):
    return _attention_fwd(q_BTNH, k_BSKH, v_BSKH, q_at_B3T, k_at_B2S, scale, config)[0]


def _attention_fwd(q_BTNH, k_BSKH, v_BSKH, q_at_B3T, k_at_B2S, scale, config):
    """The result, and what the backward pass needs: beside the inputs the result itself and each row's log2 of its sum."""

    def heads(q_BTNH, k_BSKH, v_BSKH):
        arrays = _to_blocks(q_BTNH, k_BSKH, v_BSKH, q_at_B3T, k_at_B2S, config)
        y_BNTH, lse_BN1T = _forward(*arrays, scale, _fitted(config, q_BTNH, k_BSKH))
        T = q_BTNH.shape[1]
        return y_BNTH.swapaxes(1, 2)[:, :T], lse_BN1T[:, :, 0, :T].swapaxes(1, 2)

    y_BTNH, lse_BTN = _in_turns(heads, q_BTNH, k_BSKH, v_BSKH)
    y_BTNH, lse_BTN = checkpoint_name(y_BTNH, "attention_out"), checkpoint_name(lse_BTN, "attention_lse")
    return y_BTNH, (q_BTNH, k_BSKH, v_BSKH, q_at_B3T, k_at_B2S, y_BTNH, lse_BTN)


def _attention_bwd(scale, config, saved, dy_BTNH):
    q_BTNH, k_BSKH, v_BSKH, q_at_B3T, k_at_B2S, y_BTNH, lse_BTN = saved

    def heads(q_BTNH, k_BSKH, v_BSKH, y_BTNH, lse_BTN, dy_BTNH):
        delta_BTN = (dy_BTNH.astype(F32) * y_BTNH.astype(F32)).sum(-1)
        known_BTN = jnp.isfinite(delta_BTN)  # else NaN in lse speaks for the row: it becomes p, and the mask stops it
        lse_BTN, delta_BTN = jnp.where(known_BTN, lse_BTN, jnp.nan), jnp.where(known_BTN, delta_BTN, 0)
        q_BTNH, dy_BTNH = _finite(q_BTNH), _finite(dy_BTNH)
        arrays = _to_blocks(q_BTNH, k_BSKH, v_BSKH, q_at_B3T, k_at_B2S, config)
        fitted = _fitted(config, q_BTNH, k_BSKH)
        dy_BNTH, lse_BNT, delta_BNT = (_padded(z, fitted.queries).swapaxes(1, 2) for z in (dy_BTNH, lse_BTN, delta_BTN))
        rows = lse_BNT[:, :, None], delta_BNT[:, :, None]
        dk_BKSH, dv_BKSH, dq_BNHT = _backward(*arrays, dy_BNTH, *rows, scale, fitted)
        T, S = q_BTNH.shape[1], k_BSKH.shape[1]
        dq_BTNH = (dq_BNHT * scale).astype(q_BTNH.dtype).transpose(0, 3, 1, 2)[:, :T]
        return dq_BTNH, *(z.swapaxes(1, 2)[:, :S] for z in (dk_BKSH, dv_BKSH))

    return *_in_turns(heads, q_BTNH, k_BSKH, v_BSKH, y_BTNH, lse_BTN, dy_BTNH), None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _config() -> Config:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return TUNED.get(device.device_kind if device else "", Config())


def _fitted(config: Config, q_BTNH: Array, k_BSKH: Array) -> Config:
    """The same with tiles no larger than these arrays need, in equal blocks of whole lanes, and parts that divide them."""

    def block(length: int, most: int) -> int:
        blocks = -(-length // most)
        return LANES * -(-length // (blocks * LANES))

    def part(rows: int, most: int) -> int:
        return next(size for size in range(min(rows, most), 0, -1) if rows % size == 0)

    queries, keys = block(q_BTNH.shape[1], config.queries), block(k_BSKH.shape[1], config.keys)
    forward, backward = part(queries, config.forward_part), part(keys, config.backward_part)
    return replace(config, queries=queries, keys=keys, forward_part=forward, backward_part=backward)


def _padded(z: Array, block: int, dim: int = 1) -> Array:
    """Zeros (in segments: padding) after dimension `dim`, up to a whole number of blocks."""
    missing = -z.shape[dim] % block
    return jnp.pad(z, [(0, missing if n == dim else 0) for n in range(z.ndim)]) if missing else z


def _finite(z: Array) -> Array:
    return jnp.where(jnp.isfinite(z), z, 0)


def _to_blocks(q_BTNH, k_BSKH, v_BSKH, q_at_B3T, k_at_B2S, config):
    """Heads before tokens, whole blocks; and keys speak for values that are not finite."""
    config = _fitted(config, q_BTNH, k_BSKH)
    k_BSKH = jnp.where(jnp.isfinite(v_BSKH).all(-1, keepdims=True), k_BSKH, jnp.nan)
    q_BNTH = _padded(q_BTNH, config.queries).swapaxes(1, 2)
    k_BKSH, v_BKSH = (_padded(z, config.keys).swapaxes(1, 2) for z in (k_BSKH, _finite(v_BSKH)))
    return q_BNTH, k_BKSH, v_BKSH, _padded(q_at_B3T, config.queries, 2), _padded(k_at_B2S, config.keys, 2)


def _in_turns(heads, q_BTNH: Array, k_BSKH: Array, *others: Array) -> list[Array]:
    """`heads` on all heads, or where they are large on one group of key-value heads and its queries after another."""
    K = k_BSKH.shape[2]
    turns = next(n for n in range(1, K + 1) if K % n == 0 and (n == K or q_BTNH.nbytes <= n * TURN_BYTES))
    arrays = (q_BTNH, k_BSKH, *others)
    if turns == 1:
        return list(heads(*arrays))

    def of_turn(n: Array) -> list[Array]:
        sizes = [z.shape[2] // turns for z in arrays]
        pieces = (lax.dynamic_slice_in_dim(z, n * s, s, 2) for z, s in zip(arrays, sizes, strict=True))
        return [_as_it_lies(z) for z in heads(*map(_as_it_lies, pieces))]

    def turn(n: Array, results: list[Array]) -> list[Array]:
        pairs = zip(results, of_turn(n), strict=True)
        return [lax.dynamic_update_slice_in_dim(all_z, z, n * z.shape[2], 2) for all_z, z in pairs]

    def of_all(z) -> Array:
        return jnp.zeros_like(q_BTNH, z.dtype, shape=(*z.shape[:2], z.shape[2] * turns, *z.shape[3:]))

    return lax.fori_loop(0, turns, turn, [of_all(z) for z in jax.eval_shape(of_turn, 0)])


def _as_it_lies(z: Array) -> Array:
    """Last dimension minor: without it the compiler would change the layout of what the piece is cut from, all of it."""
    return with_layout_constraint(z, Layout(tuple(range(z.ndim))))


def _dot(a: Array, b: Array, contract_a: int = 1, contract_b: int = 0) -> Array:
    return lax.dot_general(a, b, (((contract_a,), (contract_b,)), ((), ())), preferred_element_type=F32)


def _visible(q_at: list[Array], k_at: list[Array], prefixed: bool) -> Array:
    """Positions, segments and prefixes of queries against positions and segments of keys, in shapes that broadcast."""
    (q_position, q_segment, q_prefix), (k_position, k_segment) = q_at, k_at
    own = q_segment == k_segment
    return (own | (q_prefix == k_segment) if prefixed else own) & (k_position <= q_position)


def _by_kind(flag: Array, tile, config: Config) -> None:
    """`tile(masked, prefixed)` as this tile needs it."""
    full, prefixed = flag & FULL != 0, flag & PREFIXED != 0
    pl.when(full)(lambda: tile(False, False))
    pl.when(~full & ~prefixed)(lambda: tile(True, False))
    if config.prefixes:
        pl.when(~full & prefixed)(lambda: tile(True, True))


def _parts(rows: int, size: int) -> list[slice]:
    return [slice(a, a + size) for a in range(0, rows, size)]


def _along_lanes(z: Array) -> Array:
    """A vector as a column, the same in all lanes."""
    return jnp.broadcast_to(z[None], (LANES, z.shape[0])).T


def _across(z_rL: Array, width: int) -> Array:
    return jnp.tile(z_rL, (1, width // LANES)) if width >= LANES else z_rL[:, :width]


def _forward_kernel(
    row, i, j, flags, q_ref, k_ref, v_ref, q_at_ref, k_at_ref, y_ref, lse_ref, top, total, sums, q_at,
    *, scale, config,
):  # fmt: skip
    """`top`, `total` and `sums` hold each row's largest score, its lanes' sums of powers, and its weighted values."""
    flag, H = flags[pl.program_id(1)], q_ref.shape[1]

    @pl.when(flag & FIRST != 0)
    def _():
        top[...] = jnp.full_like(top, UNSEEN)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)
        for n in range(3):
            q_at[n] = _along_lanes(q_at_ref[n])

    def tile(masked, prefixed):
        k_jH, v_jH = k_ref[...], v_ref[...]
        parts = _parts(config.queries, config.forward_part)
        s_rj = _dot(q_ref[parts[0]], k_jH, 1, 1)
        for at, after in zip(parts, [*parts[1:], None], strict=True):
            next_s_rj = None if after is None else _dot(q_ref[after], k_jH, 1, 1)
            s_rj = s_rj * (scale * LOG2_E)
            if masked:
                q_here = [_across(q_at[n, at], config.keys) for n in range(3)]
                see_rj = _visible(q_here, [k_at_ref[n][None] for n in range(2)], prefixed)
                s_rj = jnp.where(see_rj, s_rj, UNSEEN)
            old_rL = top[at]
            new_rL = jnp.maximum(old_rL, s_rj.max(1, keepdims=True))
            shrink_rL = jnp.exp2(old_rL - new_rL)
            p_rj = jnp.exp2(s_rj - _across(new_rL, config.keys))
            top[at] = new_rL
            total[at] = total[at] * shrink_rL + sum(p_rj[:, lanes] for lanes in _parts(config.keys, LANES))
            sums[at] = sums[at] * _across(shrink_rL, H) + _dot(p_rj.astype(v_jH.dtype), v_jH)
            s_rj = next_s_rj

    _by_kind(flag, tile, config)

    @pl.when(flag & LAST != 0)
    def _():
        total_i1 = total[...].sum(1, keepdims=True)
        nothing_iL = (top[...] == UNSEEN) & (total_i1 == total_i1)  # a maximum may pass over NaN, a sum does not
        y_ref[...] = jnp.where(_across(nothing_iL, H), 0, sums[...] / total_i1).astype(y_ref.dtype)
        lse_ref[...] = jnp.where(nothing_iL, jnp.inf, top[...] + jnp.log2(total_i1)).T[:1]


def _specs(config: Config, H: int, place) -> dict[str, pl.BlockSpec]:
    """Blocks by what they hold; `place(*grid indices)` is the tile's place in the list, its query and its key-value head."""

    def block(shape, index):
        def at(*grid_and_tiles):
            *grid, row, i, j, _ = grid_and_tiles
            step, n, kv = place(*grid)
            return index(row[step], n, kv, i[step], j[step])

        return pl.BlockSpec(shape, at)

    queries, keys = config.queries, config.keys
    return {
        "queries": block((None, None, queries, H), lambda b, n, kv, i, j: (b, n, i, 0)),
        "keys": block((None, None, keys, H), lambda b, n, kv, i, j: (b, kv, j, 0)),
        "keys_T": block((None, None, H, keys), lambda b, n, kv, i, j: (b, kv, 0, j)),
        "rows": block((None, None, 1, queries), lambda b, n, kv, i, j: (b, n, 0, i)),
        "q_at": block((None, 3, queries), lambda b, n, kv, i, j: (b, 0, i)),
        "k_at": block((None, 2, keys), lambda b, n, kv, i, j: (b, 0, j)),
    }


def _cost(q_BNTH: Array, k_BKSH: Array, products: int) -> pl.CostEstimate:
    """Of causal attention over whole rows; packing makes it less."""
    (B, N, T, H), S = q_BNTH.shape, k_BKSH.shape[2]
    pairs = B * N * T * S // 2
    touched = products * (q_BNTH.nbytes + k_BKSH.nbytes)
    return pl.CostEstimate(flops=2 * products * pairs * H, transcendentals=pairs, bytes_accessed=touched)


def _forward(q_BNTH, k_BKSH, v_BKSH, q_at_B3T, k_at_B2S, scale, config):
    (B, N, T, H), K = q_BNTH.shape, k_BKSH.shape[1]
    tiles, count = visible_tiles(q_at_B3T, k_at_B2S, config.queries, config.keys, keys_first=False)
    spec = _specs(config, H, lambda n, step: (step, n, n // (N // K)))
    run = pl.pallas_call(
        partial(_forward_kernel, scale=scale, config=config),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(N, count),
            in_specs=[spec[name] for name in ("queries", "keys", "keys", "q_at", "k_at")],
            out_specs=[spec["queries"], spec["rows"]],
            scratch_shapes=[
                *(pltpu.VMEM((config.queries, width), F32) for width in (LANES, LANES, H)),
                pltpu.VMEM((3, config.queries, LANES), jnp.int32),
            ],
        ),
        out_shape=[result_like(q_BNTH, q_BNTH.shape, q_BNTH.dtype), result_like(q_BNTH, (B, N, 1, T), F32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=_cost(q_BNTH, k_BKSH, products=2),
        name="attention_forward",
    )
    return run(*tiles, q_BNTH, k_BKSH, v_BKSH, q_at_B3T, k_at_B2S)


def _backward_kernel(
    row, i, j, flags, q_ref, dy_ref, k_ref, k_T_ref, v_ref, lse_ref, delta_ref, q_at_ref, k_at_ref,
    dk_ref, dv_ref, dq_BNHT, dk, dv, ds, k_at, dq, arrived, left, *, scale, config,
):  # fmt: skip
    """Grid: key-value heads, tiles, and innermost the query heads that share them."""
    kv, tile_at, g = (pl.program_id(n) for n in range(3))
    group, flag = pl.num_programs(2), flags[tile_at]

    def place(step):
        t, head = step // group, kv * group + step % group
        return dq_BNHT.at[row[t], head, :, pl.ds(pl.multiple_of(i[t] * config.queries, LANES), config.queries)]

    def same(a, b):
        ta, tb = a // group, b // group
        return (row[ta] == row[tb]) & (i[ta] == i[tb]) & (a % group == b % group)

    slot, begin, end = sum_in_memory(place, lambda s: flags[s // group] & FRESH != 0, same, dq, arrived, left)
    begin()

    @pl.when((flag & FIRST != 0) & (g == 0))
    def _():
        dk[...] = jnp.zeros_like(dk)
        dv[...] = jnp.zeros_like(dv)
        for n in range(2):
            k_at[n] = _along_lanes(k_at_ref[n])

    def tile(masked, prefixed):
        q_iH, dy_iH, lse_1i, delta_1i = (z[...] for z in (q_ref, dy_ref, lse_ref, delta_ref))
        parts = _parts(config.keys, config.backward_part)

        def products(at):
            return _dot(k_ref[at], q_iH, 1, 1), _dot(v_ref[at], dy_iH, 1, 1)

        s_ri, dp_ri = products(parts[0])
        for at, after in zip(parts, [*parts[1:], None], strict=True):
            ahead = (None, None) if after is None else products(after)
            p_ri = jnp.exp2(s_ri * (scale * LOG2_E) - lse_1i)
            if masked:
                k_here = [_across(k_at[n, at], config.queries) for n in range(2)]
                see_ri = _visible([q_at_ref[n][None] for n in range(3)], k_here, prefixed)
                p_ri = jnp.where(see_ri, p_ri, 0)
            ds[at] = (p_ri * (dp_ri - delta_1i)).astype(ds.dtype)
            dv[at] += _dot(p_ri.astype(dy_iH.dtype), dy_iH)
            dk[at] += _dot(ds[at], q_iH)
            s_ri, dp_ri = ahead
        dq[slot] += _dot(k_T_ref[...], ds[...])

    _by_kind(flag, tile, config)
    end()

    @pl.when((flag & LAST != 0) & (g == group - 1))
    def _():
        dk_ref[...] = (dk[...] * scale).astype(dk_ref.dtype)
        dv_ref[...] = dv[...].astype(dv_ref.dtype)


def _backward(q_BNTH, k_BKSH, v_BKSH, q_at_B3T, k_at_B2S, dy_BNTH, lse_BN1T, delta_BN1T, scale, config):
    """dk, dv; and dq in float32, tokens last, not yet scaled."""
    (B, N, T, H), K = q_BNTH.shape, k_BKSH.shape[1]
    tiles, count = visible_tiles(q_at_B3T, k_at_B2S, config.queries, config.keys, keys_first=True)
    spec = _specs(config, H, lambda kv, step, g: (step, kv * (N // K) + g, kv))
    k_BKHS = _finite(k_BKSH).swapaxes(2, 3)  # for dq, where invisible keys are multiplied by zero
    names = ("queries", "queries", "keys", "keys_T", "keys", "rows", "rows", "q_at", "k_at")
    run = pl.pallas_call(
        partial(_backward_kernel, scale=scale, config=config),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(K, count, N // K),
            in_specs=[spec[name] for name in names],
            out_specs=[spec["keys"], spec["keys"], pl.BlockSpec(memory_space=pltpu.HBM)],
            scratch_shapes=[
                *(pltpu.VMEM((config.keys, H), F32) for _ in range(2)),
                pltpu.VMEM((config.keys, config.queries), q_BNTH.dtype),
                pltpu.VMEM((2, config.keys, LANES), jnp.int32),
                pltpu.VMEM((2, H, config.queries), F32),
                *(pltpu.SemaphoreType.DMA((2,)) for _ in range(2)),
            ],
        ),
        out_shape=[
            result_like(q_BNTH, k_BKSH.shape, k_BKSH.dtype),
            result_like(q_BNTH, v_BKSH.shape, v_BKSH.dtype),
            result_like(q_BNTH, (B, N, H, T), F32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=_cost(q_BNTH, k_BKSH, products=5),
        name="attention_backward",
    )
    return run(*tiles, q_BNTH, dy_BNTH, k_BKSH, k_BKHS, v_BKSH, lse_BN1T, delta_BN1T, q_at_B3T, k_at_B2S)
