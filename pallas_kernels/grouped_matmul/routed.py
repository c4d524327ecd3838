"""`expert_mlp` from an implementation's three products, or from the layer's own where it has them, and sums of their rows.

What is kept for the backward pass is the inputs and the pre-activations of gate and up. The routed rows of the result and of
the gradient are stored while they are needed, expert by expert, in x's dtype; those of x for the weights' gradient, and in the
forward pass unless the layer's own product gathers them. Between the products everything is float32.

With `at_once` no more than so many routed rows are stored at a time. There is a pass over the experts' rows for each so many
that there really are: under expert parallelism a device has room for few, and takes more passes where it is sent more.
"""

from collections.abc import Callable
from functools import partial, reduce
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.grouped_matmul import tpu, tpu_layer
from pallas_kernels.routing import position_map, row_order

F32 = jnp.float32
SUM_TOKENS = 512  # whose choices are added at once
Carry = TypeVar("Carry")
Layer = tuple[Array, Array, Array]  # gate_EDM, up_EDM, down_EMD, or their gradients


class Rows(NamedTuple):
    """Where (token, choice) pairs stand, expert by expert: all of them, or R that follow one another. Those of no expert here come
    last: in the tail, which is zero."""

    token_R: Array
    position_XA: Array
    here_XA: Array  # whether the choice is one of these rows
    weight_R: Array  # float32, as weight_XA
    weight_XA: Array
    size_E: Array


class Hidden(NamedTuple):
    gate_RM: Array
    up_RM: Array


def expert_mlp(
    products: ModuleType,
    x_XD: Array,
    gate_EDM: Array,
    up_EDM: Array,
    down_EMD: Array,
    experts_XA: Array,
    weights_XA: Array,
    at_once: int | None = None,
) -> tuple[Array, Hidden | None]:
    """y_XD, and what the backward pass needs beside the inputs; nothing where rows come in passes of `at_once`."""
    gate_EDM, up_EDM, down_EMD = (w.astype(x_XD.dtype) for w in (gate_EDM, up_EDM, down_EMD))
    all_rows = rows_of(experts_XA, weights_XA, gate_EDM.shape[0])
    source = _source(products, x_XD, gate_EDM)

    def add(rows: Rows, y_XD: Array) -> tuple[Array, Hidden]:
        hidden, active_RM = _gate_up(products, source, gate_EDM, up_EDM, rows)
        y_RD = products.gmm(active_RM, down_EMD, rows.size_E)
        return add_choices(y_XD, (y_RD,), rows, rows.weight_XA), hidden

    if at_once is None or at_once >= experts_XA.size:
        return add(all_rows, jnp.zeros_like(x_XD))
    return in_passes(all_rows, at_once, lambda rows, y_XD: add(rows, y_XD)[0], jnp.zeros_like(x_XD)), None


def expert_mlp_grad(
    products: ModuleType,
    x_XD: Array,
    gate_EDM: Array,
    up_EDM: Array,
    down_EMD: Array,
    experts_XA: Array,
    weights_XA: Array,
    hidden: Hidden | None,
    dy_XD: Array,
    sums: Layer | None = None,
    at_once: int | None = None,
) -> tuple[Array, Array, Layer]:
    """Gradients for x, in its type, for weights, in float32, and for the layer: added to `sums`, or in float32. Without `hidden` it is
    computed again."""
    gate_EDM, up_EDM, down_EMD = (w.astype(x_XD.dtype) for w in (gate_EDM, up_EDM, down_EMD))
    all_rows = rows_of(experts_XA, weights_XA, gate_EDM.shape[0])
    dx_XD, dweight_XA = jnp.zeros_like(x_XD), jnp.zeros_like(all_rows.weight_XA)
    source = _source(products, x_XD, gate_EDM)

    def add(rows: Rows, found: tuple[Array, Array, Layer | None]) -> tuple[Array, Array, Layer]:
        pre = hidden or _gate_up(products, source, gate_EDM, up_EDM, rows)[0]
        return _add_gradients(products, rows, x_XD, (gate_EDM, up_EDM, down_EMD), pre, dy_XD, found)

    if at_once is None or at_once >= experts_XA.size:
        return add(all_rows, (dx_XD, dweight_XA, sums))
    sums = sums or (jnp.zeros_like(gate_EDM), jnp.zeros_like(up_EDM), jnp.zeros_like(down_EMD))
    return in_passes(all_rows, at_once, add, (dx_XD, dweight_XA, sums))


