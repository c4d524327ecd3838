"""Grouped matmul for TPU (Mosaic): one pass over the tiles of rows, and at each the matrix of the group whose rows it holds.

`gmm` and `gmm_t` keep a group's whole matrix (or half of it, where two cores share a chip) in the fast memory while they
walk its rows, so that each weight and each row is read once; `gmm_t` hands the matrix to the matmul units transposed.
`tgmm` adds up a group's product in float32 in the block that is written out when the group ends, or is added then to sums that
the caller has, in their own memory.
A visit's product is taken in steps whose partial sums fit the registers, or stay in the fast memory: see `Config`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, partial, reduce
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.choose import platform
from pallas_kernels.grouped_matmul.visits import visits
from pallas_kernels.results import result_like

F32 = jnp.float32
DEVICES = ("TPU v5", "TPU v6", "TPU7")  # older ones have less fast memory
LANES, SUBLANES = 128, 16  # a tile of the smallest type here: 16 rows of 128 bfloat16
TUNED = Path(__file__).parent / "tuned"
Meanwhile = Callable[[int | Array, int], None]
NN, NT, TN = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))


@dataclass(frozen=True)
class Config:
    """How a visit's product [tile, depth] x [depth, columns] is cut up into products that leave nothing to spill.

    A product takes `row_step` rows and `column_step` columns. Without `depth_step` it takes the whole depth, and its partial
    sums live in registers and the matrix units; with it, that much of the depth, and they live in an accumulator in the fast
    memory. `tgmm` multiplies `row_step` columns of x by all of y.
    `work` is how many multiply-adds a loop's iteration should have, to outweigh the some 250 cycles that filling and
    draining the matrix units takes: as many products are unrolled into it.
    """

    tile: int = 256  # rows of x in a visit: a group's last and first take a whole one
    row_step: int = 256
    column_step: int = 128
    depth_step: int | None = None
    work: int = 0


@dataclass(frozen=True)
class Chip:
    """What the kernels ask of a chip. The default fits any TPU from v5e on, if not as fast as its own."""

    cores: int = 1  # that share one device, and a grid's parallel dimension
    vmem_bytes: int = 64 << 20
    gmm: Config = Config()
    gmm_t: Config = Config()
    tgmm: Config = Config(tile=512, row_step=128, work=1 << 28)  # half of it spills on v6e and tpu7x


def chip() -> Chip:
    """That of the mesh in context; without one, the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return Chip() if device is None else _tuned(device.device_kind, device.num_cores or 1)


@cache
def _tuned(kind: str, cores: int) -> Chip:
    file = TUNED / f"{kind.lower().replace(' ', '_')}.json"
    if not file.exists():
        return Chip(cores=cores)
    told = json.loads(file.read_text())
    configs = {f.name: Config(**told[f.name]["config"]) for f in fields(Chip) if f.name in told and f.type is Config}
    return Chip(cores=cores, vmem_bytes=told["vmem_mib"] << 20, **configs)


def refusal(operation: str, *arrays: Array) -> str | None:
    x, other = arrays[:2]
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"{x.dtype} is neither bfloat16 nor float32"
    if not x.shape[0]:
        return f"x {x.shape} has no rows"
    widths = {*x.shape[1:], *other.shape[1:]}
    if any(width % LANES for width in widths):
        return f"shapes {x.shape} and {other.shape}: widths must be multiples of {LANES}"
    needed, vmem = 2 * (chip().tgmm.tile + LANES) * max(widths) * x.dtype.itemsize, chip().vmem_bytes
    if needed > vmem * 3 // 4:
        return (
            f"shapes {x.shape} and {other.shape}: a tile of rows would take {needed:,} of {vmem:,} bytes of fast memory"
        )
    return None


def gmm(x_RD: Array, w_EDM: Array, group_sizes_E: Array) -> Array:
    return _grouped(x_RD, w_EDM, group_sizes_E, chip().gmm, NN)


def gmm_t(x_RM: Array, w_EDM: Array, group_sizes_E: Array) -> Array:
    return _grouped(x_RM, w_EDM, group_sizes_E, chip().gmm_t, NT)


