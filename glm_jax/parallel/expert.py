"""Expert dispatch, dropless: all-gather, local route, grouped matmul, reduce-scatter, inside one shard_map.

Every device holds E/expert experts. It gathers the tokens of its expert axis, runs those of their choices that are
its own, and the sums go back to where the tokens came from. Perfectly balanced whatever the router does.

Buffers have room for the worst case, in which one device's experts get all: tokens go in chunks, so that the room is small.
"""

from functools import partial

import jax
from jax import Array
from jax.sharding import PartitionSpec as P

from glm_jax import mesh
from pallas_kernels.choose import platform
from pallas_kernels.grouped_matmul import expert_mlp

ROUTED_ROWS = {
    "cpu": 2**24,
    "tpu": 2**16,
    "gpu": 2**16,
}  # of a chunk, in the worst case; on a CPU they are never stored


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
    layer = gate_EDM, up_EDM, down_EMD
    if mesh.active():
        layer = tuple(jax.lax.pcast(w, mesh.NOT_EXPERT, to="varying") for w in layer)
    tokens = tuple(z.reshape(-1, z.shape[-1]) for z in (x_BTD, experts_BTA, weights_BTA))
    chunks = _chunks(*experts_BTA.shape)
    run = partial(_chunk, implementation, layer)
    if chunks == 1:
        return run(tokens).reshape(x_BTD.shape)
    # a chunk keeps its tokens alone for the backward pass: what it gathers is as large as all chunks' tokens together
    split = tuple(z.reshape(chunks, -1, z.shape[-1]) for z in tokens)
    return jax.lax.map(jax.checkpoint(run), split).reshape(x_BTD.shape)


def _chunks(rows: int, length: int, choices: int) -> int:
    """How many chunks a device's tokens go in: the fewest that divide them and route few enough rows each."""
    tokens = rows * length
    least = -(-tokens * choices * mesh.axis_size(mesh.EXPERT) // ROUTED_ROWS[platform()])
    return next(n for n in range(least, tokens + 1) if tokens % n == 0)


def _chunk(implementation: str | None, layer: tuple[Array, ...], tokens: tuple[Array, ...]) -> Array:
    if not mesh.active():
        x_XD, experts_XA, weights_XA = tokens
        return expert_mlp(x_XD, *layer, experts_XA, weights_XA, implementation=implementation)
    x_XD, experts_XA, weights_XA = (jax.lax.all_gather(z, mesh.EXPERT, tiled=True) for z in tokens)
    here_XA = experts_XA - jax.lax.axis_index(mesh.EXPERT) * layer[0].shape[0]  # others' fall outside 0..E-1
    y_XD = expert_mlp(x_XD, *layer, here_XA, weights_XA, implementation=implementation)
    return jax.lax.psum_scatter(y_XD, mesh.EXPERT, tiled=True)
