"""Products with weights of 8 bits, for rollouts: half the memory and half the traffic of bfloat16 where weights are what costs.

A weight matrix is e4m3 with a float32 scale for each block of 128 x 128, as GLM's FP8 checkpoints have it; rows are
quantised when they come, each with a scale for every 128 of its numbers. The definition is the exact product of what those
stand for: every implementation rounds once, to x's dtype, beside float32 sums. Nothing here is differentiable.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.choose import choose
from pallas_kernels.fp8 import experts, reference, tpu, xla
from pallas_kernels.fp8.blocks import BLOCK, E4M3, LARGEST, Quantized, dequantize, quantize, quantize_rows
from pallas_kernels.grouped_matmul import check_mlp

__all__ = [
    "BLOCK",
    "E4M3",
    "LARGEST",
    "Quantized",
    "dequantize",
    "expert_mlp",
    "grouped_matmul",
    "matmul",
    "quantize",
    "quantize_rows",
]

IMPLEMENTATIONS = {"reference": reference, "xla": xla, "tpu": tpu}


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


def expert_mlp(
    x_XD: Float[Array, "X D"],
    gate: Quantized,
    up: Quantized,
    down: Quantized,
    experts_XA: Int[Array, "X A"],
    weights_XA: Float[Array, "X A"],
    *,
    at_once: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "X D"]:
    """`pallas_kernels.grouped_matmul.expert_mlp` with weights of 8 bits: a token's row is quantised once for all its experts, and
    the hidden layer before the last product. Sums and SwiGLU are float32. Raises ValueError for shapes or dtypes that do not fit."""
    check_mlp(x_XD, gate.value, up.value, down.value, experts_XA, weights_XA, at_once)
    hidden = jax.ShapeDtypeStruct((len(x_XD), gate.value.shape[2]), x_XD.dtype)
    for name, x, w in (("gate", x_XD, gate), ("up", x_XD, up), ("down", hidden, down)):
        _check(f"expert_mlp, {name}", x, w, 3)
    module = choose("fp8.expert_mlp", IMPLEMENTATIONS, implementation, x_XD, gate.value)
    return experts.expert_mlp(module, x_XD, (gate, up, down), experts_XA.astype(jnp.int32), weights_XA, at_once)


def _check(name: str, x: Array | jax.ShapeDtypeStruct, w: Quantized, rank: int) -> None:
    *batch, D, M = w.value.shape if w.value.ndim >= 2 else (0, 0)
    blocks = (*batch, -(-D // BLOCK), -(-M // BLOCK))
    if x.ndim != 2 or w.value.ndim != rank or x.shape[1] != D or w.scale.shape != blocks:
        raise ValueError(
            f"fp8.{name}: x {x.shape}, w {w.value.shape} and its scales {w.scale.shape} do not fit; x is [rows, D], w "
            f"{'[D, M]' if rank == 2 else '[E, D, M]'} with a scale for each {BLOCK} x {BLOCK} of it, as fp8.quantize gives"
        )
    if w.value.dtype != E4M3 or w.scale.dtype != jnp.float32:
        raise ValueError(f"fp8.{name}: w is {w.value.dtype} with {w.scale.dtype} scales; take fp8.quantize's {E4M3}")
