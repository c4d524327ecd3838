"""Grouped matmul for Hopper (sm_90a): bfloat16 in, float32 sums; one loading warpgroup feeds two that multiply.

The kernels are persistent: each multiprocessor's block walks over tiles of the result, and the loader is already filling
shared memory for the next tile while the last one is stored. Which rows a tile of `gmm` has is decided beforehand, in a
table (`tile_table`): a group's tiles begin at its first row, and its last one is moved back to end at its last row, so
that it writes some rows twice, with the same values, and never a neighbour's. Only a group smaller than a tile needs
care, and is stored by powers of two of its rows. The rows beyond all groups are one more group, whose sums have no terms.
In shapes i is a tile's rows, j its columns, d its depth.
"""

from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.hopper import CONSUMERS
from pallas_kernels.results import result_like

F32, BF16 = jnp.float32, jnp.bfloat16
DEVICES = ("H100", "H200", "H800", "H20")  # sm_90a
CHUNK = 64  # columns that are stored at once: 128 bytes of bfloat16, the width of a swizzled row
WIDTH = 128  # that all widths must be a multiple of


@dataclass(frozen=True)
class Config:
    """A tile of the result, and how far the loader runs ahead."""

    rows: int = 128
    columns: int = 256
    depth: int = 64
    stages: int = 4  # tiles of both factors in shared memory
    stores: int = 1  # pieces of the result in shared memory, for each consumer

    def __post_init__(self):
        if self.rows % (CONSUMERS * 64) or self.columns % CHUNK or self.columns > 256 or self.depth % 64:
            raise ValueError(
                f"{self}: rows must be a multiple of {CONSUMERS * 64}, columns of {CHUNK} up to 256, depth of 64"
            )

    @property
    def half(self) -> int:
        """Rows of one consumer."""
        return self.rows // CONSUMERS


def refusal(operation: str, x: Array, other: Array) -> str | None:
    """Why these kernels cannot take the arrays."""
    shapes = f"x {x.shape} {x.dtype} and {other.shape} {other.dtype}"
    if operation not in ("gmm", "gmm_t", "tgmm", "expert_mlp"):
        return f"{operation} has no Hopper kernel"
    if x.dtype != BF16 or other.dtype != BF16:
        return f"{shapes} must be bfloat16"
    if any(width % WIDTH or not width for width in (*x.shape[1:], *other.shape[1:])) or not x.shape[0]:
        return f"{shapes}: there must be rows, and all widths must be multiples of {WIDTH}"
    return None


def heuristic(columns: int) -> Config:
    """The widest tile that divides the result; a narrow one is taller. A consumer has registers for 128 x 128 sums."""
    return Config(rows=128, columns=256) if columns % 256 == 0 else Config(rows=256, columns=128, stages=3)


def heuristic_of_weights(D: int, M: int) -> Config:
    """Tiles of `tgmm`, which must divide the result downwards too."""
    return heuristic(M) if D % 256 == 0 else Config(rows=128, columns=heuristic(M).columns)


