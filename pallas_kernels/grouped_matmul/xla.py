"""Grouped matmul for XLA's CPU back end: a scan over groups, and in each a loop over blocks of its rows.

Groups may start at any row and have any size, so a block may reach beyond its group (or be moved back where it would
reach beyond the array): it then writes its group's rows only, and nothing is ever padded or copied. Blocks are small
enough for the cache, so what `expert_mlp` computes between its two gathers never reaches memory.
Everything is computed in float32, loops' carries included: XLA's CPU back end converts bfloat16 in any case, and a
bfloat16 buffer that a loop writes to would be converted whole, at each step.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.routing import position_map, row_order

F32 = jnp.float32
SMALLEST_BLOCK, LARGEST_BLOCK = 32, 256
Carry = TypeVar("Carry")


def block_rows(rows: int, groups: int) -> int:
    """Rows of a block: a quarter of an average group as a power of two, so that its last block wastes little."""
    quarter = max(1, rows // (4 * groups))
    return min(max(SMALLEST_BLOCK, 1 << (quarter.bit_length() - 1)), LARGEST_BLOCK, rows)


def over_blocks(
    size: Array, end: Array, rows: int, block: int, body: Callable[[Array, Array, Carry], Carry], carry: Carry
) -> Carry:
    """`carry = body(first, keep_b1, carry)` for each block of the group's rows end-size..end.

    `first` is the block's first row, never beyond `rows - block`; `keep_b1` is true for those of its rows that are
    the group's and not an earlier block's.
    """

    def step(i, carry):
        wanted = end - size + i * block
        first = jnp.minimum(wanted, rows - block)
        row_b1 = first + jnp.arange(block)[:, None]
        return body(first, (row_b1 >= wanted) & (row_b1 < end), carry)

    return lax.fori_loop(0, (size + block - 1) // block, step, carry)


def _zeros(like: Array, *shape: int) -> Array:
    """Float32 zeros that vary over the same mesh axes as `like`, which a loop's carry must."""
    return lax.full_like(like, 0, shape=shape, dtype=F32)


def _dot(a: Array, b: Array, contract_a: int, contract_b: int) -> Array:
    return lax.dot_general(a.astype(F32), b.astype(F32), (((contract_a,), (contract_b,)), ((), ())))


def _take(z: Array, first: Array, block: int) -> Array:
    return lax.dynamic_slice_in_dim(z, first, block)


def _put(z: Array, new_b: Array, keep_b: Array, first: Array) -> Array:
    """`z` with the kept rows of the block that starts at `first` replaced."""
    old_b = _take(z, first, new_b.shape[0])
    return lax.dynamic_update_slice_in_dim(z, jnp.where(keep_b, new_b.astype(z.dtype), old_b), first, 0)


def _grouped(x_RD: Array, w_EDM: Array, group_sizes_E: Array, contract: int) -> Array:
    """Rows of x times their group's matrix, over that matrix's dimension `contract` (0 or 1)."""
    rows, block = x_RD.shape[0], block_rows(x_RD.shape[0], w_EDM.shape[0])

    def group(y_RM, of_group):
        w_DM, size, end = of_group

        def body(first, keep_b1, y_RM):
            return _put(y_RM, _dot(_take(x_RD, first, block), w_DM, 1, contract), keep_b1, first)

        return over_blocks(size, end, rows, block, body, y_RM), None

    zeros_RM = _zeros(x_RD, rows, w_EDM.shape[2 - contract])
    y_RM = lax.scan(group, zeros_RM, (w_EDM.astype(F32), group_sizes_E, jnp.cumsum(group_sizes_E)))[0]
    return y_RM.astype(x_RD.dtype)


def gmm(x_RD: Array, w_EDM: Array, group_sizes_E: Array) -> Array:
    return _grouped(x_RD, w_EDM, group_sizes_E, contract=0)


def gmm_t(x_RM: Array, w_EDM: Array, group_sizes_E: Array) -> Array:
    return _grouped(x_RM, w_EDM, group_sizes_E, contract=1)