def tgmm(x_RD: Array, y_RM: Array, group_sizes_E: Array, sums_EDM: Array | None = None) -> Array:
    (rows, D), M, E, here = x_RD.shape, y_RM.shape[1], group_sizes_E.shape[0], chip()
    config, tile = here.tgmm, tile_rows(rows, here.tgmm)
    dtype = jnp.dtype(F32) if sums_EDM is None else sums_EDM.dtype
    # of a column in float32 two blocks; to add to sums, one, and two of the sums on their way in and out each
    width = block_width(D, 4 * M if sums_EDM is None else (2 + 2 * dtype.itemsize) * M, here)
    walk = visits(group_sizes_E, rows, tile, tail=False)
    sums = pl.BlockSpec((1, width, M), lambda d, v, bound, group, at: (group[v], d, 0))
    inputs = (x_RD, y_RM) if sums_EDM is None else (x_RD, y_RM, sums_EDM)
    return pl.pallas_call(
        partial(_tgmm_kernel if sums_EDM is None else _tgmm_to_sums_kernel, config=config),
        name="tgmm",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(pl.cdiv(D, width), walk.count),
            in_specs=[
                pl.BlockSpec((tile, width), lambda d, v, bound, group, at: (at[v], d)),
                pl.BlockSpec((tile, M), lambda d, v, bound, group, at: (at[v], 0)),
                *[sums] * (len(inputs) - 2),
            ],
            out_specs=sums,
            scratch_shapes=[pltpu.VMEM((tile, width), x_RD.dtype), pltpu.VMEM((tile, M), y_RM.dtype)]
            + ([] if sums_EDM is None else [pltpu.VMEM((1, width, M), F32)]),
        ),
        out_shape=result_like(x_RD, (E, D, M), dtype),
        input_output_aliases={} if sums_EDM is None else in_place({5: 0}, (D, width)),
        compiler_params=parameters(here),
        cost_estimate=cost(rows, D, M, inputs, dtype.itemsize * E * D * M),
        interpret=interpret(),
    )(walk.bound_G, walk.group_W, walk.tile_W, *inputs)


def _grouped(x_RK: Array, w: Array, group_sizes_E: Array, config: Config, contract) -> Array:
    """Rows of x times their group's matrix, which is [E,K,N] or, with NT, [E,N,K]."""
    (rows, K), E, here = x_RK.shape, w.shape[0], chip()
    N = w.shape[2] if contract == NN else w.shape[1]
    tile, width = tile_rows(rows, config), block_width(N, K * w.dtype.itemsize, here)
    walk = visits(group_sizes_E, rows, tile, tail=True)
    w_block = (1, K, width) if contract == NN else (1, width, K)

    def w_at(n, v, bound, group, at, source, matrix):
        return (matrix[v], 0, n) if contract == NN else (matrix[v], n, 0)

    return pl.pallas_call(
        partial(_gmm_kernel, config=config, contract=contract, groups=E),
        name="gmm" if contract == NN else "gmm_t",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(pl.cdiv(N, width), walk.count),
            in_specs=[
                pl.BlockSpec((tile, K), lambda n, v, bound, group, at, source, matrix: (source[v], 0)),
                pl.BlockSpec(w_block, w_at),
            ],
            out_specs=pl.BlockSpec((tile, width), lambda n, v, bound, group, at, source, matrix: (at[v], n)),
            scratch_shapes=[pltpu.VMEM((tile, width), x_RK.dtype)]
            + ([pltpu.VMEM((tile, width), F32)] if config.depth_step else []),
        ),
        out_shape=result_like(x_RK, (rows, N), x_RK.dtype),
        compiler_params=parameters(here),
        cost_estimate=cost(rows, K, N, (x_RK, w), rows * N * x_RK.dtype.itemsize),
        interpret=interpret(),
    )(*walk[:5], x_RK, w)


def _gmm_kernel(
    bound_G, group_W, tile_W, _, __, x_ref, w_ref, y_ref, others_ref, *accumulator, config, contract, groups
):
    visit, tile = pl.program_id(1), y_ref.shape[0]
    group, first_row = group_W[visit], tile_W[visit] * tile
    whole = (bound_G[group] <= first_row) & (first_row + tile <= bound_G[group + 1])

    def keep_mine(new_ref, old_ref, rows: pl.Slice):
        mine = is_mine(bound_G, group, first_row + rows.start, SUBLANES)
        new = 0 if new_ref is None else new_ref[rows, :]
        y_ref[rows, :] = jnp.where(mine, new, old_ref[rows, :])

    @pl.when(group == groups)
    def _():  # the tail
        in_steps(0, tile, SUBLANES, 1, partial(keep_mine, None, y_ref))

    @pl.when((group < groups) & ~whole)
    def _():  # what the visits before have written
        others_ref[...] = y_ref[...]

    @pl.when(group < groups)
    def _():
        multiply(((x_ref, w_ref.at[0]),), y_ref, config, contract, *accumulator)

    @pl.when((group < groups) & ~whole)
    def _():
        in_steps(0, tile, SUBLANES, 1, partial(keep_mine, y_ref, others_ref))


