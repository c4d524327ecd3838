"""TPU: the two symmetric products of a step computed once, tile by tile above the diagonal, and written to both sides.

With P <= Q a step costs 2 P^2 Q (x from the polynomial) + P^2 Q (A) + P^3 (the polynomial) instead of 4 P^2 Q + 2 P^3: for a
GLM-4.5 expert, 1536 x 5120, 72 %. One kernel makes both symmetric products, since A A = A A^T:

    gram = x x^T,    poly = b gram + c gram gram^T,    x <- a x + poly x

Matrices are padded with zeros to whole tiles, which stay zeros. bfloat16 in and out, float32 accumulation; gram is rounded to
bfloat16 before b multiplies it (xla.py keeps it float32: the polynomial is rounded at once either way).
"""

from dataclasses import dataclass
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.newton_schulz import xla
from pallas_kernels.results import result_like

DEVICES = ("TPU v5", "TPU v6", "TPU7")  # older ones have less fast memory
ROUND = 128  # lanes: what tiles are a multiple of


@dataclass(frozen=True)
class Config:
    """Sizes of tiles, multiples of 128; smaller where the matrix is."""

    rows: int = 512  # of symmetric products, both ways, and of the result
    columns: int = 1024  # of the result
    contract: int = 1536  # summed at once


SCALARS = pl.BlockSpec(memory_space=pltpu.SMEM)
VMEM_BYTES = 48 * 2**20  # the three tiles, twice, and the accumulator fit with room


def refusal(operation: str, x_BPQ: Array) -> str | None:
    if x_BPQ.dtype != jnp.bfloat16:
        return f"x {x_BPQ.shape} is {x_BPQ.dtype}; it takes bfloat16"
    return None


def newton_schulz(x_BPQ: Array, quintics: tuple[tuple[float, float, float], ...], config: Config = Config()) -> Array:
    return _whole_devices(partial(_newton_schulz, quintics, config), x_BPQ)


