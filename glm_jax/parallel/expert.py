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
    "tpu": 2**15,
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
    layer = gate_EDM, up_EDM, down_EMD
    if not mesh.active():
        return _local(implementation, (), x_BTD, experts_BTA, weights_BTA, *layer)
    tokens, layouts = mesh.activation("BTD"), tuple(jax.typeof(w).sharding.spec for w in layer)
    local = jax.shard_map(partial(_local, implementation, layouts), in_specs=(tokens,) * 3 + layouts, out_specs=tokens)
    return local(x_BTD, experts_BTA, weights_BTA, *layer)


def _local(
    implementation: str | None,
    layouts: tuple[P, ...],
    x_BTD: Array,
    experts_BTA: Array,
    weights_BTA: Array,
    gate_EDM: Array,
    up_EDM: Array,
    down_EMD: Array,
) -> Array:
    layer = gate_EDM, up_EDM, down_EMD
    if mesh.active():
        layer = tuple(_whole(w, layout) for w, layout in zip(layer, layouts, strict=True))
    tokens = tuple(z.reshape(-1, z.shape[-1]) for z in (x_BTD, experts_BTA, weights_BTA))
    chunks = _chunks(*experts_BTA.shape)
    run = partial(_chunk, implementation, layer)
    if chunks == 1:
        return run(tokens).reshape(x_BTD.shape)
    # a chunk keeps its tokens alone for the backward pass: what it gathers is as large as all chunks' tokens together
    split = tuple(z.reshape(chunks, -1, z.shape[-1]) for z in tokens)
    return jax.lax.map(jax.checkpoint(run), split).reshape(x_BTD.shape)


def _whole(w: Array, layout: P) -> Array:
    """This device's experts with their shards gathered; the gradient is scattered as it is summed."""
    missing = set(mesh.NOT_EXPERT)
    for d in range(w.ndim):
        axes = [axis for axis in mesh.axes_of(layout[d : d + 1]) if axis in mesh.SHARDS]
        for axis in reversed(axes):  # one at a time, the innermost first: as `mesh.gather` does, and for its reason
            w = jax.lax.all_gather(w, axis, axis=d, tiled=True) if mesh.axis_size(axis) > 1 else w
        missing -= set(axes)
    return jax.lax.pcast(w, tuple(axis for axis in mesh.AXES if axis in missing), to="varying")


def _chunks(rows: int, length: int, choices: int) -> int:
    """How many chunks a device's tokens go in: the fewest that divide them and route few enough rows each."""
    tokens = rows * length
    least = -(-tokens * choices * mesh.axis_size(mesh.EXPERT) // ROUTED_ROWS[platform()])
    return next(n for n in range(least, tokens + 1) if tokens % n == 0)


def _chunk(implementation: str | None, layer: tuple[Array, ...], tokens: tuple[Array, ...]) -> Array:
    gate_EDM, up_EDM, down_EMD = layer
    mlp = partial(expert_mlp, implementation=implementation)
    if not mesh.active():
        x_XD, experts_XA, weights_XA = tokens
        return mlp(x_XD, gate_EDM, up_EDM, down_EMD, experts_XA, weights_XA)
    x_XD, experts_XA, weights_XA = map(mesh.gathered, tokens)
    here_XA = experts_XA - jax.lax.axis_index(mesh.EXPERT) * len(gate_EDM)  # others' fall outside 0..E-1
    y_XD = mlp(x_XD, gate_EDM, up_EDM, down_EMD, here_XA, weights_XA)
    return mesh.scattered(y_XD)
