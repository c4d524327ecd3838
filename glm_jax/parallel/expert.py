"""Expert dispatch, dropless: all-gather, local route, grouped matmul, reduce-scatter, inside one shard_map.

Every device holds E/expert experts. It gathers the tokens of its expert axis, runs those of their choices that are
its own, and the sums go back to where the tokens came from. Perfectly balanced whatever the router does.
"""

from functools import partial

import jax
from jax import Array
from jax.sharding import PartitionSpec as P

from glm_jax import mesh
from pallas_kernels.grouped_matmul import expert_mlp


def routed_experts(
    x_BTD: Array,
    experts_BTA: Array,
    weights_BTA: Array,
    gate_EDM: Array,
    up_EDM: Array,
    down_EMD: Array,
    implementation: str | None = None,
) -> Array:
    """y_BTD = sum over a token's chosen experts of weight * down(silu(gate x) * up x)."""
    local = partial(_local, implementation)
    if mesh.active():
        tokens, expert = mesh.activation("BTD"), P(mesh.EXPERT)
        local = jax.shard_map(local, in_specs=(tokens,) * 3 + (expert,) * 3, out_specs=tokens)
    return local(x_BTD, experts_BTA, weights_BTA, gate_EDM, up_EDM, down_EMD)


def _local(
    implementation: str | None,
    x_BTD: Array,
    experts_BTA: Array,
    weights_BTA: Array,
    gate_EDM: Array,
    up_EDM: Array,
    down_EMD: Array,
) -> Array:
    x_XD, experts_XA, weights_XA = (z.reshape(-1, z.shape[-1]) for z in (x_BTD, experts_BTA, weights_BTA))
    if mesh.active():
        x_XD, experts_XA, weights_XA = (
            jax.lax.all_gather(z, mesh.EXPERT, tiled=True) for z in (x_XD, experts_XA, weights_XA)
        )
        others = tuple(axis for axis in mesh.AXES if axis != mesh.EXPERT)
        gate_EDM, up_EDM, down_EMD = (jax.lax.pcast(w, others, to="varying") for w in (gate_EDM, up_EDM, down_EMD))
        experts_XA = experts_XA - jax.lax.axis_index(mesh.EXPERT) * gate_EDM.shape[0]  # others' fall outside 0..E-1
    y_XD = expert_mlp(x_XD, gate_EDM, up_EDM, down_EMD, experts_XA, weights_XA, implementation=implementation)
    if mesh.active():
        y_XD = jax.lax.psum_scatter(y_XD, mesh.EXPERT, tiled=True)
    return y_XD.reshape(x_BTD.shape)