def multiply(pairs, y_ref, config: Config, contract, *accumulator, meanwhile: Meanwhile | None = None) -> None:
    """y = the sum of x times w over the pairs (x_ref, w_ref) of one shape, cut up as `config` says.

    `meanwhile(part, parts)` is called in each of the loops' iterations, `parts` in all for a pair: what it does takes turns with products.
    """
    by = _by_depth if config.depth_step else _by_columns
    by(pairs, y_ref, config, contract, *accumulator, meanwhile=meanwhile)


def _by_columns(pairs, y_ref, config: Config, contract, *, meanwhile) -> None:
    """Products over the whole depth. Weights are read anew for each: held, they would be spilled."""
    (tile, depth), step = pairs[0][0].shape, config.row_step

    def product(columns: pl.Slice, rows: pl.Slice):
        weights = ((x, w[:, columns] if contract == NN else w[columns, :]) for x, w in pairs)
        y_ref[rows, columns] = reduce(jnp.add, (dot(x[rows, :], w, contract) for x, w in weights)).astype(y_ref.dtype)

    def through(columns: pl.Slice):
        unroll = config.work // (step * depth * config.column_step * len(pairs))
        in_steps(0, tile, step, unroll, partial(product, columns), _in_columns(meanwhile, columns, y_ref, config))

    in_steps(0, y_ref.shape[1], config.column_step, 1, through)


def _by_depth(pairs, y_ref, config: Config, contract, accumulator, *, meanwhile) -> None:
    """Adding up over the depth. Loops of their own keep the accumulator out of registers."""
    (tile, depth), step = pairs[0][0].shape, config.depth_step or pairs[0][0].shape[1]

    def add(x_ref, w_ref, columns: pl.Slice, k: pl.Slice):
        for start in range(0, tile, config.row_step):
            rows = pl.ds(start, min(config.row_step, tile - start))
            w = w_ref[k, columns] if contract == NN else w_ref[columns, k]
            accumulator[rows, columns] += dot(x_ref[rows, k], w, contract)

    def through(columns: pl.Slice):
        unroll = config.work // (tile * step * columns.size)
        beside = _in_columns(meanwhile, columns, y_ref, config)
        for x_ref, w_ref in pairs:
            in_steps(0, depth, step, unroll, partial(add, x_ref, w_ref, columns), beside)

    def write(rows: pl.Slice):
        y_ref[rows, :] = accumulator[rows, :].astype(y_ref.dtype)

    accumulator[...] = jnp.zeros_like(accumulator)
    in_steps(0, y_ref.shape[1], config.column_step, 1, through)
    in_steps(0, tile, SUBLANES, 1, write)


def _in_columns(meanwhile: Meanwhile | None, columns: pl.Slice, y_ref, config: Config) -> Meanwhile | None:
    """Of all columns' iterations those of these columns."""
    if meanwhile is None:
        return None
    steps, here = pl.cdiv(y_ref.shape[1], config.column_step), columns.start // config.column_step
    return lambda i, rounds: meanwhile(here * rounds + i, steps * rounds)