def tile_table(group_sizes_E: Array, rows: int, tile: int) -> tuple[Array, Array, Array, Array]:
    """Of each tile its group, first row and number of rows; then how many tiles there are. Group E is the tail."""
    size_E = group_sizes_E.astype(jnp.int32)
    size_E = jnp.append(size_E, rows - size_E.sum())
    end_E, tiles_E = jnp.cumsum(size_E), -(-size_E // tile)
    last_E = jnp.cumsum(tiles_E)
    t_T = jnp.arange(rows // tile + len(size_E), dtype=jnp.int32)
    group_T = jnp.minimum((t_T[:, None] >= last_E).sum(1, dtype=jnp.int32), len(size_E) - 1)
    first_T = (end_E - size_E)[group_T] + (t_T - (last_E - tiles_E)[group_T]) * tile
    small_T = size_E[group_T] < tile
    first_T = jnp.where(small_T, first_T, jnp.minimum(first_T, end_E[group_T] - tile))
    return group_T, first_T, jnp.where(small_T, size_E[group_T], tile), last_E[-1:]


def _check_divides(config: Config, **sizes: int) -> None:
    for name, size in sizes.items():
        tile = getattr(config, name)
        if size % tile:
            raise NotImplementedError(
                f"{config}: {name}={tile} does not divide {size}; leave the config out, or use a divisor"
            )


def gmm(x_RD: Array, w_EDM: Array, group_sizes_E: Array, config: Config | None = None) -> Array:
    config = config or heuristic(w_EDM.shape[2])
    return _grouped(x_RD, w_EDM, group_sizes_E, config, transposed=False)


def gmm_t(x_RM: Array, w_EDM: Array, group_sizes_E: Array, config: Config | None = None) -> Array:
    config = config or heuristic(w_EDM.shape[1])
    return _grouped(x_RM, w_EDM, group_sizes_E, config, transposed=True)


def _grouped(x_RD: Array, w_EDM: Array, group_sizes_E: Array, config: Config, transposed: bool) -> Array:
    """x times its groups' matrices, which lie as [E, D, M], or transposed: then they lie as [E, M, D]."""
    (R, D), M = x_RD.shape, w_EDM.shape[1 if transposed else 2]
    _check_divides(config, columns=M, depth=D)
    table = tile_table(group_sizes_E, R, config.rows)
    sms = hopper.multiprocessors()
    w_tile = (config.columns, config.depth) if transposed else (config.depth, config.columns)
    kernel = hopper.kernel(
        partial(_grouped_kernel, config=config, transposed=transposed, sms=sms),
        result_like(x_RD, (R, M), x_RD.dtype),
        [
            hopper.swizzled(config.stages, CONSUMERS, config.half, config.depth),
            hopper.swizzled(config.stages, *w_tile),
            hopper.swizzled(CONSUMERS, config.stores, config.half, CHUNK),
            plgpu.SMEM((CONSUMERS, config.half, CHUNK), BF16),
            plgpu.Barrier(num_arrivals=CONSUMERS + 1, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=config.stages),
        ],
        grid={"sm": sms},
        name="gmm_t" if transposed else "gmm",
        cost=pl.CostEstimate(flops=2 * R * D * M, bytes_accessed=2 * (R * D + w_EDM.size + R * M), transcendentals=0),
    )
    return kernel(*table, x_RD, w_EDM)


def _grouped_kernel(
    group_T, first_T, rows_T, tiles_1, x_RD, w_EDM, y_RM, x_smem, w_smem, y_smem, edge_smem, full, empty,
    *, config: Config, transposed: bool, sms: int,
):  # fmt: skip
    (_, D), columns, groups = x_RD.shape, y_RM.shape[1] // config.columns, w_EDM.shape[0]
    sm, warpgroup = lax.axis_index("sm"), lax.axis_index("warpgroup")
    tiles = (tiles_1[0] * columns - sm + sms - 1) // sms  # of this block: sm, sm + sms, ...

    def tile(i):
        """Its row in the table, its column, and the number of terms of its sums."""
        t = (sm + i * sms) // columns
        return t, (sm + i * sms) % columns, jnp.where(group_T[t] < groups, D // config.depth, 0)

    def load(i, step):
        t, column, terms = tile(i)

        def term(d, step):
            slot = hopper.slot(step, config.stages)
            pl.when(step >= config.stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
            depth, across = pl.ds(d * config.depth, config.depth), pl.ds(column * config.columns, config.columns)
            w_at = (across, depth) if transposed else (depth, across)
            plgpu.copy_gmem_to_smem(w_EDM.at[group_T[t], *w_at], w_smem.at[slot], full.at[slot])
            for half in range(CONSUMERS):
                rows = pl.ds(first_T[t] + half * config.half, config.half)
                plgpu.copy_gmem_to_smem(x_RD.at[rows, depth], x_smem.at[slot, half], full.at[slot])
            return step + 1

        return lax.fori_loop(0, terms, term, step)

    def multiply(i, step):
        t, column, terms = tile(i)

        def sums(sum_ij):
            def term(d, step):
                slot = hopper.slot(step, config.stages)
                plgpu.barrier_wait(full.at[slot])
                w_dj = plgpu.transpose_ref(w_smem.at[slot], (1, 0)) if transposed else w_smem.at[slot]
                plgpu.wgmma(sum_ij, x_smem.at[slot, warpgroup], w_dj)
                plgpu.wgmma_wait(1)  # the product before this one is done with its slot
                pl.when(d > 0)(lambda: plgpu.barrier_arrive(empty.at[hopper.slot(step - 1, config.stages)]))
                return step + 1

            return lax.fori_loop(0, terms, term, step), sum_ij[...]

        step, sum_ij = pl.run_scoped(sums, plgpu.WGMMAAccumulatorRef((config.half, config.columns)))
        pl.when(terms > 0)(lambda: plgpu.barrier_arrive(empty.at[hopper.slot(step - 1, config.stages)]))
        first, rows = first_T[t] + warpgroup * config.half, rows_T[t] - warpgroup * config.half
        to = y_RM, first, column * config.columns

        @pl.when(rows >= config.half)
        def _():
            _store(sum_ij, *to, y_smem.at[warpgroup])

        @pl.when((rows > 0) & (rows < config.half))
        def _():
            _store_some(sum_ij, *to, rows, edge_smem.at[warpgroup])

        return step

    def loader():
        hopper.drain((empty,), lax.fori_loop(0, tiles, load, jnp.int32(0)), config.stages)

    def consumer():
        lax.fori_loop(0, tiles, multiply, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    hopper.roles(loader, consumer)


def tgmm(x_RD: Array, y_RM: Array, group_sizes_E: Array, config: Config | None = None) -> Array:
    (R, D), M, E = x_RD.shape, y_RM.shape[1], group_sizes_E.shape[0]
    config = config or heuristic_of_weights(D, M)
    _check_divides(config, rows=D, columns=M)
    end_E = jnp.cumsum(group_sizes_E.astype(jnp.int32))
    sms = hopper.multiprocessors()
    kernel = hopper.kernel(
        partial(_tgmm_kernel, config=config, sms=sms),
        result_like(x_RD, (E, D, M), F32),
        [
            hopper.swizzled(config.stages, CONSUMERS, config.depth, config.half),
            hopper.swizzled(config.stages, config.depth, config.columns),
            hopper.swizzled(CONSUMERS, config.stores, config.half, CHUNK // 2, dtype=F32),
            plgpu.Barrier(num_arrivals=CONSUMERS + 1, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=CONSUMERS),
        ],
        grid={"sm": sms},
        cost=pl.CostEstimate(flops=2 * R * D * M, bytes_accessed=2 * R * (D + M) + 4 * E * D * M, transcendentals=0),
        name="tgmm",
    )
    return kernel(end_E - group_sizes_E, end_E, x_RD, y_RM)


def _tgmm_kernel(
    start_E, end_E, x_RD, y_RM, dw_EDM, x_smem, y_smem, dw_smem, full, empty, masked, *, config: Config, sms: int
):
    (E, D, M), half, depth = dw_EDM.shape, config.half, config.depth
    down, columns = D // config.rows, M // config.columns
    sm, warpgroup = lax.axis_index("sm"), lax.axis_index("warpgroup")
    tiles = (E * down * columns - sm + sms - 1) // sms

    def tile(i):
        """Its group, its place in the result, and how many pieces of `depth` rows the group has."""
        t = sm + i * sms
        e = t // (down * columns)
        place = (t // columns) % down * config.rows, t % columns * config.columns
        return e, *place, (end_E[e] - start_E[e] + depth - 1) // depth

    def load(i, step):
        e, row, column, terms = tile(i)

        def term(d, step):
            slot = hopper.slot(step, config.stages)
            pl.when(step >= config.stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
            rows = pl.ds(start_E[e] + d * depth, depth)
            plgpu.copy_gmem_to_smem(y_RM.at[rows, pl.ds(column, config.columns)], y_smem.at[slot], full.at[slot])
            for c in range(CONSUMERS):
                x_at = x_RD.at[rows, pl.ds(row + c * half, half)]
                plgpu.copy_gmem_to_smem(x_at, x_smem.at[slot, c], full.at[slot])
            return step + 1

        return lax.fori_loop(0, terms, term, step)

    def multiply(i, step):
        e, row, column, terms = tile(i)

        def sums(sum_ij):
            def term(d, step):
                slot = hopper.slot(step, config.stages)
                plgpu.barrier_wait(full.at[slot])
                left = end_E[e] - start_E[e] - d * depth

                @pl.when(left < depth)
                def _():
                    _keep_rows(x_smem.at[slot, warpgroup], left)
                    pl.when(warpgroup == 0)(lambda: _keep_rows(y_smem.at[slot], left))
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(masked)
                    plgpu.barrier_wait(masked)

                plgpu.wgmma(sum_ij, plgpu.transpose_ref(x_smem.at[slot, warpgroup], (1, 0)), y_smem.at[slot])
                plgpu.wgmma_wait(1)
                pl.when(d > 0)(lambda: plgpu.barrier_arrive(empty.at[hopper.slot(step - 1, config.stages)]))
                return step + 1

            return lax.fori_loop(0, terms, term, step), sum_ij[...]

        step, sum_ij = pl.run_scoped(sums, plgpu.WGMMAAccumulatorRef((half, config.columns)))
        pl.when(terms > 0)(lambda: plgpu.barrier_arrive(empty.at[hopper.slot(step - 1, config.stages)]))
        _store(sum_ij, dw_EDM.at[e], row + warpgroup * half, column, dw_smem.at[warpgroup])
        return step

    def loader():
        hopper.drain((empty,), lax.fori_loop(0, tiles, load, jnp.int32(0)), config.stages)

    def consumer():
        lax.fori_loop(0, tiles, multiply, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    hopper.roles(loader, consumer)


def _keep_rows(tile_smem, rows: Array) -> None:
    """Zeros in all but the first `rows` rows, whatever they hold."""
    height, width = tile_smem.shape
    row_ij = plgpu.broadcasted_iota(jnp.int32, (height, CHUNK), 0, layout=plgpu.Layout.WGMMA)
    for piece in range(width // CHUNK):
        part = tile_smem.at[:, piece * CHUNK : (piece + 1) * CHUNK]
        part[...] = jnp.where(row_ij < rows, part[...], jnp.zeros((), tile_smem.dtype))


def _store(sum_ij: Array, y_RM, first: Array, column: Array, y_smem) -> None:
    """To y_RM at (first, column), by way of shared memory, a buffer's columns at a time."""
    (height, width), (stores, _, across) = sum_ij.shape, y_smem.shape
    for piece in range(width // across):
        buffer = y_smem.at[piece % stores]
        plgpu.wait_smem_to_gmem(stores - 1, wait_read_only=True)
        buffer[...] = sum_ij[:, piece * across : (piece + 1) * across].astype(y_RM.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, y_RM.at[pl.ds(first, height), pl.ds(column + piece * across, across)])


def _store_some(sum_ij: Array, y_RM, first: Array, column: Array, rows: Array, edge_smem) -> None:
    """The first `rows` rows, which are fewer than all."""
    across = edge_smem.shape[1]
    for piece in range(sum_ij.shape[1] // across):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        edge_smem[...] = sum_ij[:, piece * across : (piece + 1) * across].astype(y_RM.dtype)
        plgpu.commit_smem()
        _store_rows(edge_smem, y_RM, first, column + piece * across, rows)


def _store_rows(edge_smem, y_RM, first: Array, column: Array, rows: Array) -> None:
    """The first `rows` of fewer rows than the buffer has: a copy for each power of two in their number."""
    for power in reversed(range((edge_smem.shape[0] - 1).bit_length())):
        count = 1 << power

        @pl.when((rows & count) != 0)
        def _(done=rows & -(2 * count), count=count):
            to = y_RM.at[pl.ds(first + done, count), pl.ds(column, edge_smem.shape[1])]
            plgpu.copy_smem_to_gmem(edge_smem.at[pl.ds(done, count)], to)
