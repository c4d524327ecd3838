"""Numbers of 8 bits and the scales of their blocks."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

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


def quantize(w_DM: Float[Array, "*E D M"]) -> Quantized:
    """Matrices in blocks of 128 x 128 (narrower at the right and the lower edge), each scaled so that its largest number
    becomes the largest of e4m3, 448. Any number of batch dimensions. Raises ValueError for what is no matrix."""
    if w_DM.ndim < 2:
        raise ValueError(f"fp8.quantize: w {w_DM.shape} must be matrices, [..., D, M]; rows of x are quantize_rows'")
    return _quantize(w_DM, (BLOCK, BLOCK))


def quantize_rows(x_XD: Float[Array, "X D"]) -> Quantized:
    """Rows with a scale for each 128 of their numbers. NaN or infinity in a row makes that row's block NaN, and no other's."""
    return _quantize(x_XD, (1, BLOCK))


def _quantize(z: Array, block: tuple[int, int]) -> Quantized:
    *batch, rows, columns = z.shape
    counts = [-(-size // step) for size, step in zip((rows, columns), block, strict=True)]
    padding = [(0, n * step - size) for n, step, size in zip(counts, block, (rows, columns), strict=True)]
    padded = jnp.pad(z.astype(jnp.float32), [(0, 0)] * len(batch) + padding)
    blocks = padded.reshape(*batch, counts[0], block[0], counts[1], block[1])
    largest = jnp.abs(blocks).max((-3, -1), keepdims=True)
    scale = jnp.maximum(largest, LARGEST * jnp.finfo(jnp.float32).tiny) / LARGEST  # a block of zeros has one too
    value = (blocks / scale).astype(E4M3).reshape(padded.shape)[..., :rows, :columns]
    return Quantized(value, scale.squeeze((-3, -1)))
