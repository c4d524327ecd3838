"""The expert layer's own products for TPU (Mosaic): what `gmm`, `gmm_t` and XLA between them would write and read again stays
in the fast memory.

`gate_up` gathers its rows itself: while a tile is multiplied, the next one's rows arrive one by one from where the tokens lie,
so the routed copy of x is never stored. Two bfloat16 numbers travel as one word, for the fast memory has no address for half a
word: column d and column D/2 + d of a row. A visit multiplies its tile by both matrices and takes SwiGLU of the results.
`hidden_grad` ends `gmm_t`'s product with the gradient of SwiGLU, and `rows_grad` adds up two of them in float32.
Tiles, visits and how a product is cut up are those of tpu.py.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul import tpu
from pallas_kernels.grouped_matmul.tpu import F32, LANES, NN, NT, SUBLANES, Config
from pallas_kernels.grouped_matmul.visits import visits
from pallas_kernels.results import result_like

WORD_ROWS = 8  # of a tile of 32-bit words
MOST_BESIDE = 8  # times as many rows to send for in an iteration of a product


def takes(gate_EDM: Array) -> bool:
    """Whether rows can be fetched one by one, and two tiles of them on their way fit the fast memory beside the weights."""
    D, size, here = gate_EDM.shape[1], gate_EDM.dtype.itemsize, tpu.chip()
    whole_lanes = D * size % (4 * LANES) == 0
    return whole_lanes and 5 * (here.gmm.tile + LANES) * D * size <= here.vmem_bytes * 3 // 4


def gate_up(
    words_XW: Array, token_R: Array, gate_EDM: Array, up_EDM: Array, group_sizes_E: Array
) -> tuple[Array, Array, Array]:
    """Of the rows x[token], from `words(x)`: their products with gate and with up, and silu(gate) * up of those as they are rounded."""
    (E, D, M), rows, here = gate_EDM.shape, len(token_R), tpu.chip()
    config, dtype = here.gmm, gate_EDM.dtype
    tile, width = tpu.tile_rows(rows, config), tpu.block_width(M, 2 * D * dtype.itemsize, here)
    tiles = pl.cdiv(rows, tile)
    token_C1R = jnp.pad(token_R, (0, tiles * tile - rows)).reshape(tiles, 1, tile)
    walk = visits(group_sizes_E, rows, tile, tail=True)

    def tokens_of(later: int):
        def at(n, v, bound, group, tile, source, matrix):
            return source[jnp.minimum(v + later, source.shape[0] - 1)], 0, 0

        return pl.BlockSpec((1, 1, tile), at, memory_space=pltpu.SMEM)

    weights = pl.BlockSpec((1, D, width), lambda n, v, bound, group, at, source, matrix: (matrix[v], 0, n))
    result = pl.BlockSpec((tile, width), lambda n, v, bound, group, at, source, matrix: (at[v], n))
    product = pltpu.VMEM((tile, width), dtype)
    return pl.pallas_call(
        partial(_gate_up_kernel, config=config, groups=E),
        name="gate_up",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(pl.cdiv(M, width), walk.count),
            in_specs=[tokens_of(0), tokens_of(1), pl.BlockSpec(memory_space=pl.ANY), weights, weights],
            out_specs=[result] * 3,
            scratch_shapes=[
                pltpu.VMEM((2, pl.cdiv(tile, WORD_ROWS), WORD_ROWS, words_XW.shape[1]), words_XW.dtype),
                pltpu.VMEM((tile, D), dtype),
                pltpu.SemaphoreType.DMA((2,)),
                product,
                product,
                *_accumulator(config, tile, width),
            ],
        ),
        out_shape=[result_like(words_XW, (rows, M), dtype)] * 3,
        compiler_params=tpu.parameters(here, bounds_checks=False),  # half of what sending for a row costs
        cost_estimate=_cost(rows, D, 2 * M, (gate_EDM, up_EDM), dtype.itemsize * rows * (D + 3 * M), rows * M),
        interpret=tpu.interpret(),
    )(*walk[:5], token_C1R, token_C1R, words_XW, gate_EDM, up_EDM)


def hidden_grad(
    dy_RD: Array, down_EMD: Array, gate_RM: Array, up_RM: Array, weight_R: Array, group_sizes_E: Array
) -> tuple[Array, Array, Array, Array]:
    """From the gradient of a row's result before its weight: those of gate and up, in their place, the weighted hidden layer
    itself, all in dy's dtype, and the weight's gradient in float32."""
    (rows, D), (E, M, _), here = dy_RD.shape, down_EMD.shape, tpu.chip()
    config = here.gmm_t
    tile, width = tpu.tile_rows(rows, config), tpu.block_width(M, D * dy_RD.dtype.itemsize, here)
    walk, blocks = visits(group_sizes_E, rows, tile, tail=True), pl.cdiv(M, width)
    hidden = pl.BlockSpec((tile, width), lambda n, v, bound, group, at, source, matrix: (at[v], n))
    column = pl.BlockSpec((1, tile, 1), lambda n, v, bound, group, at, source, matrix: (n, at[v], 0))
    *gradients, dweight_CR1 = pl.pallas_call(
        partial(_hidden_grad_kernel, config=config, groups=E, columns=M),
        name="hidden_grad",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(blocks, walk.count),
            in_specs=[
                pl.BlockSpec((tile, D), lambda n, v, bound, group, at, source, matrix: (source[v], 0)),
                pl.BlockSpec((1, width, D), lambda n, v, bound, group, at, source, matrix: (matrix[v], n, 0)),
                hidden,
                hidden,
                pl.BlockSpec((tile, 1), lambda n, v, bound, group, at, source, matrix: (at[v], 0)),
            ],
            out_specs=[hidden, hidden, hidden, column],
            scratch_shapes=[pltpu.VMEM((tile, width), dy_RD.dtype), *_accumulator(config, tile, width)],
        ),
        out_shape=[result_like(dy_RD, (rows, M), dy_RD.dtype)] * 3 + [result_like(dy_RD, (blocks, rows, 1), F32)],
        input_output_aliases=tpu.in_place({7: 0, 8: 1}, (rows, tile), (M, width)),  # gate's and up's gradients
        compiler_params=tpu.parameters(here),
        cost_estimate=_cost(rows, D, M, (dy_RD, down_EMD), dy_RD.dtype.itemsize * rows * 5 * M, rows * M),
        interpret=tpu.interpret(),
    )(*walk[:5], dy_RD, down_EMD, gate_RM, up_RM, weight_R[:, None])
    return *gradients, dweight_CR1.sum((0, 2))


def rows_grad(dgate_RM: Array, dup_RM: Array, gate_EDM: Array, up_EDM: Array, group_sizes_E: Array) -> Array:
    """dgate times gate transposed plus dup times up transposed, added up in float32."""
    (rows, M), (E, D, _), here = dgate_RM.shape, gate_EDM.shape, tpu.chip()
    config = here.gmm_t
    tile, width = tpu.tile_rows(rows, config), tpu.block_width(D, 2 * M * dgate_RM.dtype.itemsize, here)
    walk = visits(group_sizes_E, rows, tile, tail=True)
    hidden = pl.BlockSpec((tile, M), lambda n, v, bound, group, at, source, matrix: (source[v], 0))
    weights = pl.BlockSpec((1, width, M), lambda n, v, bound, group, at, source, matrix: (matrix[v], n, 0))
    return pl.pallas_call(
        partial(_rows_grad_kernel, config=config, groups=E),
        name="rows_grad",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(pl.cdiv(D, width), walk.count),
            in_specs=[hidden, hidden, weights, weights],
            out_specs=pl.BlockSpec((tile, width), lambda n, v, bound, group, at, source, matrix: (at[v], n)),
            scratch_shapes=[pltpu.VMEM((tile, width), dgate_RM.dtype), *_accumulator(config, tile, width)],
        ),
        out_shape=result_like(dgate_RM, (rows, D), dgate_RM.dtype),
        compiler_params=tpu.parameters(here),
        cost_estimate=_cost(
            rows, 2 * M, D, (dgate_RM, dup_RM, gate_EDM, up_EDM), dgate_RM.dtype.itemsize * rows * D, 0
        ),
        interpret=tpu.interpret(),
    )(*walk[:5], dgate_RM, dup_RM, gate_EDM, up_EDM)


def words(x_XD: Array) -> Array:
    """Rows that can be fetched one by one: float32 as it is, of bfloat16 the right half of the columns above the left."""
    if x_XD.dtype == F32:
        return x_XD
    left, right = (lax.bitcast_convert_type(z, jnp.uint16).astype(jnp.uint32) for z in jnp.split(x_XD, 2, axis=1))
    return left | (right << 16)


def _gate_up_kernel(
    bound_G, group_W, tile_W, source_W, _, token_ref, next_ref, x_hbm, gate_w_ref, up_w_ref,
    gate_ref, up_ref, active_ref, words_ref, x_ref, arrived, gate_new, up_new, *accumulator, config, groups,
):  # fmt: skip
    visit, last = pl.program_id(1), pl.num_programs(1) - 1
    group, next_slot = group_W[visit], lax.rem(visit + 1, 2)
    words = words_ref.at[lax.rem(visit, 2)]

    @pl.when((visit == 0) & (group < groups))
    def _():
        send = partial(_send, x_hbm, token_ref, words_ref.at[0], arrived.at[0])
        pl.loop(0, words.shape[0])(lambda i: send(i, 1))

    @pl.when(group_W[jnp.maximum(visit - 1, 0)] < groups)  # a visit that multiplies has sent for the next one's rows
    def _():
        _wait(words, arrived.at[lax.rem(visit, 2)])

    @pl.when(group < groups)
    def _():
        tpu.in_steps(0, words.shape[0], SUBLANES // WORD_ROWS, 1, partial(_unpack, words, x_ref))
        following = partial(_send, x_hbm, next_ref, words_ref.at[next_slot], arrived.at[next_slot])
        half = words.shape[0] // 2
        for w_ref, new_ref, first, count in (
            (gate_w_ref, gate_new, 0, half),
            (up_w_ref, up_new, half, words.shape[0] - half),
        ):
            product = partial(tpu.multiply, ((x_ref, w_ref.at[0]),), new_ref, config, NN, *accumulator)
            _send_beside(product, following, first, count)

    @pl.when((group < groups) & (visit == last))
    def _():  # nobody will read them
        _wait(words_ref.at[next_slot], arrived.at[next_slot])

    def finish(rows: pl.Slice, mine: Array):
        real = mine & (group < groups)
        for new_ref, ref in ((gate_new, gate_ref), (up_new, up_ref)):
            ref[rows, :] = jnp.where(real, new_ref[rows, :], jnp.where(mine, 0, ref[rows, :]))
        gate, up = gate_ref[rows, :].astype(F32), up_ref[rows, :].astype(F32)
        active_ref[rows, :] = (gate * jax.nn.sigmoid(gate) * up).astype(active_ref.dtype)

    _each_row(bound_G, group, tile_W, gate_ref.shape[0], finish)


def _send(x_hbm, token_ref, words_ref, arrived, first, count: int) -> None:
    """For `count` times WORD_ROWS rows of the tile."""
    for i in range(count):
        for j in range(WORD_ROWS):
            row = x_hbm.at[pl.ds(token_ref[0, 0, (first + i) * WORD_ROWS + j], 1)]
            pltpu.make_async_copy(row, words_ref.at[first + i, pl.ds(j, 1)], arrived).start()


def _send_beside(product, send, first: int, count: int) -> None:
    """Sends for `count` from `first` on in equal shares in the product's iterations, and for what is left over after it."""
    shared = 0

    def share(part, parts: int) -> None:
        nonlocal shared
        each = min(count // parts, MOST_BESIDE)
        shared = each * parts
        send(first + part * each, each)

    product(meanwhile=share)
    pl.loop(shared, count)(lambda i: send(first + i, 1))


def _wait(words_ref, arrived) -> None:
    """Until as many bytes have come, whoever sent for them."""
    pltpu.make_async_copy(words_ref, words_ref, arrived).wait()


def _unpack(words_ref, x_ref, slices: pl.Slice) -> None:
    count, W = slices.size * WORD_ROWS, words_ref.shape[-1]
    rows, words = pl.ds(slices.start * WORD_ROWS, count), words_ref[slices].reshape(count, W)
    if x_ref.dtype == F32:
        x_ref[rows, :] = words
        return
    for columns, bits in ((pl.ds(0, W), words << 16), (pl.ds(W, W), words & jnp.uint32(0xFFFF0000))):
        x_ref[rows, columns] = lax.bitcast_convert_type(bits, F32).astype(x_ref.dtype)


def _hidden_grad_kernel(
    bound_G, group_W, tile_W, _, __, dy_ref, down_ref, gate_ref, up_ref, weight_ref,
    dgate_ref, dup_ref, scaled_ref, dweight_ref, dactive_ref, *accumulator, config, groups, columns,
):  # fmt: skip
    group, width = group_W[pl.program_id(1)], dgate_ref.shape[1]

    @pl.when(group < groups)
    def _():
        tpu.multiply(((dy_ref, down_ref.at[0]),), dactive_ref, config, NT, *accumulator)

    def finish(rows: pl.Slice, mine: Array):
        gate, up, dactive = (ref[rows, :].astype(F32) for ref in (gate_ref, up_ref, dactive_ref))
        weight, sigmoid = weight_ref[rows, :], jax.nn.sigmoid(gate)
        silu, dweighted = gate * sigmoid, dactive * weight
        real = mine & (group < groups)
        for ref, new in (
            (dgate_ref, dweighted * up * (sigmoid + silu * (1 - sigmoid))),
            (dup_ref, dweighted * silu),
            (scaled_ref, silu * up * weight),
        ):
            ref[rows, :] = jnp.where(real, new.astype(ref.dtype), jnp.where(mine, 0, ref[rows, :]))
        there = pl.program_id(0) * width + lax.broadcasted_iota(jnp.int32, gate.shape, 1) < columns
        sums = jnp.where(there, silu * up * dactive, 0).sum(1, keepdims=True)
        dweight_ref[0, rows, :] = jnp.where(real, sums, jnp.where(mine, 0, dweight_ref[0, rows, :]))

    _each_row(bound_G, group, tile_W, dgate_ref.shape[0], finish)


def _rows_grad_kernel(
    bound_G, group_W, tile_W, _, __, dgate_ref, dup_ref, gate_ref, up_ref, dx_ref, new_ref, *accumulator, config, groups
):
    group = group_W[pl.program_id(1)]

    @pl.when(group < groups)
    def _():
        pairs = (dgate_ref, gate_ref.at[0]), (dup_ref, up_ref.at[0])
        tpu.multiply(pairs, new_ref, config, NT, *accumulator)

    def finish(rows: pl.Slice, mine: Array):
        real = mine & (group < groups)
        dx_ref[rows, :] = jnp.where(real, new_ref[rows, :], jnp.where(mine, 0, dx_ref[rows, :]))

    _each_row(bound_G, group, tile_W, dx_ref.shape[0], finish)


def _each_row(bound_G, group: Array, tile_W, tile: int, finish) -> None:
    """`finish(rows, mine)` through a tile; `mine` [rows,1] are the visit's own, the others are kept as they are."""
    first_row = tile_W[pl.program_id(1)] * tile

    def step(rows: pl.Slice):
        finish(rows, tpu.is_mine(bound_G, group, first_row + rows.start, SUBLANES))

    tpu.in_steps(0, tile, SUBLANES, 1, step)


def _accumulator(config: Config, tile: int, width: int) -> list:
    return [pltpu.VMEM((tile, width), F32)] if config.depth_step else []


def _cost(rows: int, depth: int, columns: int, read: tuple[Array, ...], other: int, logistic: int) -> pl.CostEstimate:
    cost = tpu.cost(rows, depth, columns, read, other)
    return pl.CostEstimate(flops=cost.flops, transcendentals=logistic, bytes_accessed=cost.bytes_accessed)
