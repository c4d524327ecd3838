"""For any back end: the weights of a product are dequantised before it, whole where there are no groups."""

from jax import Array

from pallas_kernels.fp8.blocks import Quantized, dequantize
from pallas_kernels.fp8.reference import matmul
from pallas_kernels.grouped_matmul import gmm

__all__ = ["grouped_matmul", "matmul"]


def grouped_matmul(x: Quantized, w: Quantized, group_sizes_E: Array, dtype) -> Array:
    return gmm(dequantize(x), dequantize(w), group_sizes_E, implementation="xla").astype(dtype)
