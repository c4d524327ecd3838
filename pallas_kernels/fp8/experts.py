"""The experts of a layer from an implementation's grouped product of 8-bit weights."""

from types import ModuleType

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.fp8.blocks import Quantized, quantize_rows
from pallas_kernels.grouped_matmul import routed


def expert_mlp(
    module: ModuleType,
    x_XD: Array,
    layer: tuple[Quantized, Quantized, Quantized],
    experts_XA: Array,
    weights_XA: Array,
    at_once: int | None,
) -> Array:
    gate, up, down = layer
    x, dtype = quantize_rows(x_XD), x_XD.dtype
    all_rows = routed.rows_of(experts_XA, weights_XA, gate.value.shape[0])

    def add(rows: routed.Rows, y_XD: Array) -> Array:
        x_rows = Quantized(x.value[rows.token_R], x.scale[rows.token_R])
        gate_RM, up_RM = (module.grouped_matmul(x_rows, w, rows.size_E, jnp.float32) for w in (gate, up))
        hidden = quantize_rows((jax.nn.silu(gate_RM) * up_RM).astype(dtype))
        y_RD = module.grouped_matmul(hidden, down, rows.size_E, dtype)
        return routed.add_choices(y_XD, (y_RD,), rows, rows.weight_XA)

    if at_once is None or at_once >= experts_XA.size:
        return add(all_rows, jnp.zeros_like(x_XD))
    return routed.in_passes(all_rows, at_once, add, jnp.zeros_like(x_XD))