def _tgmm_kernel(bound_G, group_W, tile_W, x_ref, y_ref, sum_ref, x_scratch, y_scratch, *, config):
    visit = pl.program_id(1)
    group, (tile, width) = group_W[visit], x_ref.shape
    first_row, start, stop = tile_W[visit] * tile, bound_G[group], bound_G[group + 1]
    whole = (start <= first_row) & (first_row + tile <= stop)

    @pl.when((visit == 0) | (group != group_W[jnp.maximum(visit - 1, 0)]))
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def accumulate(x_ref, y_ref):
        def add(columns: pl.Slice):
            sum_ref[0, columns, :] += dot(x_ref[:, columns], y_ref[...], TN)

        in_steps(0, width, config.row_step, config.work // (config.row_step * y_ref.size), add)

    @pl.when(whole)
    def _():
        accumulate(x_ref, y_ref)

    @pl.when(~whole & (start < stop))
    def _():  # others' rows become zero on both sides: zero times NaN is NaN
        keep = is_mine(bound_G, group, first_row, tile)
        x_scratch[...] = jnp.where(keep, x_ref[...], 0)
        y_scratch[...] = jnp.where(keep, y_ref[...], 0)
        accumulate(x_scratch, y_scratch)


def _tgmm_to_sums_kernel(
    bound_G, group_W, tile_W, x_ref, y_ref, old_ref, sums_ref, x_scratch, y_scratch, product_ref, *, config
):
    visit, last = pl.program_id(1), pl.num_programs(1) - 1
    _tgmm_kernel(bound_G, group_W, tile_W, x_ref, y_ref, product_ref, x_scratch, y_scratch, config=config)

    @pl.when((visit == last) | (group_W[visit] != group_W[jnp.minimum(visit + 1, last)]))
    def _():
        def add(rows: pl.Slice):
            sums_ref[0, rows, :] = (old_ref[0, rows, :].astype(F32) + product_ref[0, rows, :]).astype(sums_ref.dtype)

        in_steps(0, sums_ref.shape[1], SUBLANES, 1, add)


def is_mine(bound_G, group: Array, first_row: Array, rows: int) -> Array:
    """[rows,1]: which of the rows from `first_row` on are the group's."""
    row = first_row + lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    return (row >= bound_G[group]) & (row < bound_G[group + 1])


def dot(a: Array, b: Array, contract) -> Array:
    precision = lax.Precision.HIGHEST if a.dtype == F32 else None  # else the matrix units round to bfloat16
    return lax.dot_general(a, b, contract, precision=precision, preferred_element_type=F32)


def in_steps(start: int, stop: int, step: int, unroll: int, body: Callable, beside: Meanwhile | None = None) -> None:
    """`body(slice)` from start to stop: `unroll` steps or somewhat more to a loop's iteration; what is left over without a loop.
    `beside(i, rounds)` is called once in each iteration, also of what needs no loop."""
    steps = (stop - start) // step
    rounds = max(1, steps // max(1, unroll))
    each = steps // rounds
    if rounds > 1:

        @pl.loop(0, rounds)
        def _(i):
            if beside is not None:
                beside(i, rounds)
            for j in range(each):
                body(pl.ds(start + (i * each + j) * step, step))

        start += rounds * each * step
    elif beside is not None:
        beside(0, 1)
    for at in range(start, stop, step):
        body(pl.ds(at, min(step, stop - at)))


def tile_rows(rows: int, config: Config) -> int:
    return min(config.tile, pl.cdiv(rows, SUBLANES) * SUBLANES)


def block_width(columns: int, column_bytes: int, here: Chip) -> int:
    """Columns of a block that takes up to half of the fast memory, fetched ahead included; equally many blocks for each core."""
    for blocks in range(here.cores, columns, here.cores):
        width = pl.cdiv(pl.cdiv(columns, blocks), LANES) * LANES
        if 2 * width * column_bytes <= here.vmem_bytes // 2:
            return width
    return LANES


def in_place(aliases: dict[int, int], *sizes_and_blocks: tuple[int, int]) -> dict[int, int]:
    """`aliases` where blocks divide the sizes: of others jax's interpreter pads the inputs, and then has an output of another shape."""
    return {} if any(size % block for size, block in sizes_and_blocks) else aliases


def parameters(here: Chip, bounds_checks: bool = True) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"),
        vmem_limit_bytes=here.vmem_bytes - (4 << 20),
        disable_bounds_checks=not bounds_checks,
    )


def cost(rows: int, depth: int, columns: int, read: tuple[Array, ...], written: int) -> pl.CostEstimate:
    return pl.CostEstimate(
        flops=2 * rows * depth * columns,
        bytes_accessed=sum(z.size * z.dtype.itemsize for z in read) + written,
        transcendentals=0,
    )


def interpret() -> pltpu.InterpretParams | bool:
    """On a CPU the chip is simulated."""
    return pltpu.InterpretParams() if platform() == "cpu" else False
