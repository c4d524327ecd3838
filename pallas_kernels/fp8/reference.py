"""The definitions: products of what the quantised numbers stand for."""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.fp8.blocks import Quantized, dequantize
from pallas_kernels.grouped_matmul import gmm


def matmul(x: Quantized, w: Quantized, dtype) -> Array:
    return jnp.matmul(dequantize(x), dequantize(w), precision="highest").astype(dtype)


def grouped_matmul(x: Quantized, w: Quantized, group_sizes_E: Array, dtype) -> Array:
    return gmm(dequantize(x), dequantize(w), group_sizes_E, implementation="reference").astype(dtype)
