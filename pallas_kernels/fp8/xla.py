"""For any back end: the weights of a product are dequantised before it, whole where there are no groups."""

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.fp8 import reference
from pallas_kernels.fp8.blocks import E4M3, Quantized, dequantize
from pallas_kernels.grouped_matmul import gmm


def matmul(x: Quantized, w: Quantized, dtype) -> Array:
    return reference.matmul(x, _beside(x, w), dtype)


def grouped_matmul(x: Quantized, w: Quantized, group_sizes_E: Array, dtype) -> Array:
    return gmm(dequantize(x), dequantize(_beside(x, w)), group_sizes_E, implementation="xla").astype(dtype)


def _beside(x: Quantized, w: Quantized) -> Quantized:
    """`w`, as if x had a say in it: a sampler's loop would have all its weights dequantised before it begins, and hold them as float32.
    (A barrier does not keep XLA from it.) No scale is negative."""
    bits = lax.bitcast_convert_type(w.value, jnp.uint8)
    bits = jnp.where(jnp.any(x.scale < 0), jnp.zeros_like(bits), bits)
    return w._replace(value=lax.bitcast_convert_type(bits, E4M3))
