"""Grouped matmul for XLA's CPU back end: a scan over groups, and in each a loop over blocks of its rows.

Groups may start at any row and have any size. A block that reaches beyond its group (or that was moved
back because it would reach beyond the array) writes only its group's rows, so no row is ever padded or copied.
"""

import jax.numpy as jnp
from jax import Array, lax

BLOCK_ROWS = 128


def _block(rows: int) -> int:
    return min(BLOCK_ROWS, rows)


def _rows(start: Array, end: Array, i: Array, block: int, rows: int) -> tuple[Array, Array]:
    """First row of the group's i-th block, and the boolean [block, 1] of its rows that are the group's and not an earlier block's."""
    wanted = start + i * block
    first = jnp.minimum(wanted, rows - block)
    row_b1 = first + jnp.arange(block)[:, None]
    return first, (row_b1 >= wanted) & (row_b1 < end)


def _grouped(x_RD: Array, w_EDM: Array, group_sizes_E: Array, contract: int) -> Array:
    """Rows of x times their group's matrix, over that matrix's dimension `contract` (0 or 1)."""
    rows, block = x_RD.shape[0], _block(x_RD.shape[0])
    end_E = jnp.cumsum(group_sizes_E)

    def group(y_RM, per_group):
        w_DM, size, end = per_group

        def step(i, y_RM):
            first, keep_b1 = _rows(end - size, end, i, block, rows)
            x_bD = lax.dynamic_slice_in_dim(x_RD, first, block)
            new_bM = lax.dot_general(x_bD, w_DM, (((1,), (contract,)), ((), ())), preferred_element_type=jnp.float32)
            old_bM = lax.dynamic_slice_in_dim(y_RM, first, block)
            return lax.dynamic_update_slice_in_dim(y_RM, jnp.where(keep_b1, new_bM.astype(y_RM.dtype), old_bM), first, 0)

        return lax.fori_loop(0, (size + block - 1) // block, step, y_RM), None

    zeros_RM = lax.full_like(x_RD, 0, shape=(rows, w_EDM.shape[2 - contract]))
    return lax.scan(group, zeros_RM, (w_EDM, group_sizes_E, end_E))[0]


def gmm(x_RD: Array, w_EDM: Array, group_sizes_E: Array) -> Array:
    return _grouped(x_RD, w_EDM, group_sizes_E, contract=0)


def gmm_t(x_RM: Array, w_EDM: Array, group_sizes_E: Array) -> Array:
    return _grouped(x_RM, w_EDM, group_sizes_E, contract=1)


def tgmm(x_RD: Array, y_RM: Array, group_sizes_E: Array) -> Array:
    rows, block = x_RD.shape[0], _block(x_RD.shape[0])
    zeros_DM = lax.full_like(x_RD, 0, shape=(x_RD.shape[1], y_RM.shape[1]), dtype=jnp.float32)

    def group(_, per_group):
        size, end = per_group

        def step(i, sum_DM):
            first, keep_b1 = _rows(end - size, end, i, block, rows)
            x_bD, y_bM = (jnp.where(keep_b1, lax.dynamic_slice_in_dim(z, first, block), 0) for z in (x_RD, y_RM))
            return sum_DM + lax.dot_general(x_bD, y_bM, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

        return None, lax.fori_loop(0, (size + block - 1) // block, step, zeros_DM)

    return lax.scan(group, None, (group_sizes_E, jnp.cumsum(group_sizes_E)))[1]