def tgmm(x_RD: Array, y_RM: Array, group_sizes_E: Array) -> Array:
    """Whole blocks of a group's rows, and one product for what is left: each sum that is written costs as much as many rows."""
    rows = x_RD.shape[0]
    whole = min(LARGEST_BLOCK, rows)
    left_sizes = [*range(SMALLEST_BLOCK, whole, SMALLEST_BLOCK), whole]

    def product(wanted, stop, block: int):
        """Of the rows wanted..stop, at most `block`."""
        first = jnp.minimum(wanted, rows - block)
        row_b1 = first + jnp.arange(block)[:, None]
        keep_b1 = (row_b1 >= wanted) & (row_b1 < stop)
        x_bD, y_bM = (jnp.where(keep_b1, _take(z, first, block), 0) for z in (x_RD, y_RM))
        return _dot(x_bD, y_bM, 0, 0)

    def group(_, of_group):
        size, end = of_group
        start, blocks = end - size, jnp.maximum(size - 1, 0) // whole
        left = start + blocks * whole
        branches = [partial(product, block=block) for block in left_sizes]
        sum_DM = lax.switch(jnp.maximum(end - left - 1, 0) // SMALLEST_BLOCK, branches, left, end)
        return None, lax.fori_loop(0, blocks, lambda i, sum_DM: sum_DM + product(start + i * whole, end, whole), sum_DM)

    return lax.scan(group, None, (group_sizes_E, jnp.cumsum(group_sizes_E)))[1]


def _in_expert_order(experts_XA: Array, weights_XA: Array, groups: int) -> tuple[Array, Array, Array, Array]:
    """The (token, choice) pairs expert by expert: which pair, its token, its weight in float32; and rows per expert."""
    position_R, size_E = position_map(experts_XA.reshape(-1), groups)
    order_R = row_order(position_R)
    return order_R, order_R // experts_XA.shape[1], weights_XA.reshape(-1)[order_R].astype(F32), size_E


def expert_mlp(
    x_XD: Array, gate_EDM: Array, up_EDM: Array, down_EMD: Array, experts_XA: Array, weights_XA: Array
) -> Array:
    if x_XD.shape[0] <= SMALLEST_BLOCK:
        return _all_experts(x_XD, gate_EDM, up_EDM, down_EMD, experts_XA, weights_XA)
    (E, _, M), rows = gate_EDM.shape, experts_XA.size
    block = block_rows(rows, E)
    _, token_R, weight_R, size_E = _in_expert_order(experts_XA, weights_XA, E)

    def group(y_XD, of_group):
        gate_DM, up_DM, down_MD, size, end = of_group
        gate_up_DW = jnp.concatenate([gate_DM, up_DM], 1).astype(F32)
        down_MD = down_MD.astype(F32)

        def body(first, keep_b1, y_XD):
            token_b = _take(token_R, first, block)
            hidden_bW = _dot(x_XD[token_b], gate_up_DW, 1, 0)
            active_bM = jax.nn.silu(hidden_bW[:, :M]) * hidden_bW[:, M:] * _take(weight_R, first, block)[:, None]
            return y_XD.at[token_b].add(jnp.where(keep_b1, _dot(active_bM, down_MD, 1, 0), 0))

        return over_blocks(size, end, rows, block, body, y_XD), None

    of_groups = (gate_EDM, up_EDM, down_EMD, size_E, jnp.cumsum(size_E))
    return lax.scan(group, _zeros(x_XD, *x_XD.shape), of_groups)[0].astype(x_XD.dtype)


def _all_experts(
    x_XD: Array, gate_EDM: Array, up_EDM: Array, down_EMD: Array, experts_XA: Array, weights_XA: Array
) -> Array:
    """Every token through every expert: with few tokens the weights' way from memory is the whole cost, and this reads them once: all
    experts' in one product, as its first factor, and in order where they are held with what is summed over innermost, [E, M, D]
    and [D, E, M] (`glm_jax.sample.weights`)."""
    E, D, M = gate_EDM.shape
    chosen_XAE = experts_XA[..., None] == jnp.arange(E)
    weight_EX = jnp.where(chosen_XAE, weights_XA[..., None].astype(F32), 0).sum(1).T

    def product(w: Array, z: Array) -> Array:
        """Behind barriers, or the compiler takes the transpositions before and after into it, with the tokens as first factor."""
        return lax.optimization_barrier(w.astype(F32) @ lax.optimization_barrier(z.astype(F32)))

    gate_EMX, up_EMX = (
        product(w.swapaxes(1, 2).reshape(E * M, D), x_XD.T).reshape(E, M, -1) for w in (gate_EDM, up_EDM)
    )
    active_EMX = jnp.where(weight_EX[:, None] == 0, 0, jax.nn.silu(gate_EMX) * up_EMX * weight_EX[:, None])
    y_DX = product(down_EMD.transpose(2, 0, 1).reshape(D, E * M), active_EMX.reshape(E * M, -1))
    return y_DX.T.astype(x_XD.dtype)


def expert_mlp_grad(
    x_XD: Array, gate_EDM: Array, up_EDM: Array, down_EMD: Array, experts_XA: Array, weights_XA: Array, dy_XD: Array
) -> tuple[Array, Array, Array, Array, Array]:
    """Gradients of `expert_mlp` for x, gate, up, down and weights; the hidden layer is computed again, block by block."""
    (E, D, M), rows = gate_EDM.shape, experts_XA.size
    block = block_rows(rows, E)
    order_R, token_R, weight_R, size_E = _in_expert_order(experts_XA, weights_XA, E)

    def group(carry, of_group):
        gate_DM, up_DM, down_MD, size, end = of_group
        gate_up_DW = jnp.concatenate([gate_DM, up_DM], 1).astype(F32)
        down_MD = down_MD.astype(F32)

        def body(first, keep_b1, carry):
            dx_XD, dweight_R, dgate_up_DW, ddown_MD = carry
            token_b, weight_b1 = _take(token_R, first, block), _take(weight_R, first, block)[:, None]
            x_bD, dy_bD = (jnp.where(keep_b1, z[token_b].astype(F32), 0) for z in (x_XD, dy_XD))
            hidden_bW = _dot(x_bD, gate_up_DW, 1, 0)
            gate_bM, up_bM = hidden_bW[:, :M], hidden_bW[:, M:]
            sigmoid_bM = jax.nn.sigmoid(gate_bM)
            silu_bM = gate_bM * sigmoid_bM
            dactive_bM = _dot(dy_bD, down_MD, 1, 1)
            dweight_R = _put(dweight_R, (silu_bM * up_bM * dactive_bM).sum(1), keep_b1[:, 0], first)
            ddown_MD += _dot(silu_bM * up_bM * weight_b1, dy_bD, 0, 0)
            dgate_bM = dactive_bM * weight_b1 * up_bM * (sigmoid_bM + silu_bM * (1 - sigmoid_bM))
            dhidden_bW = jnp.concatenate([dgate_bM, dactive_bM * weight_b1 * silu_bM], 1)
            dx_XD = dx_XD.at[token_b].add(_dot(dhidden_bW, gate_up_DW, 1, 1))
            return dx_XD, dweight_R, dgate_up_DW + _dot(x_bD, dhidden_bW, 0, 0), ddown_MD

        carry = (*carry, _zeros(x_XD, D, 2 * M), _zeros(x_XD, M, D))
        dx_XD, dweight_R, dgate_up_DW, ddown_MD = over_blocks(size, end, rows, block, body, carry)
        return (dx_XD, dweight_R), (dgate_up_DW[:, :M], dgate_up_DW[:, M:], ddown_MD)

    of_groups = (gate_EDM, up_EDM, down_EMD, size_E, jnp.cumsum(size_E))
    (dx_XD, dweight_R), dexperts = lax.scan(group, (_zeros(x_XD, *x_XD.shape), _zeros(x_XD, rows)), of_groups)
    dweights_XA = jnp.zeros_like(dweight_R).at[order_R].set(dweight_R).reshape(experts_XA.shape)
    return dx_XD, *dexperts, dweights_XA
