"""`expert_mlp` from an implementation's three products, or from the layer's own where it has them, and sums of their rows.

What is kept for the backward pass is the inputs and the pre-activations of gate and up. The routed rows of the result and of
the gradient are stored while they are needed, expert by expert, in x's dtype; those of x for the weights' gradient, and in the
forward pass unless the layer's own product gathers them. Between the products everything is float32.
"""

from functools import partial, reduce
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.grouped_matmul import tpu, tpu_layer
from pallas_kernels.routing import position_map, row_order

F32 = jnp.float32
SUM_TOKENS = 1024  # whose choices are added at once


class Rows(NamedTuple):
    """Where the (token, choice) pairs stand, expert by expert. Those of no expert here come last: in the tail, which is zero."""

    token_R: Array
    position_XA: Array
    weight_R: Array  # float32, as weight_XA, which is zero where the expert is not here
    weight_XA: Array
    size_E: Array


class Hidden(NamedTuple):
    gate_RM: Array
    up_RM: Array


def _rows(experts_XA: Array, weights_XA: Array, groups: int) -> Rows:
    position_R, size_E = position_map(experts_XA.reshape(-1), groups)
    order_R = row_order(position_R)
    here_XA = (experts_XA >= 0) & (experts_XA < groups)
    weight_XA = jnp.where(here_XA, weights_XA.astype(F32), 0)
    position_XA = position_R.reshape(experts_XA.shape)
    return Rows(order_R // experts_XA.shape[1], position_XA, weight_XA.reshape(-1)[order_R], weight_XA, size_E)


def expert_mlp(
    products: ModuleType,
    x_XD: Array,
    gate_EDM: Array,
    up_EDM: Array,
    down_EMD: Array,
    experts_XA: Array,
    weights_XA: Array,
) -> tuple[Array, Hidden]:
    """y_XD, and what the backward pass needs beside the inputs."""
    rows = _rows(experts_XA, weights_XA, gate_EDM.shape[0])
    gate_EDM, up_EDM, down_EMD = (w.astype(x_XD.dtype) for w in (gate_EDM, up_EDM, down_EMD))
    layer = _layer(products, x_XD)
    if layer is not None:
        gate_RM, up_RM, active_RM = layer.gate_up(x_XD, rows.token_R, gate_EDM, up_EDM, rows.size_E)
    else:
        x_RD = x_XD[rows.token_R]
        gate_RM, up_RM = (products.gmm(x_RD, w, rows.size_E) for w in (gate_EDM, up_EDM))
        active_RM = (jax.nn.silu(gate_RM.astype(F32)) * up_RM.astype(F32)).astype(x_XD.dtype)
    y_RD = products.gmm(active_RM, down_EMD, rows.size_E)
    y_XD = _sum_of_choices(y_RD, rows.position_XA, rows.weight_XA).astype(x_XD.dtype)
    return y_XD, Hidden(gate_RM, up_RM)


def expert_mlp_grad(
    products: ModuleType,
    x_XD: Array,
    gate_EDM: Array,
    up_EDM: Array,
    down_EMD: Array,
    experts_XA: Array,
    weights_XA: Array,
    hidden: Hidden,
    dy_XD: Array,
) -> tuple[Array, Array, Array, Array, Array]:
    """Gradients for x, gate, up, down and weights, in float32."""
    dtype, rows = x_XD.dtype, _rows(experts_XA, weights_XA, gate_EDM.shape[0])
    gate_EDM, up_EDM, down_EMD = (w.astype(dtype) for w in (gate_EDM, up_EDM, down_EMD))
    dy_RD = dy_XD[rows.token_R].astype(dtype)
    layer = _layer(products, x_XD)
    hidden_grad = partial(_hidden_grad, products) if layer is None else layer.hidden_grad
    of_hidden = hidden_grad(dy_RD, down_EMD, *hidden, rows.weight_R, rows.size_E)
    dgate_RM, dup_RM, scaled_RM, dweight_R = of_hidden
    ddown_EMD = products.tgmm(scaled_RM, dy_RD, rows.size_E)
    if layer is not None:
        dx_RDs = (layer.rows_grad(dgate_RM, dup_RM, gate_EDM, up_EDM, rows.size_E),)
    else:  # two arrays of x's dtype: their sum in float32 would be as large as both, and a third
        dx_RDs = (products.gmm_t(dz, w, rows.size_E) for dz, w in ((dgate_RM, gate_EDM), (dup_RM, up_EDM)))
    each = jnp.ones_like(rows.weight_XA)
    dx_XD = reduce(jnp.add, (_sum_of_choices(dx_RD, rows.position_XA, each) for dx_RD in dx_RDs))
    x_RD = x_XD[rows.token_R]
    dgate_EDM, dup_EDM = (products.tgmm(x_RD, dz_RM, rows.size_E) for dz_RM in (dgate_RM, dup_RM))
    return dx_XD, dgate_EDM, dup_EDM, ddown_EMD, dweight_R[rows.position_XA]


def _layer(products: ModuleType, x_XD: Array) -> ModuleType | None:
    """The products that an implementation has for the layer itself."""
    return tpu_layer if products is tpu and tpu_layer.takes(x_XD) else None


def _hidden_grad(
    products: ModuleType,
    dy_RD: Array,
    down_EMD: Array,
    gate_RM: Array,
    up_RM: Array,
    weight_R: Array,
    size_E: Array,
) -> tuple[Array, Array, Array, Array]:
    """Gradients of gate and up, the weighted hidden layer, and the weight's gradient."""
    gate_RM, up_RM, weight_R1 = gate_RM.astype(F32), up_RM.astype(F32), weight_R[:, None]
    sigmoid_RM = jax.nn.sigmoid(gate_RM)
    silu_RM = gate_RM * sigmoid_RM
    dactive_RM = products.gmm_t(dy_RD, down_EMD, size_E).astype(F32)  # before the token's weight
    dgate_RM = dactive_RM * weight_R1 * up_RM * (sigmoid_RM + silu_RM * (1 - sigmoid_RM))
    dup_RM, scaled_RM = dactive_RM * weight_R1 * silu_RM, silu_RM * up_RM * weight_R1
    dgate_RM, dup_RM, scaled_RM = (z.astype(dy_RD.dtype) for z in (dgate_RM, dup_RM, scaled_RM))
    return dgate_RM, dup_RM, scaled_RM, (silu_RM * up_RM * dactive_RM).sum(1)


def _sum_of_choices(y_RD: Array, position_XA: Array, weight_XA: Array) -> Array:
    """Per token the weighted sum of its rows, in float32: a choice at a time, so that no [X,A,D] is ever stored, and of a few
    tokens at a time: the compilers gather all choices' rows before they add them."""

    def summed(some: tuple[Array, Array]) -> Array:
        position_PA, weight_PA = some
        of_choice = (weight_PA[:, a, None] * y_RD[position_PA[:, a]].astype(F32) for a in range(position_PA.shape[1]))
        return reduce(jnp.add, of_choice)

    tokens, choices = position_XA.shape
    if tokens <= SUM_TOKENS or tokens % SUM_TOKENS:
        return summed((position_XA, weight_XA))
    pieces = jax.lax.map(summed, tuple(z.reshape(-1, SUM_TOKENS, choices) for z in (position_XA, weight_XA)))
    return pieces.reshape(tokens, -1)