def tgmm(products: ModuleType, x_RD: Array, y_RM: Array, group_sizes_E: Array, sums_EDM: Array | None) -> Array:
    """The product added to `sums`, in their own memory where the implementation can; without any, in float32."""
    if sums_EDM is None:
        return products.tgmm(x_RD, y_RM, group_sizes_E)
    if products is tpu:
        return tpu.tgmm(x_RD, y_RM, group_sizes_E, sums_EDM)
    return (sums_EDM + products.tgmm(x_RD, y_RM, group_sizes_E)).astype(sums_EDM.dtype)


def rows_of(experts_XA: Array, weights_XA: Array, groups: int) -> Rows:
    """All of them; an expert outside 0..groups - 1 is not here."""
    position_R, size_E = position_map(experts_XA.reshape(-1), groups)
    order_R = row_order(position_R)
    here_XA = (experts_XA >= 0) & (experts_XA < groups)
    weight_XA = jnp.where(here_XA, weights_XA.astype(F32), 0)
    position_XA = position_R.reshape(experts_XA.shape)
    token_R, weight_R = order_R // experts_XA.shape[1], weight_XA.reshape(-1)[order_R]
    return Rows(token_R, position_XA, here_XA, weight_R, weight_XA, size_E)


def in_passes(rows: Rows, at_once: int, add: Callable[[Rows, Any], Carry], carry: Carry) -> Carry:
    """`carry = add(rows, carry)` for `at_once` rows after the other, until those of the experts here are done: how many passes
    that takes is known on the device alone."""
    end_E, left = jnp.cumsum(rows.size_E), -len(rows.token_R) % at_once
    token_R, weight_R = jnp.pad(rows.token_R, (0, left)), jnp.pad(rows.weight_R, (0, left))

    def one(i: Array, carry: Carry) -> Carry:
        first = i * at_once
        position_XA = rows.position_XA - first
        here_XA = rows.here_XA & (position_XA >= 0) & (position_XA < at_once)
        stop_E = jnp.clip(end_E - first, 0, at_once)
        start_E = jnp.clip(end_E - rows.size_E - first, 0, at_once)
        token_C, weight_C = (jax.lax.dynamic_slice_in_dim(z, first, at_once) for z in (token_R, weight_R))
        position_XA = jnp.clip(position_XA, 0, at_once - 1)
        return add(Rows(token_C, position_XA, here_XA, weight_C, rows.weight_XA, stop_E - start_E), carry)

    return jax.lax.fori_loop(0, (end_E[-1] + at_once - 1) // at_once, one, carry)


def _add_gradients(
    products: ModuleType,
    rows: Rows,
    x_XD: Array,
    layer: Layer,
    hidden: Hidden,
    dy_XD: Array,
    found: tuple[Array, Array, Layer | None],
) -> tuple[Array, Array, Layer]:
    """What was found, with that of `rows` added. Barriers keep no more than one routed array of x's width at a time."""
    (gate_EDM, up_EDM, down_EMD), (dx_XD, dweight_XA, sums) = layer, found
    gate_sums, up_sums, down_sums = sums or (None, None, None)
    own, size_E = _layer(products, gate_EDM), rows.size_E
    dy_RD = dy_XD[rows.token_R].astype(x_XD.dtype)
    hidden_grad = partial(_hidden_grad, products) if own is None else own.hidden_grad
    dgate_RM, dup_RM, scaled_RM, dweight_R = hidden_grad(dy_RD, down_EMD, *hidden, rows.weight_R, size_E)
    ddown_EMD = tgmm(products, scaled_RM, dy_RD, size_E, down_sums)
    dgate_RM, dup_RM, ddown_EMD = jax.lax.optimization_barrier((dgate_RM, dup_RM, ddown_EMD))
    if own is not None:
        dx_RDs = (own.rows_grad(dgate_RM, dup_RM, gate_EDM, up_EDM, size_E),)
    else:  # two arrays of x's dtype: their sum in float32 would be as large as both, and a third
        dx_RDs = (products.gmm_t(dz, w, size_E) for dz, w in ((dgate_RM, gate_EDM), (dup_RM, up_EDM)))
    dx_XD = add_choices(dx_XD, tuple(dx_RDs), rows, jnp.ones_like(rows.weight_XA))
    dgate_RM, dup_RM, dx_XD = jax.lax.optimization_barrier((dgate_RM, dup_RM, dx_XD))
    x_RD = x_XD[rows.token_R]
    dgate_EDM = tgmm(products, x_RD, dgate_RM, size_E, gate_sums)
    dup_EDM = tgmm(products, x_RD, dup_RM, size_E, up_sums)
    dweight_XA += jnp.where(rows.here_XA, dweight_R[rows.position_XA], 0)
    return dx_XD, dweight_XA, (dgate_EDM, dup_EDM, ddown_EMD)


def _source(products: ModuleType, x_XD: Array, gate_EDM: Array) -> Array:
    """What `_gate_up` takes its rows from; made once for all passes."""
    layer = _layer(products, gate_EDM)
    return x_XD if layer is None else layer.words(x_XD)


def _gate_up(products: ModuleType, source: Array, gate_EDM: Array, up_EDM: Array, rows: Rows) -> tuple[Hidden, Array]:
    """The pre-activations, and silu(gate) * up in x's dtype, which is that of the layer."""
    layer = _layer(products, gate_EDM)
    if layer is not None:
        gate_RM, up_RM, active_RM = layer.gate_up(source, rows.token_R, gate_EDM, up_EDM, rows.size_E)
    else:
        x_RD = source[rows.token_R]
        gate_RM, up_RM = (products.gmm(x_RD, w, rows.size_E) for w in (gate_EDM, up_EDM))
        active_RM = (jax.nn.silu(gate_RM.astype(F32)) * up_RM.astype(F32)).astype(source.dtype)
    return Hidden(gate_RM, up_RM), active_RM


def _layer(products: ModuleType, gate_EDM: Array) -> ModuleType | None:
    """The products that an implementation has for the layer itself."""
    return tpu_layer if products is tpu and tpu_layer.takes(gate_EDM) else None


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


def add_choices(onto_XD: Array, of_rows: tuple[Array, ...], rows: Rows, weight_XA: Array) -> Array:
    """Onto each token the weighted sum of its rows, added in float32: a choice at a time, so that no [X,A,D] is ever stored, and
    of a few tokens at a time: the compilers gather all choices' rows before they add them."""

    def added(onto_PD: Array, position_PA: Array, here_PA: Array, weight_PA: Array) -> Array:
        of_choice = (
            jnp.where(here_PA[:, a, None], weight_PA[:, a, None] * z_RD[position_PA[:, a]].astype(F32), 0)
            for a in range(position_PA.shape[1])
            for z_RD in of_rows
        )
        return reduce(jnp.add, of_choice, onto_PD.astype(F32)).astype(onto_PD.dtype)

    tokens = len(onto_XD)
    of_tokens = rows.position_XA, rows.here_XA, weight_XA
    if tokens <= SUM_TOKENS or tokens % SUM_TOKENS:
        return added(onto_XD, *of_tokens)

    def piece(i: Array, onto_XD: Array) -> Array:
        first = i * SUM_TOKENS
        some = (jax.lax.dynamic_slice_in_dim(z, first, SUM_TOKENS) for z in (onto_XD, *of_tokens))
        return jax.lax.dynamic_update_slice_in_dim(onto_XD, added(*some), first, 0)

    return jax.lax.fori_loop(0, tokens // SUM_TOKENS, piece, onto_XD)
