"""For TPUs, in Pallas: weights come from memory as they are, 8 bits each, and become bfloat16, exactly, where they are multiplied.

A product of 128 of the depth is scaled by its rows' and its columns' scales and added up in float32. Tiles of rows and visits to
groups are `pallas_kernels.grouped_matmul`'s; without groups all rows are one.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.choose import device_kind, platform
from pallas_kernels.fp8.blocks import BLOCK, Quantized
from pallas_kernels.grouped_matmul.visits import visits
from pallas_kernels.results import result_like

F32 = jnp.float32
DEVICES = ("TPU v5", "TPU v6", "TPU7")
TILE, SUBLANES = 256, 16  # rows of a visit, and of the smallest piece of them in bfloat16
VMEM_BYTES = 32 << 20
DEEPEST = 1 << 14  # whose rows fit it, too
ROW_STEP, COLUMN_STEP = 128, 256  # of a product
WEIGHT_BYTES = 4 << 20  # of a block, which is fetched while another is multiplied


def refusal(operation: str, x_XD: Array, w: Array) -> str | None:
    if x_XD.dtype not in (jnp.bfloat16, F32):
        return f"x is {x_XD.dtype}; rows are bfloat16 or float32"
    if not x_XD.shape[0]:
        return f"x {x_XD.shape} has no rows"
    if any(width % BLOCK for width in w.shape[-2:]):
        return f"w {w.shape} has widths that are no multiples of {BLOCK}"
    if w.shape[-2] > DEEPEST:
        return f"w {w.shape} is deeper than {DEEPEST}: a tile of rows would not fit the fast memory"
    return None


def matmul(x: Quantized, w: Quantized, dtype) -> Array:
    one = jax.tree.map(lambda z: z[None], w)
    return grouped_matmul(x, one, jnp.full(1, x.value.shape[0], jnp.int32), dtype)


def grouped_matmul(x: Quantized, w: Quantized, group_sizes_E: Array, dtype) -> Array:
    (rows, D), (E, _, M) = x.value.shape, w.value.shape
    tile = min(TILE, pl.cdiv(rows, SUBLANES) * SUBLANES)
    width = _width(D, M)
    walk = visits(group_sizes_E, rows, tile, tail=True)
    # A column's in its lane. A row of 128 lanes cannot be picked by a computed number among eight of a tile: each has a tile.
    scale_EC1M = jnp.repeat(w.scale, BLOCK, 2)[:, :, None]
    widen, ordered = (_widened, _even_first) if by_words() else (_converted, jnp.asarray)
    return pl.pallas_call(
        partial(_kernel, groups=E, widen=widen),
        name="fp8_matmul",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(pl.cdiv(M, width), walk.count),
            in_specs=[
                pl.BlockSpec((tile, D), lambda n, v, bound, group, at, source, matrix: (source[v], 0)),
                pl.BlockSpec((tile, D // BLOCK), lambda n, v, bound, group, at, source, matrix: (source[v], 0)),
                pl.BlockSpec((1, D, width), lambda n, v, bound, group, at, source, matrix: (matrix[v], 0, n)),
                pl.BlockSpec(
                    (1, D // BLOCK, 1, width), lambda n, v, bound, group, at, source, matrix: (matrix[v], 0, 0, n)
                ),
            ],
            out_specs=pl.BlockSpec((tile, width), lambda n, v, bound, group, at, source, matrix: (at[v], n)),
            scratch_shapes=[pltpu.VMEM((tile, width), F32)],
        ),
        out_shape=result_like(x.scale, (rows, M), dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * D * M,
            bytes_accessed=E * D * M + 2 * rows * D + rows * M * jnp.dtype(dtype).itemsize,
            transcendentals=0,
        ),
        interpret=pltpu.InterpretParams() if platform() == "cpu" else False,
    )(*walk[:5], ordered(x.value.astype(jnp.bfloat16)), x.scale, w.value, scale_EC1M)


def _even_first(x_XD: Array) -> Array:
    """The columns of each block in the order in which `_widened` leaves the weights' rows."""
    return x_XD.reshape(len(x_XD), -1, BLOCK // 2, 2).swapaxes(2, 3).reshape(x_XD.shape)


def _kernel(
    bound_G, group_W, tile_W, _, __, x_ref, x_scale_ref, w_ref, w_scale_ref, y_ref, sum_ref, *, groups, widen
):  # fmt: skip
    visit, (tile, blocks) = pl.program_id(1), x_scale_ref.shape
    group = group_W[visit]

    @pl.when(group < groups)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        pl.loop(0, blocks)(partial(_add_block, widen, x_ref, x_scale_ref, w_ref.at[0], w_scale_ref.at[0], sum_ref))

    row = tile_W[visit] * tile + lax.broadcasted_iota(jnp.int32, (tile, 1), 0)
    mine = (row >= bound_G[group]) & (row < bound_G[group + 1])
    new = jnp.where(group < groups, sum_ref[...], 0)
    y_ref[...] = jnp.where(mine, new.astype(y_ref.dtype), y_ref[...])


def _add_block(widen, x_ref, x_scale_ref, w_ref, w_scale_ref, sum_ref, b) -> None:
    """The product over the b-th 128 of the depth, in pieces whose sums fit the registers."""
    (tile, width), k = sum_ref.shape, pl.ds(b * BLOCK, BLOCK)
    for top in range(0, tile, ROW_STEP):
        count = min(ROW_STEP, tile - top)
        rows = pl.ds(top, count)
        lane = lax.broadcasted_iota(jnp.int32, (count, x_scale_ref.shape[1]), 1)
        x_scale = jnp.where(lane == b, x_scale_ref[rows, :], 0).sum(1, keepdims=True)
        for left in range(0, width, COLUMN_STEP):
            columns = pl.ds(left, min(COLUMN_STEP, width - left))
            product = jnp.dot(x_ref[rows, k], widen(w_ref[k, columns]), preferred_element_type=F32)
            sum_ref[rows, columns] += product * x_scale * w_scale_ref[b, :, columns]


def by_words() -> bool:
    """Whether weights are widened here. Bundles for 128 x 768 of them, the compiler's conversion and ours, 32 rows multiplied:
    v5p 258 and 330, v6e 246 and 161, tpu7x 97 and 153."""
    return "TPU v6" in device_kind()


def _converted(w: Array) -> Array:
    return w.astype(jnp.bfloat16)


def _widened(w: Array) -> Array:
    """e4m3 [128, C] as bfloat16, even rows first; four numbers to a word, and two of them in each step.

    The exponent gets bfloat16's bias. What had exponent 0 has no leading one, and has one now: it should be 2 v - 2^-6, which is
    less than v there and nowhere else. NaN's code would count 480; `fp8.quantize` says NaN in the scale as well.
    """
    word, halves = pltpu.bitcast(w, jnp.uint32), []
    for magnitude, sign in ((word << 4, word << 8), (word >> 4, word)):
        v = pltpu.bitcast((magnitude & jnp.uint32(0x07F007F0)) + jnp.uint32(0x3C003C00), jnp.bfloat16)
        v = jnp.minimum(v, v + v - jnp.bfloat16(2**-6))
        halves.append(pltpu.bitcast(pltpu.bitcast(v, jnp.uint32) | (sign & jnp.uint32(0x80008000)), jnp.bfloat16))
    return jnp.concatenate(halves)


def _width(depth: int, columns: int) -> int:
    """Columns of a block: the most that fit, in whole scales."""
    return min(columns, max(1, WEIGHT_BYTES // (depth * BLOCK)) * BLOCK)
