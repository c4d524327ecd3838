"""What the Hopper kernels share: the number of multiprocessors, tiles in shared memory, and who in a block does what.

A block is three warpgroups: two consumers, which multiply, and one loader, which fills shared memory ahead of them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

H100_SMS = 132  # also H200
SHARED_BYTES = 232_448  # of one block
SWIZZLE_BYTES = 128
CONSUMERS = 2
LOADER_REGISTERS = 32
CONSUMER_REGISTERS = 240  # of each; with the loader's these are the whole register file


def multiprocessors() -> int:
    """Of the device of the mesh in context, or an H100's: known while compiling for a device that is not here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device is not None and device.platform == "gpu" and device.num_cores) or H100_SMS


def swizzled(*shape: int, dtype: jnp.dtype = jnp.bfloat16):
    """Shared memory as wgmma reads it and TMA fills it: 8 rows of 128 bytes, their 16-byte pieces permuted."""
    columns = SWIZZLE_BYTES // jnp.dtype(dtype).itemsize
    transforms = plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(SWIZZLE_BYTES)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def kernel(
    body: Callable, results, scratch: list, *, grid: dict[str, int], name: str, cost: pl.CostEstimate
) -> Callable:
    """`plgpu.kernel` with a cost: `body(*inputs, *results, *scratch)` on each block of the grid."""
    mesh = plgpu.Mesh(
        grid=tuple(grid.values()), grid_names=tuple(grid), num_threads=CONSUMERS + 1, thread_name="warpgroup"
    )

    def scoped(*arrays):
        pl.run_scoped(lambda *mine: body(*arrays, *mine), *scratch, collective_axes="warpgroup")

    scoped.__name__ = name  # of the machine code
    parameters = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)
    return pl.kernel(scoped, results, mesh=mesh, name=name, cost_estimate=cost, compiler_params=parameters)


def roles(load: Callable[[], None], consume: Callable[[], None]) -> None:
    """The last warpgroup loads, the others consume, each with the registers of its role."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == CONSUMERS)
    def _():
        plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
        load()

    @pl.when(warpgroup < CONSUMERS)
    def _():
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        consume()


def slot(step: Array, stages: int) -> Array:
    """Which of `stages` buffers is the one of a step that is not negative: without what `%` does for one that is."""
    return lax.rem(step, jnp.int32(stages))


def drain(empty: tuple, steps: Array, stages: int) -> None:
    """The loader waits until the consumers are done with what it loaded last, so that barriers end as they began."""

    def wait(step, _):
        for barriers in empty:
            plgpu.barrier_wait(barriers.at[slot(step, stages)])

    lax.fori_loop(jnp.maximum(steps - stages, 0), steps, wait, None)
