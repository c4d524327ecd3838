"""Attention for Hopper (sm_90a) in bfloat16: one loading warpgroup feeds two, each with 64 rows of its own.

Which blocks a tile visits is decided beforehand on the device, from each block's smallest and largest position and segment
(`block_lists`): first those in which everything is visible, which need no mask, then those that need one; the rest are
never loaded. While one of the two warpgroups is at its softmax the other has the tensor cores: they take turns. The
backward pass is two kernels, one over tiles of queries for dq, one over tiles of keys for dk and dv, which goes through
all query heads of its key-value head: sums stay in registers, and nothing partial is written.
Scores are in units of log 2. In shapes i is a consumer's rows, j a block of what they meet, P a list's length.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.attention import reference
from pallas_kernels.attention.blocks import NEVER, block_lists
from pallas_kernels.hopper import CONSUMERS
from pallas_kernels.results import result_like

F32, BF16 = jnp.float32, jnp.bfloat16
DEVICES = ("H100", "H200", "H800", "H20")  # sm_90a
ROWS = 64  # of a consumer
TILE = CONSUMERS * ROWS
LOWEST = -1e30  # a maximum to begin with from which minus infinity can be subtracted
LOG2_E = math.log2(math.e)
OF_ROWS, OF_COLUMNS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


@dataclass(frozen=True)
class Config:
    """Keys, and for dk and dv queries, of a block, and how many blocks are in shared memory."""

    forward: int = 128
    forward_stages: int = 2
    dq: int = 64
    dkv: int = 64
    backward_stages: int = 2

    def __post_init__(self):
        if any(size not in (64, 128) for size in (self.forward, self.dq, self.dkv)):
            raise ValueError(f"{self}: blocks must be 64 or 128")


def refusal(operation: str, q_BTNH: Array, k_BSKH: Array, v_BSKH: Array) -> str | None:
    """Why these kernels cannot take the arrays."""
    shapes = f"q {q_BTNH.shape} {q_BTNH.dtype}, k {k_BSKH.shape}"
    if q_BTNH.dtype != BF16 or q_BTNH.shape[-1] not in (64, 128):
        return f"{shapes} must be bfloat16, with heads 64 or 128 wide"
    idle = f"{shapes}: fewer than {ROWS} queries would leave the tensor cores idle"
    return idle if q_BTNH.shape[1] < ROWS else None


def attention(
    q_BTNH, k_BSKH, v_BSKH, q_positions_BT, k_positions_BS, q_segments_BT, k_segments_BS, q_prefixes_BT, scale,
    shared_KSH=None, config: Config = Config(),
) -> Array:  # fmt: skip
    if shared_KSH is not None:
        k_BSKH, v_BSKH, k_positions_BS, k_segments_BS, q_segments_BT, q_prefixes_BT = reference.joined(
            shared_KSH, k_BSKH, v_BSKH, k_positions_BS, q_segments_BT, k_segments_BS
        )
    q_prefixes_BT = q_segments_BT if q_prefixes_BT is None else q_prefixes_BT
    T = q_BTNH.shape[1]
    q_at_BPT = _pad(jnp.stack([q_positions_BT, q_segments_BT, q_prefixes_BT], 1).astype(jnp.int32), 2)
    sees_nothing_BT = q_at_BPT[:, 1] == 0  # padding, which no mask need ask for
    q_at_BPT = q_at_BPT.at[:, 0].set(jnp.where(sees_nothing_BT, -NEVER, q_at_BPT[:, 0]))
    k_at_BPS = _pad(jnp.stack([k_positions_BS, k_segments_BS], 1).astype(jnp.int32), 2)
    q_BTNH, k_BSKH, v_BSKH = (_pad(z, 1) for z in (q_BTNH, k_BSKH, v_BSKH))
    y_BTNH: Array = _attention(q_BTNH, k_BSKH, v_BSKH, q_at_BPT, k_at_BPS, scale, config)
    return y_BTNH[:, :T]


def _pad(z: Array, dim: int) -> Array:
    """Zeros, which in segments are padding, up to whole tiles."""
    missing = -z.shape[dim] % TILE
    return jnp.pad(z, [(0, missing if d == dim else 0) for d in range(z.ndim)]) if missing else z


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(q_BTNH, k_BSKH, v_BSKH, q_at_BPT, k_at_BPS, scale, config) -> Array:
    return _forward(q_BTNH, k_BSKH, v_BSKH, q_at_BPT, k_at_BPS, scale, config)[0]


def _attention_fwd(q_BTNH, k_BSKH, v_BSKH, q_at_BPT, k_at_BPS, scale, config):
    results = _forward(q_BTNH, k_BSKH, v_BSKH, q_at_BPT, k_at_BPS, scale, config)
    y_BTNH, lse_BNT = map(checkpoint_name, results, ("attention_out", "attention_lse"))
    return y_BTNH, (q_BTNH, k_BSKH, v_BSKH, q_at_BPT, k_at_BPS, y_BTNH, lse_BNT)


def _attention_bwd(scale, config, saved, dy_BTNH):
    q_BTNH, k_BSKH, v_BSKH, q_at_BPT, k_at_BPS, y_BTNH, lse_BNT = saved
    delta_BNT = jnp.einsum("btnh,btnh->bnt", dy_BTNH, y_BTNH, preferred_element_type=F32)
    inputs = q_BTNH, k_BSKH, v_BSKH, dy_BTNH, jnp.stack([lse_BNT, delta_BNT], 2), q_at_BPT, k_at_BPS
    return _dq(*inputs, scale, config), *_dkv(*inputs, scale, config), None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _cost(q_BTNH: Array, k_BSKH: Array, products: int, arrays: int) -> pl.CostEstimate:
    """As if half of all pairs were visible."""
    (B, T, N, H), S = q_BTNH.shape, k_BSKH.shape[1]
    bytes_ = 2 * arrays * (q_BTNH.size + k_BSKH.size)
    return pl.CostEstimate(
        flops=products * B * N * T * S * H, bytes_accessed=bytes_, transcendentals=B * N * T * S // 2
    )


def _forward(q_BTNH, k_BSKH, v_BSKH, q_at_BPT, k_at_BPS, scale, config) -> tuple[Array, Array]:
    """The result, and each query's log2 of its sum of exponentials: +inf where nothing is visible."""
    (B, T, N, H), S = q_BTNH.shape, k_BSKH.shape[1]
    block, stages = config.forward, min(config.forward_stages, S // config.forward)
    kernel = hopper.kernel(
        partial(_forward_kernel, scale=scale * LOG2_E, stages=stages),
        (result_like(q_BTNH, q_BTNH.shape, BF16), result_like(q_BTNH, (B, N, T), F32)),
        [
            hopper.swizzled(CONSUMERS, ROWS, H),
            plgpu.SMEM((CONSUMERS, 3, ROWS), jnp.int32),
            plgpu.SMEM((CONSUMERS, ROWS), F32),
            hopper.swizzled(stages, block, H),
            hopper.swizzled(stages, block, H),
            plgpu.SMEM((stages, 2, block), jnp.int32),
            plgpu.Barrier(num_arrivals=2, num_barriers=CONSUMERS),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
            plgpu.Barrier(num_arrivals=CONSUMERS),
        ],
        grid={"head": N, "tile": T // TILE, "row": B},
        name="attention",
        cost=_cost(q_BTNH, k_BSKH, products=2, arrays=2),
    )
    lists = block_lists(q_at_BPT, k_at_BPS, TILE, block, of_keys=False)
    return kernel(*lists, q_at_BPT, k_at_BPS, q_BTNH, k_BSKH, v_BSKH)


def _forward_kernel(  # noqa: PLR0915 (three warpgroups)
    blocks_BIP, counts_BIC, q_at_BPT, k_at_BPS, q_BTNH, k_BSKH, v_BSKH, y_BTNH, lse_BNT,
    q_smem, q_at_smem, lse_smem, k_smem, v_smem, k_at_smem, q_full, k_full, v_full, k_empty, v_empty, turn,
    *, scale: float, stages: int,
):  # fmt: skip
    head, row, warpgroup = (lax.axis_index(name) for name in ("head", "row", "warpgroup"))
    tile = q_BTNH.shape[1] // TILE - 1 - lax.axis_index("tile")  # those that see most come first
    H, block, of_head = q_BTNH.shape[3], k_smem.shape[1], head // (q_BTNH.shape[2] // k_BSKH.shape[2])

    def load(step, _):
        slot, keys = hopper.slot(step, stages), pl.ds(blocks_BIP[row, tile, step] * block, block)
        pl.when(step >= stages)(lambda: plgpu.barrier_wait(k_empty.at[slot]))
        plgpu.copy_gmem_to_smem(k_BSKH.at[row, keys, of_head], k_smem.at[slot], k_full.at[slot])
        plgpu.copy_gmem_to_smem(k_at_BPS.at[row, :, keys], k_at_smem.at[slot], k_full.at[slot])
        pl.when(step >= stages)(lambda: plgpu.barrier_wait(v_empty.at[slot]))
        plgpu.copy_gmem_to_smem(v_BSKH.at[row, keys, of_head], v_smem.at[slot], v_full.at[slot])

    def attend(step, carry, masked: bool):
        y_iH, top_i, sum_i = carry
        slot = hopper.slot(step, stages)
        plgpu.barrier_wait(k_full.at[slot])
        queries_and_keys = (q_smem.at[warpgroup], _transposed(k_smem.at[slot]))
        (score_ij,) = _products(queries_and_keys, then=partial(_take_turns, turn))
        if masked:
            q_at = _places(q_at_smem.at[warpgroup], 3, OF_ROWS)
            see_ij = _visible(q_at, _places(k_at_smem.at[slot], 2, OF_COLUMNS), score_ij.shape)
            score_ij = jnp.where(see_ij, score_ij, -jnp.inf)
        plgpu.barrier_arrive(k_empty.at[slot])
        new_i = jnp.maximum(top_i, score_ij.max(1) * scale)
        p_ij = jnp.exp2(score_ij * scale - _down(new_i, score_ij.shape))
        shrink_i = jnp.exp2(top_i - new_i)
        sum_i = sum_i * shrink_i + p_ij.sum(1)
        p_ij = p_ij.astype(BF16)
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(v_full.at[slot])
        plgpu.barrier_wait(turn)
        (more_iH,) = _products((p_ij, v_smem.at[slot]))
        y_iH = y_iH * _down(shrink_i, y_iH.shape) + more_iH
        plgpu.barrier_arrive(v_empty.at[slot])
        return y_iH, new_i, sum_i

    def loader():
        visited = counts_BIC[row, tile, 1]
        lax.fori_loop(0, visited, load, None)
        hopper.drain((k_empty, v_empty), visited, stages)

    def consumer():
        unmasked, visited = counts_BIC[row, tile, 0], counts_BIC[row, tile, 1]
        queries = pl.ds(tile * TILE + warpgroup * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(q_BTNH.at[row, queries, head], q_smem.at[warpgroup], q_full.at[warpgroup])
        plgpu.copy_gmem_to_smem(q_at_BPT.at[row, :, queries], q_at_smem.at[warpgroup], q_full.at[warpgroup])
        plgpu.barrier_wait(q_full.at[warpgroup])
        carry = _filled((ROWS, H), 0), _filled((ROWS,), LOWEST), _filled((ROWS,), 0)
        pl.when(warpgroup == 1)(lambda: _take_turns(turn))
        carry = lax.fori_loop(0, unmasked, partial(attend, masked=False), carry)
        y_iH, top_i, sum_i = lax.fori_loop(0, visited - unmasked, _masked(attend, unmasked), carry)
        pl.when(warpgroup == 0)(lambda: _take_turns(turn))
        sees_i = sum_i > 0
        y_iH /= _down(jnp.where(sees_i, sum_i, 1.0), y_iH.shape)
        q_smem[warpgroup] = y_iH.astype(BF16)
        lse_smem[warpgroup] = jnp.where(sees_i, top_i + jnp.log(sum_i) * LOG2_E, jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem.at[warpgroup], y_BTNH.at[row, queries, head])
        plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], lse_BNT.at[row, head, queries])
        plgpu.wait_smem_to_gmem(0)

    hopper.roles(loader, consumer)


def _dq(q_BTNH, k_BSKH, v_BSKH, dy_BTNH, stats_BNPT, q_at_BPT, k_at_BPS, scale, config) -> Array:
    """`stats` are the queries' lse and delta, the sum of dy * y."""
    (B, T, N, H), S = q_BTNH.shape, k_BSKH.shape[1]
    block, stages = config.dq, min(config.backward_stages, S // config.dq)
    kernel = hopper.kernel(
        partial(_dq_kernel, scale=scale, stages=stages),
        result_like(q_BTNH, q_BTNH.shape, BF16),
        [
            hopper.swizzled(CONSUMERS, ROWS, H),
            hopper.swizzled(CONSUMERS, ROWS, H),
            plgpu.SMEM((CONSUMERS, 2, ROWS), F32),
            plgpu.SMEM((CONSUMERS, 3, ROWS), jnp.int32),
            hopper.swizzled(stages, block, H),
            hopper.swizzled(stages, block, H),
            plgpu.SMEM((stages, 2, block), jnp.int32),
            plgpu.Barrier(num_arrivals=4, num_barriers=CONSUMERS),
            plgpu.Barrier(num_arrivals=3, num_barriers=stages),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
        ],
        grid={"head": N, "tile": T // TILE, "row": B},
        name="attention_dq",
        cost=_cost(q_BTNH, k_BSKH, products=3, arrays=3),
    )
    lists = block_lists(q_at_BPT, k_at_BPS, TILE, block, of_keys=False)
    return kernel(*lists, q_at_BPT, k_at_BPS, stats_BNPT, q_BTNH, k_BSKH, v_BSKH, dy_BTNH)


def _dq_kernel(
    blocks_BIP, counts_BIC, q_at_BPT, k_at_BPS, stats_BNPT, q_BTNH, k_BSKH, v_BSKH, dy_BTNH, dq_BTNH,
    q_smem, dy_smem, stats_smem, q_at_smem, k_smem, v_smem, k_at_smem, own_full, full, empty,
    *, scale: float, stages: int,
):  # fmt: skip
    head, row, warpgroup = (lax.axis_index(name) for name in ("head", "row", "warpgroup"))
    tile = q_BTNH.shape[1] // TILE - 1 - lax.axis_index("tile")
    H, block, of_head = q_BTNH.shape[3], k_smem.shape[1], head // (q_BTNH.shape[2] // k_BSKH.shape[2])

    def load(step, _):
        slot, keys = hopper.slot(step, stages), pl.ds(blocks_BIP[row, tile, step] * block, block)
        pl.when(step >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
        plgpu.copy_gmem_to_smem(k_BSKH.at[row, keys, of_head], k_smem.at[slot], full.at[slot])
        plgpu.copy_gmem_to_smem(v_BSKH.at[row, keys, of_head], v_smem.at[slot], full.at[slot])
        plgpu.copy_gmem_to_smem(k_at_BPS.at[row, :, keys], k_at_smem.at[slot], full.at[slot])

    def differentiate(dq_iH, stats, step, _, masked: bool):
        slot, (lse_i, delta_i) = hopper.slot(step, stages), stats
        plgpu.barrier_wait(full.at[slot])
        score_ij, dp_ij = _products(
            (q_smem.at[warpgroup], _transposed(k_smem.at[slot])), (dy_smem.at[warpgroup], _transposed(v_smem.at[slot]))
        )
        if masked:
            q_at = _places(q_at_smem.at[warpgroup], 3, OF_ROWS)
            see_ij = _visible(q_at, _places(k_at_smem.at[slot], 2, OF_COLUMNS), score_ij.shape)
            score_ij = jnp.where(see_ij, score_ij, -jnp.inf)
        p_ij = jnp.exp2(score_ij * (scale * LOG2_E) - _down(lse_i, score_ij.shape))
        ds_ij = p_ij * (dp_ij - _down(delta_i, p_ij.shape))
        plgpu.wgmma(dq_iH, ds_ij.astype(BF16), k_smem.at[slot])
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(empty.at[slot])

    def loader():
        visited = counts_BIC[row, tile, 1]
        lax.fori_loop(0, visited, load, None)
        hopper.drain((empty,), visited, stages)

    def consumer():
        unmasked, visited = counts_BIC[row, tile, 0], counts_BIC[row, tile, 1]
        queries, ready = pl.ds(tile * TILE + warpgroup * ROWS, ROWS), own_full.at[warpgroup]
        plgpu.copy_gmem_to_smem(q_BTNH.at[row, queries, head], q_smem.at[warpgroup], ready)
        plgpu.copy_gmem_to_smem(dy_BTNH.at[row, queries, head], dy_smem.at[warpgroup], ready)
        plgpu.copy_gmem_to_smem(stats_BNPT.at[row, head, :, queries], stats_smem.at[warpgroup], ready)
        plgpu.copy_gmem_to_smem(q_at_BPT.at[row, :, queries], q_at_smem.at[warpgroup], ready)
        plgpu.barrier_wait(ready)
        stats = _places(stats_smem.at[warpgroup], 2, OF_ROWS)

        def sums(dq_iH):
            block_of = partial(differentiate, dq_iH, stats)
            lax.fori_loop(0, unmasked, partial(block_of, masked=False), None)
            lax.fori_loop(0, visited - unmasked, _masked(block_of, unmasked), None)
            return dq_iH[...]

        dq_iH = pl.run_scoped(sums, plgpu.WGMMAAccumulatorRef((ROWS, H)))
        q_smem[warpgroup] = (dq_iH * scale).astype(BF16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem.at[warpgroup], dq_BTNH.at[row, queries, head])
        plgpu.wait_smem_to_gmem(0)

    hopper.roles(loader, consumer)


def _dkv(q_BTNH, k_BSKH, v_BSKH, dy_BTNH, stats_BNPT, q_at_BPT, k_at_BPS, scale, config) -> tuple[Array, Array]:
    (B, T, _, H), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
    block, stages = config.dkv, min(config.backward_stages, T // config.dkv)
    result = result_like(k_BSKH, k_BSKH.shape, BF16)
    kernel = hopper.kernel(
        partial(_dkv_kernel, scale=scale, stages=stages),
        (result, result),
        [
            hopper.swizzled(CONSUMERS, ROWS, H),
            hopper.swizzled(CONSUMERS, ROWS, H),
            plgpu.SMEM((CONSUMERS, 2, ROWS), jnp.int32),
            hopper.swizzled(stages, block, H),
            hopper.swizzled(stages, block, H),
            plgpu.SMEM((stages, 2, block), F32),
            plgpu.SMEM((stages, 3, block), jnp.int32),
            plgpu.Barrier(num_arrivals=3, num_barriers=CONSUMERS),
            plgpu.Barrier(num_arrivals=4, num_barriers=stages),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
        ],
        grid={"head": K, "tile": S // TILE, "row": B},
        name="attention_dkv",
        cost=_cost(q_BTNH, k_BSKH, products=4, arrays=3),
    )
    lists = block_lists(q_at_BPT, k_at_BPS, block, TILE, of_keys=True)
    return kernel(*lists, q_at_BPT, k_at_BPS, stats_BNPT, q_BTNH, k_BSKH, v_BSKH, dy_BTNH)


def _dkv_kernel(  # noqa: PLR0915 (three warpgroups)
    blocks_BIP, counts_BIC, q_at_BPT, k_at_BPS, stats_BNPT, q_BTNH, k_BSKH, v_BSKH, dy_BTNH, dk_BSKH, dv_BSKH,
    k_smem, v_smem, k_at_smem, q_smem, dy_smem, stats_smem, q_at_smem, own_full, full, empty,
    *, scale: float, stages: int,
):  # fmt: skip
    def indices():
        return (lax.axis_index(name) for name in ("head", "tile", "row", "warpgroup"))

    head, tile, row, warpgroup = indices()
    H, block, group = q_BTNH.shape[3], q_smem.shape[1], jnp.int32(q_BTNH.shape[2] // k_BSKH.shape[2])

    def load(step, _):
        slot, of_head = hopper.slot(step, stages), head * group + lax.rem(step, group)
        queries = pl.ds(blocks_BIP[row, tile, lax.div(step, group)] * block, block)
        pl.when(step >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
        plgpu.copy_gmem_to_smem(q_BTNH.at[row, queries, of_head], q_smem.at[slot], full.at[slot])
        plgpu.copy_gmem_to_smem(dy_BTNH.at[row, queries, of_head], dy_smem.at[slot], full.at[slot])
        plgpu.copy_gmem_to_smem(stats_BNPT.at[row, of_head, :, queries], stats_smem.at[slot], full.at[slot])
        plgpu.copy_gmem_to_smem(q_at_BPT.at[row, :, queries], q_at_smem.at[slot], full.at[slot])

    def differentiate(dk_iH, dv_iH, step, _, masked: bool):
        slot = hopper.slot(step, stages)
        plgpu.barrier_wait(full.at[slot])
        score_ij, dp_ij = _products(
            (k_smem.at[warpgroup], _transposed(q_smem.at[slot])), (v_smem.at[warpgroup], _transposed(dy_smem.at[slot]))
        )
        if masked:
            k_at = _places(k_at_smem.at[warpgroup], 2, OF_ROWS)
            see_ij = _visible(_places(q_at_smem.at[slot], 3, OF_COLUMNS), k_at, score_ij.shape, of_keys=True)
            score_ij = jnp.where(see_ij, score_ij, -jnp.inf)
        lse_j, delta_j = _places(stats_smem.at[slot], 2, OF_COLUMNS)
        p_ij = jnp.exp2(score_ij * (scale * LOG2_E) - _across(lse_j, score_ij.shape))
        ds_ij = p_ij * (dp_ij - _across(delta_j, p_ij.shape))
        plgpu.wgmma(dv_iH, p_ij.astype(BF16), dy_smem.at[slot])
        plgpu.wgmma(dk_iH, ds_ij.astype(BF16), q_smem.at[slot])
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(empty.at[slot])

    def loader():
        visited = counts_BIC[row, tile, 1] * group
        lax.fori_loop(0, visited, load, None)
        hopper.drain((empty,), visited, stages)

    def consumer():
        unmasked, visited = counts_BIC[row, tile, 0] * group, counts_BIC[row, tile, 1] * group
        keys, ready = pl.ds(tile * TILE + warpgroup * ROWS, ROWS), own_full.at[warpgroup]
        plgpu.copy_gmem_to_smem(k_BSKH.at[row, keys, head], k_smem.at[warpgroup], ready)
        plgpu.copy_gmem_to_smem(v_BSKH.at[row, keys, head], v_smem.at[warpgroup], ready)
        plgpu.copy_gmem_to_smem(k_at_BPS.at[row, :, keys], k_at_smem.at[warpgroup], ready)
        plgpu.barrier_wait(ready)

        def sums(dk_iH, dv_iH):
            block_of = partial(differentiate, dk_iH, dv_iH)
            lax.fori_loop(0, unmasked, partial(block_of, masked=False), None)
            lax.fori_loop(0, visited - unmasked, _masked(block_of, unmasked), None)
            return dk_iH[...], dv_iH[...]

        write(*pl.run_scoped(sums, *2 * (plgpu.WGMMAAccumulatorRef((ROWS, H)),)))

    def write(dk_iH, dv_iH):
        head, tile, row, warpgroup = indices()  # anew: held over the loops, they cost registers that are not there
        keys = pl.ds(tile * TILE + warpgroup * ROWS, ROWS)
        k_smem[warpgroup] = (dk_iH * scale).astype(BF16)
        v_smem[warpgroup] = dv_iH.astype(BF16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_smem.at[warpgroup], dk_BSKH.at[row, keys, head])
        plgpu.copy_smem_to_gmem(v_smem.at[warpgroup], dv_BSKH.at[row, keys, head])
        plgpu.wait_smem_to_gmem(0)

    hopper.roles(loader, consumer)


def _products(*factors, then=lambda: None) -> tuple[Array, ...]:
    """Of pairs, the first in registers or shared memory; `then` happens while the tensor cores are at it."""

    def products(*sums):
        for (a, b_smem), sum_ij in zip(factors, sums, strict=True):
            plgpu.wgmma(sum_ij, a, b_smem)
        then()
        return tuple(sum_ij[...] for sum_ij in sums)

    return pl.run_scoped(products, *(plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[1])) for a, b in factors))


def _take_turns(turn) -> None:
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(turn)


def _transposed(tile_smem):
    return plgpu.transpose_ref(tile_smem, (1, 0))


def _filled(shape: tuple[int, ...], value: float) -> Array:
    return plgpu.layout_cast(jnp.full(shape, value, F32), plgpu.Layout.WGMMA if len(shape) == 2 else OF_ROWS)


def _masked(block, unmasked: Array):
    """The body of the second loop, which begins at 0 too: under shard_map a loop's first step may not vary over the mesh."""
    return lambda step, carry: block(unmasked + step, carry, masked=True)


def _places(at_smem, count: int, layout) -> tuple[Array, ...]:
    """Rows of positions, segments and, of queries, prefixes."""
    return tuple(plgpu.layout_cast(at_smem[p], layout) for p in range(count))


def _down(z_i: Array, shape: tuple[int, ...]) -> Array:
    return lax.broadcast_in_dim(z_i, shape, (0,))


def _across(z_j: Array, shape: tuple[int, ...]) -> Array:
    return lax.broadcast_in_dim(z_j, shape, (1,))


def _visible(q_at, k_at, shape: tuple[int, ...], of_keys: bool = False) -> Array:
    """As `reference.visible_BTS` but for padding, with queries down and keys across, or the other way round."""
    q_down, k_down = (_across, _down) if of_keys else (_down, _across)
    q_position, q_segment, q_prefix = (q_down(z, shape) for z in q_at)
    k_position, k_segment = (k_down(z, shape) for z in k_at)
    return (k_position <= q_position) & ((k_segment == q_segment) | (k_segment == q_prefix))
