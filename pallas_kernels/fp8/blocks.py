"""Numbers of 8 bits and the scales of their blocks."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

BLOCK = 128
E4M3 = jnp.dtype(jnp.float8_e4m3fn)
LARGEST = 448.0  # that e4m3 has


class Quantized(NamedTuple):
    """A matrix, a stack of them, or rows: `value` times the scale of the block that a number stands in."""

    value: Array  # e4m3 [..., D, M], or rows [X, D]
    scale: Array  # float32 [..., ceil(D / 128), ceil(M / 128)], of rows [X, ceil(D / 128)]


def dequantize(z: Quantized, dtype=jnp.float32) -> Array:
    """What the numbers stand for."""
    *_, rows, columns = z.value.shape
    of_rows = 1 if z.scale.shape[-2] == rows else BLOCK  # BLOCK rows have one scale, unless each has its own
    scale = jnp.repeat(jnp.repeat(z.scale, of_rows, -2)[..., :rows, :], BLOCK, -1)[..., :columns]
    return (z.value.astype(jnp.float32) * scale).astype(dtype)
