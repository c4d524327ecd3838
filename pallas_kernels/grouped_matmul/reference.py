"""The definitions: every row times every group's matrix, and a one-hot of the row's group picks one."""

import jax
import jax.numpy as jnp
from jax import Array

F32 = jnp.float32


def member_RE(rows: int, group_sizes_E: Array) -> Array:
    """Boolean [R, E]: row r belongs to group e. Tail rows belong to none."""
    end_E = jnp.cumsum(group_sizes_E)
    row_R1 = jnp.arange(rows)[:, None]
    return (row_R1 >= end_E - group_sizes_E) & (row_R1 < end_E)


def gmm(x_RD: Array, w_EDM: Array, group_sizes_E: Array) -> Array:
    every_REM = jnp.einsum("rd,edm->rem", x_RD, w_EDM, preferred_element_type=F32)
    keep_RE = member_RE(x_RD.shape[0], group_sizes_E)
    return jnp.where(keep_RE[..., None], every_REM, 0).sum(1).astype(x_RD.dtype)


def gmm_t(x_RM: Array, w_EDM: Array, group_sizes_E: Array) -> Array:
    return gmm(x_RM, w_EDM.swapaxes(1, 2), group_sizes_E)


def tgmm(x_RD: Array, y_RM: Array, group_sizes_E: Array) -> Array:
    keep_RE1 = member_RE(x_RD.shape[0], group_sizes_E)[..., None]
    x_RED, y_REM = (jnp.where(keep_RE1, z[:, None], 0) for z in (x_RD, y_RM))
    return jnp.einsum("red,rem->edm", x_RED, y_REM, preferred_element_type=F32)


def expert_mlp(
    x_XD: Array, gate_EDM: Array, up_EDM: Array, down_EMD: Array, experts_XA: Array, weights_XA: Array
) -> Array:
    x_XD32, gate_EDM, up_EDM, down_EMD, weights_XA = (
        z.astype(F32) for z in (x_XD, gate_EDM, up_EDM, down_EMD, weights_XA)
    )
    chosen_XAE = experts_XA[..., None] == jnp.arange(gate_EDM.shape[0])
    weight_XE = jnp.where(chosen_XAE, weights_XA[..., None], 0).sum(1)
    hidden_XEM = jax.nn.silu(jnp.einsum("xd,edm->xem", x_XD32, gate_EDM)) * jnp.einsum("xd,edm->xem", x_XD32, up_EDM)
    return jnp.einsum("xe,xem,emd->xd", weight_XE, hidden_XEM, down_EMD).astype(x_XD.dtype)