def _whole_devices(f, x_BPQ: Array) -> Array:
    """`f` on every device's own matrices, where the batch is spread over an Explicit mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not mesh.explicit_axes or mesh.size == 1:
        return f(x_BPQ)
    layout = jax.typeof(x_BPQ).sharding.spec
    if any(axis is not None for axis in layout[x_BPQ.ndim - 2 :]):
        raise ValueError(
            f"newton_schulz: x {x_BPQ.shape} lies as {layout}: matrices must be whole on a device; reshard them first"
        )
    return jax.shard_map(f, in_specs=layout, out_specs=layout)(x_BPQ)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _newton_schulz(quintics, config: Config, x_BPQ: Array) -> Array:
    *batch, P, Q = x_BPQ.shape
    rows, columns = _tile(P, config.rows), _tile(Q, config.columns)
    x = jnp.pad(x_BPQ.reshape(prod(batch), P, Q), ((0, 0), (0, -P % rows), (0, -Q % columns)))

    def step(x, quintic):  # kernels take coefficients as data: they are compiled once for all steps
        a, b, c = quintic
        gram = _symmetric(x, None, rows, config.contract)
        poly = _symmetric(gram, (b, c), rows, config.contract)
        return _step(poly, x, a, rows, columns, config.contract), None

    x, _ = jax.lax.scan(step, x, jnp.asarray(quintics, jnp.float32))
    return x[:, :P, :Q].reshape(x_BPQ.shape)


def _forward(quintics, config: Config, x_BPQ: Array):
    return _newton_schulz(quintics, config, x_BPQ), x_BPQ


def _backward(quintics, config: Config, x_BPQ: Array, dy_BPQ: Array):
    return jax.vjp(lambda x: xla.newton_schulz(x, quintics), x_BPQ)[1](dy_BPQ)


_newton_schulz.defvjp(_forward, _backward)


def _tile(size: int, most: int) -> int:
    """The largest tile up to `most` with the least padding."""
    padded = pl.cdiv(size, ROUND) * ROUND
    choices = range(min(most, padded), 0, -ROUND)
    return min(choices, key=lambda tile: (pl.cdiv(padded, tile) * tile > padded * 1.1, -tile))


def _divisor(size: int, most: int) -> int:
    """The largest multiple of 128 up to `most` that divides `size`."""
    return next(tile for tile in range(min(most, size), 0, -ROUND) if size % tile == 0)


def _symmetric(x_BPK: Array, weights: tuple[Array, Array] | None, tile: int, contract: int) -> Array:
    """x x^T, or with weights (b, c) of a symmetric x: b x + c x x^T. Tiles on and above the diagonal, each written twice."""
    B, P, K = x_BPK.shape
    contract = _divisor(K, contract)
    i_S, j_S = (jnp.asarray(z, jnp.int32) for z in np.triu_indices(P // tile))
    x_i = pl.BlockSpec((None, tile, contract), lambda b, s, k, i, j: (b, i[s], k))
    x_j = pl.BlockSpec((None, tile, contract), lambda b, s, k, i, j: (b, j[s], k))
    here = pl.BlockSpec((None, tile, tile), lambda b, s, k, i, j: (b, i[s], j[s]))
    plus = (jnp.stack(weights), x_BPK) if weights else ()
    products = len(i_S) * B * tile * tile * K
    return pl.pallas_call(
        partial(_symmetric_kernel, bool(weights)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, len(i_S), K // contract),
            in_specs=[x_i, x_j, *((SCALARS, here) if weights else ())],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((tile, tile), jnp.float32),
                pltpu.VMEM((2, tile, tile), x_BPK.dtype),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=result_like(x_BPK, (B, P, P), x_BPK.dtype),
        cost_estimate=pl.CostEstimate(
            flops=2 * products, transcendentals=0, bytes_accessed=2 * (2 * products // tile + B * P * P)
        ),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_BYTES),
        name="newton_schulz_symmetric",
    )(i_S, j_S, x_BPK, x_BPK, *plus)


def _symmetric_kernel(weighted, i_S, j_S, x_i, x_j, *rest):
    *plus, out_BPP, sum_ref, stage_ref, sent = rest
    b, s, k = (pl.program_id(axis) for axis in range(3))
    tile = sum_ref.shape[0]
    product = jax.lax.dot_general(x_i[...], x_j[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    @pl.when(k == 0)
    def _():
        sum_ref[...] = product

    @pl.when(k > 0)
    def _():
        sum_ref[...] += product

    def send(side, row, column):
        place = out_BPP.at[b, pl.ds(row * tile, tile), pl.ds(column * tile, tile)]
        return pltpu.make_async_copy(stage_ref.at[side], place, sent.at[side])

    @pl.when(k == pl.num_programs(2) - 1)
    def _():
        total = sum_ref[...]
        if weighted:
            weights, here = plus
            total = weights[1] * total + weights[0] * here[...].astype(jnp.float32)
        i, j = i_S[s], j_S[s]
        stage_ref[0] = total.astype(stage_ref.dtype)
        upper = send(0, i, j)
        upper.start()

        @pl.when(i != j)
        def _():
            stage_ref[1] = total.T.astype(stage_ref.dtype)
            lower = send(1, j, i)
            lower.start()
            lower.wait()

        upper.wait()


def _step(poly_BPP: Array, x_BPQ: Array, a: Array, rows: int, columns: int, contract: int) -> Array:
    """a x + poly x."""
    B, P, Q = x_BPQ.shape
    contract = _divisor(P, contract)
    products = B * P * P * Q
    return pl.pallas_call(
        _step_kernel,
        grid=(B, P // rows, Q // columns, P // contract),
        in_specs=[
            SCALARS,
            pl.BlockSpec((None, rows, contract), lambda b, i, j, k: (b, i, k)),
            pl.BlockSpec((None, contract, columns), lambda b, i, j, k: (b, k, j)),
            pl.BlockSpec((None, rows, columns), lambda b, i, j, k: (b, i, j)),
        ],
        out_specs=pl.BlockSpec((None, rows, columns), lambda b, i, j, k: (b, i, j)),
        scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)],
        out_shape=result_like(x_BPQ, x_BPQ.shape, x_BPQ.dtype),
        cost_estimate=pl.CostEstimate(
            flops=2 * products,
            transcendentals=0,
            bytes_accessed=2 * (products // rows + products // columns + 2 * B * P * Q),
        ),
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=VMEM_BYTES, dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        name="newton_schulz_step",
    )(a[None], poly_BPP, x_BPQ, x_BPQ)


def _step_kernel(a_ref, poly_ref, x_ref, here_ref, out_ref, sum_ref):
    k = pl.program_id(3)
    product = jnp.dot(poly_ref[...], x_ref[...], preferred_element_type=jnp.float32)

    @pl.when(k == 0)
    def _():
        sum_ref[...] = a_ref[0] * here_ref[...].astype(jnp.float32) + product

    @pl.when(k > 0)
    def _():
        sum_ref[...] += product

    @pl.when(k == pl.num_programs(3) - 1)
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)
