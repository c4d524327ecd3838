"""Products with weights of 8 bits, for rollouts: half the memory and half the traffic of bfloat16 where weights are what costs.

A weight matrix is e4m3 with a float32 scale for each block of 128 x 128, as GLM's FP8 checkpoints have it; rows are
quantised when they come, each with a scale for every 128 of its numbers. The definition is the exact product of what those
stand for: every implementation rounds once, to x's dtype, beside float32 sums. Nothing here is differentiable.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.choose import choose
from pallas_kernels.fp8 import reference, tpu, xla
from pallas_kernels.fp8.blocks import BLOCK, E4M3, LARGEST, Quantized, dequantize

__all__ = [
    "BLOCK",
    "E4M3",
    "LARGEST",
    "Quantized",
    "dequantize",
    "grouped_matmul",
    "matmul",
    "quantize",
    "quantize_rows",
]

IMPLEMENTATIONS = {"reference": reference, "xla": xla, "tpu": tpu}


def quantize(w_DM: Float[Array, "*E D M"]) -> Quantized:
    """Matrices in blocks of 128 x 128 (narrower at the right and the lower edge), each scaled so that its largest number
    becomes the largest of e4m3, 448. Any number of batch dimensions. Raises ValueError for what is no matrix."""
    if w_DM.ndim < 2:
        raise ValueError(f"fp8.quantize: w {w_DM.shape} must be matrices, [..., D, M]; rows of x are quantize_rows'")
    return _quantize(w_DM, (BLOCK, BLOCK))


def quantize_rows(x_XD: Float[Array, "X D"]) -> Quantized:
    """Rows with a scale for each 128 of their numbers. NaN or infinity in a row makes that row's block NaN, and no other's."""
    return _quantize(x_XD, (1, BLOCK))


def matmul(x_XD: Float[Array, "X D"], w: Quantized, *, implementation: str | None = None) -> Float[Array, "X M"]:
    """x's rows, quantised, times a matrix of `quantize`. Raises ValueError for shapes or dtypes that do not fit."""
    _check("matmul", x_XD, w, 2)
    module = choose("fp8.matmul", IMPLEMENTATIONS, implementation, x_XD, w.value)
    return module.matmul(quantize_rows(x_XD), w, x_XD.dtype)


def grouped_matmul(
    x_RD: Float[Array, "R D"], w: Quantized, group_sizes_E: Int[Array, " E"], *, implementation: str | None = None
) -> Float[Array, "R M"]:
    """Rows sorted by group, quantised, times their group's matrix, as `pallas_kernels.grouped_matmul.gmm`: the sizes may sum
    to less than R, and the tail comes out zero. Raises ValueError for shapes or dtypes that do not fit."""
    _check("grouped_matmul", x_RD, w, 3)
    if group_sizes_E.shape != w.value.shape[:1] or not jnp.issubdtype(group_sizes_E.dtype, jnp.integer):
        raise ValueError(
            f"fp8.grouped_matmul: group_sizes {group_sizes_E.shape} {group_sizes_E.dtype} must be integers, one for each "
            f"matrix of w {w.value.shape}"
        )
    module = choose("fp8.grouped_matmul", IMPLEMENTATIONS, implementation, x_RD, w.value)
    return module.grouped_matmul(quantize_rows(x_RD), w, group_sizes_E, x_RD.dtype)


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


def _check(name: str, x: Array, w: Quantized, rank: int) -> None:
    *batch, D, M = w.value.shape if w.value.ndim >= 2 else (0, 0)
    blocks = (*batch, -(-D // BLOCK), -(-M // BLOCK))
    if x.ndim != 2 or w.value.ndim != rank or x.shape[1] != D or w.scale.shape != blocks:
        raise ValueError(
            f"fp8.{name}: x {x.shape}, w {w.value.shape} and its scales {w.scale.shape} do not fit; x is [rows, D], w "
            f"{'[D, M]' if rank == 2 else '[E, D, M]'} with a scale for each {BLOCK} x {BLOCK} of it, as fp8.quantize gives"
        )
    if w.value.dtype != E4M3 or w.scale.dtype != jnp.float32:
        raise ValueError(f"fp8.{name}: w is {w.value.dtype} with {w.scale.dtype} scales; take fp8.quantize's {E4M3}")
