"""Expert dispatch, dropless: all-gather, local route, grouped matmul, reduce-scatter, inside one shard_map.

Every device holds E/expert experts. It gathers the tokens of its expert axis, runs those of their choices that are
its own, and the sums go back to where the tokens came from. Perfectly balanced whatever the router does.

Tokens go in chunks, so that one chunk's rows are few; a device has room for a quarter more of them than it has on average, and
takes a second pass over its experts where it is sent more.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from glm_jax import mesh
from pallas_kernels.choose import platform
from pallas_kernels.grouped_matmul import expert_mlp, expert_mlp_grad

Layer = tuple[Array, Array, Array]  # gate_EDM, up_EDM, down_EMD
Tokens = tuple[Array, Array, Array]  # x_XD, experts_XA, weights_XA; of many chunks [chunks, X, ...]

# Of a chunk on a device, balanced, and how many times as many there is room for. On a CPU they are never stored.
ROUTED_ROWS = {"cpu": 2**24, "tpu": 2**13, "gpu": 2**15}
ROOM = 1.25


class Products(NamedTuple):
    """How the kernels compute: see `expert_mlp`."""

    at_once: int
    implementation: str | None


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
    run = partial(_local, implementation, (tokens, *layouts))
    local = jax.shard_map(run, in_specs=(tokens,) * 3 + layouts, out_specs=tokens)
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
        tokens, *of_weights = layouts
        over = mesh.axes_of(tokens)
        gate_EDM, up_EDM, down_EMD = (_whole(w, layout, over) for w, layout in zip(layer, of_weights, strict=True))
        layer = gate_EDM, up_EDM, down_EMD
    x_XD, experts_XA, weights_XA = (z.reshape(-1, z.shape[-1]) for z in (x_BTD, experts_BTA, weights_BTA))
    chunks, room = pieces(len(x_XD), experts_XA.shape[-1], mesh.axis_size(mesh.EXPERT), platform())
    products = Products(room, implementation)
    if chunks == 1:
        return _chunk(products, layer, (x_XD, experts_XA, weights_XA)).reshape(x_BTD.shape)
    x_CXD, experts_CXA, weights_CXA = (z.reshape(chunks, -1, z.shape[-1]) for z in (x_XD, experts_XA, weights_XA))
    y_CXD: Array = _in_turn(products, layer, (x_CXD, experts_CXA, weights_CXA))
    return y_CXD.reshape(x_BTD.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_turn(products: Products, layer: Layer, chunks: Tokens) -> Array:
    """One chunk after the other. For the backward pass a chunk keeps its tokens alone: what it gathers is as large as all
    chunks' tokens together. The layer's gradients are added up in one place, by the products themselves."""
    return jax.lax.map(partial(_chunk, products, layer), chunks)


def _in_turn_forward(products: Products, layer: Layer, chunks: Tokens) -> tuple[Array, tuple[Layer, Tokens]]:
    return _in_turn(products, layer, chunks), (layer, chunks)


def _in_turn_backward(
    products: Products, saved: tuple[Layer, Tokens], dy_CXD: Array
) -> tuple[Layer, tuple[Array, None, Array]]:
    layer, chunks = saved

    def chunk(sums: Layer, of_chunk: tuple[Tokens, Array]) -> tuple[Layer, tuple[Array, Array]]:
        tokens, dy_XD = of_chunk
        x_XD, experts_XA, weights_XA = _gathered(layer, tokens)
        options = products._asdict()
        found = expert_mlp_grad(x_XD, layer, experts_XA, weights_XA, mesh.gathered(dy_XD), sums, **options)
        dx_XD, dweights_XA, sums = found
        return sums, (mesh.scattered(dx_XD), mesh.scattered(dweights_XA))

    dlayer, (dx_CXD, dweights_CXA) = jax.lax.scan(chunk, jax.tree.map(jnp.zeros_like, layer), (chunks, dy_CXD))
    return dlayer, (dx_CXD, None, dweights_CXA)


_in_turn.defvjp(_in_turn_forward, _in_turn_backward)


def _whole(w: Array, layout: P, over: tuple[str, ...]) -> Array:
    """This device's experts with their shards gathered, for tokens that are split `over` these axes; the gradient is scattered
    as it is summed."""
    missing = set(over) - {mesh.EXPERT}
    for d in range(w.ndim):
        axes = [axis for axis in mesh.axes_of(layout[d : d + 1]) if axis != mesh.EXPERT]
        for axis in reversed(axes):  # one at a time, the innermost first: as `mesh.gather` does, and for its reason
            w = mesh.joined(w, axis, d) if mesh.axis_size(axis) > 1 else w
        missing -= set(axes)
    return jax.lax.pcast(w, tuple(axis for axis in mesh.AXES if axis in missing), to="varying")


def pieces(tokens: int, choices: int, expert_axis: int, where: str) -> tuple[int, int]:
    """How many chunks a device's tokens go in, the fewest that divide them and route few enough rows; and for how many of a chunk's
    rows there is room."""
    least = -(-tokens * choices // ROUTED_ROWS[where])
    chunks = next(n for n in range(least, tokens + 1) if tokens % n == 0)
    balanced = tokens * choices // chunks
    return chunks, math.ceil(balanced * min(ROOM, expert_axis))


def _chunk(products: Products, layer: Layer, tokens: Tokens) -> Array:
    x_XD, experts_XA, weights_XA = _gathered(layer, tokens)
    return mesh.scattered(expert_mlp(x_XD, *layer, experts_XA, weights_XA, **products._asdict()))


def _gathered(layer: Layer, tokens: Tokens) -> Tokens:
    """The tokens of the expert axis; of their choices those of experts elsewhere fall outside 0..E-1."""
    if not mesh.active():
        return tokens
    x_XD, experts_XA, weights_XA = map(mesh.gathered, tokens)
    return x_XD, experts_XA - jax.lax.axis_index(mesh.EXPERT) * len(layer[0]), weights_XA
