"""`jax.lax.ragged_all_to_all`, also on back ends that have none."""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.choose import platform

PLATFORMS = ("tpu", "gpu")  # whose compilers have the operation


def ragged_all_to_all(
    operand: Array,
    output: Array,
    input_offsets: Array,
    send_sizes: Array,
    output_offsets: Array,
    recv_sizes: Array,
    *,
    axis: str,
) -> Array:
    """Inside shard_map: `output` with slices of every device's `operand` written into it, as `jax.lax.ragged_all_to_all` has it:
    slice i goes from here, `input_offsets[i]`, to place `output_offsets[i]` over there.

    Elsewhere every device gathers all operands and takes the rows that are meant for it: to show on a CPU that what is built on it
    is right, not to be fast.
    """
    if platform() in PLATFORMS:
        sizes = input_offsets, send_sizes, output_offsets, recv_sizes
        return jax.lax.ragged_all_to_all(operand, output, *sizes, axis_name=axis)
    operands = jax.lax.all_gather(operand, axis)
    starts, places = (jax.lax.all_to_all(z, axis, 0, 0, tiled=True) for z in (input_offsets, output_offsets))
    row = jnp.arange(len(output))
    arrives = (row >= places[:, None]) & (row < (places + recv_sizes)[:, None])  # [slices, rows]
    last = len(places) - 1 - jnp.argmax(arrives[::-1], axis=0)  # where two overlap, the later one stays
    device = last // (len(places) // len(operands))
    found = operands[device, jnp.clip(starts[last] + row - places[last], 0, operand.shape[0] - 1)]
    return jnp.where(arrives.any(axis=0).reshape(-1, *[1] * (output.ndim - 1)), found, output)
