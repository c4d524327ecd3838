"""`expert_mlp` from an implementation's three products, with the routed rows gathered before them and summed after.

The routed rows of x and of the gradient are stored here, expert by expert, in x's dtype; what is kept for the backward pass
is the inputs and the pre-activations of gate and up. Between the products everything is float32.
"""

from functools import reduce
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

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
    x_RD = x_XD[rows.token_R]
    hidden = Hidden(*(products.gmm(x_RD, w.astype(x_XD.dtype), rows.size_E) for w in (gate_EDM, up_EDM)))
    active_RM = (jax.nn.silu(hidden.gate_RM.astype(F32)) * hidden.up_RM.astype(F32)).astype(x_XD.dtype)
    y_RD = products.gmm(active_RM, down_EMD.astype(x_XD.dtype), rows.size_E)
    return _sum_of_choices(y_RD, rows.position_XA, rows.weight_XA).astype(x_XD.dtype), hidden


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
    x_RD, dy_RD, weight_R1 = x_XD[rows.token_R], dy_XD[rows.token_R].astype(dtype), rows.weight_R[:, None]
    gate_RM, up_RM = (z.astype(F32) for z in hidden)
    sigmoid_RM = jax.nn.sigmoid(gate_RM)
    silu_RM = gate_RM * sigmoid_RM
    dactive_RM = products.gmm_t(dy_RD, down_EMD, rows.size_E).astype(F32)  # before the token's weight
    dweight_R = (silu_RM * up_RM * dactive_RM).sum(1)
    ddown_EMD = products.tgmm((silu_RM * up_RM * weight_R1).astype(dtype), dy_RD, rows.size_E)
    dgate_RM = dactive_RM * weight_R1 * up_RM * (sigmoid_RM + silu_RM * (1 - sigmoid_RM))
    dgate_RM, dup_RM = (z.astype(dtype) for z in (dgate_RM, dactive_RM * weight_R1 * silu_RM))
    # two arrays of x's dtype: their sum in float32 would be as large as both, and a third
    dx_RD = (products.gmm_t(dz_RM, w, rows.size_E) for dz_RM, w in ((dgate_RM, gate_EDM), (dup_RM, up_EDM)))
    dx_XD = reduce(jnp.add, (_sum_of_choices(z_RD, rows.position_XA, jnp.ones_like(rows.weight_XA)) for z_RD in dx_RD))
    dgate_EDM, dup_EDM = (products.tgmm(x_RD, dz_RM, rows.size_E) for dz_RM in (dgate_RM, dup_RM))
    return dx_XD, dgate_EDM, dup_EDM, ddown_EMD, dweight_R[rows.position_XA]


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
