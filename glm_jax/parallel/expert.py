"""Expert dispatch, dropless: all-gather, local route, grouped matmul, reduce-scatter, inside one shard_map.

Every device holds E/expert experts. It gathers the tokens of its expert axis, sorts the (token, choice) pairs that
chose one of its experts into rows by expert, runs them, and the sums go back to where the tokens came from. Shapes
are static for the worst case; rows behind the last real one are zero and cost a kernel nothing.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from glm_jax import mesh
from pallas_kernels.grouped_matmul import gmm


def routed_experts(
    x_BTD: Array, experts_BTA: Array, weights_BTA: Array, gate_EDM: Array, up_EDM: Array, down_EMD: Array
) -> Array:
    """y_BTD = sum over a token's chosen experts of weight * down(silu(gate x) * up x)."""
    if not mesh.active():
        return _local(x_BTD, experts_BTA, weights_BTA, gate_EDM, up_EDM, down_EMD, shards=1)
    tokens, expert = mesh.activation("BTD"), P(mesh.EXPERT)
    run = partial(_local, shards=mesh.axis_size(mesh.EXPERT))
    return jax.shard_map(run, in_specs=(tokens,) * 3 + (expert,) * 3, out_specs=tokens)(
        x_BTD, experts_BTA, weights_BTA, gate_EDM, up_EDM, down_EMD
    )


def _local(x_BTD, experts_BTA, weights_BTA, gate_EDM, up_EDM, down_EMD, *, shards: int) -> Array:
    x_XD, experts_XA, weights_XA = (z.reshape(-1, z.shape[-1]) for z in (x_BTD, experts_BTA, weights_BTA))
    if mesh.active():
        x_XD, experts_XA, weights_XA = (
            jax.lax.all_gather(z, mesh.EXPERT, tiled=True) for z in (x_XD, experts_XA, weights_XA)
        )
        gate_EDM, up_EDM, down_EMD = (
            jax.lax.pcast(w, tuple(a for a in mesh.AXES if a != mesh.EXPERT), to="varying")
            for w in (gate_EDM, up_EDM, down_EMD)
        )
        experts_XA = experts_XA - jax.lax.axis_index(mesh.EXPERT) * gate_EDM.shape[0]

    pair_R, position_XA, sizes_E = position_map(experts_XA, gate_EDM.shape[0])
    token_R = pair_R // experts_XA.shape[1]
    x_RD = dispatch(x_XD, token_R, position_XA)
    weight_R1 = dispatch(weights_XA.reshape(-1, 1), pair_R, position_XA.reshape(-1, 1))
    h_RM = jax.nn.silu(gmm(x_RD, gate_EDM, sizes_E)) * gmm(x_RD, up_EDM, sizes_E)
    h_RM = (h_RM * weight_R1).astype(h_RM.dtype)  # before the down projection, where a row is narrowest
    y_XD = combine(gmm(h_RM, down_EMD, sizes_E), token_R, position_XA)
    if mesh.active():
        y_XD = jax.lax.psum_scatter(y_XD, mesh.EXPERT, tiled=True)
    return y_XD.reshape(x_BTD.shape)


def position_map(experts_XA: Array, experts: int) -> tuple[Array, Array, Array]:
    """Sort (token, choice) pairs by expert: (pair_R of every row, position_XA of every pair, sizes_E), int32.

    Rows of one expert keep the tokens' order. Choices outside 0..experts-1 (another device's) lie behind the last group.
    """
    group_R = jnp.where((experts_XA >= 0) & (experts_XA < experts), experts_XA, experts).reshape(-1)
    pair_R = jnp.argsort(group_R, stable=True).astype(jnp.int32)
    position_R = jnp.zeros_like(pair_R).at[pair_R].set(jnp.arange(pair_R.size, dtype=jnp.int32), unique_indices=True)
    sizes_E = jnp.sum(group_R[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    return pair_R, position_R.reshape(experts_XA.shape), sizes_E


@jax.custom_vjp
def dispatch(x_XD: Array, token_R: Array, position_XA: Array) -> Array:
    """Rows of x in expert order: x[token_R]. Its transpose is `combine`: gathers both ways, never a scatter-add."""
    return x_XD[token_R]


@jax.custom_vjp
def combine(y_RD: Array, token_R: Array, position_XA: Array) -> Array:
    """Sum each token's rows: sum_a y[position_XA[:, a]]. Its transpose is `dispatch`."""
    return jnp.sum(y_RD[position_XA], axis=1)


dispatch.defvjp(
    lambda x_XD, token_R, position_XA: (dispatch(x_XD, token_R, position_XA), (token_R, position_XA)),
    lambda places, dx_RD: (combine(dx_RD, *places), None, None),
)
combine.defvjp(
    lambda y_RD, token_R, position_XA: (combine(y_RD, token_R, position_XA), (token_R, position_XA)),
    lambda places, dy_XD: (dispatch(dy_XD, *places), None, None),
)
