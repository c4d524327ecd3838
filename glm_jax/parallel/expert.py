"""The experts of a layer, dropless, on the devices that have them, inside one shard_map.

Every device holds E/expert experts. How their tokens come to them and the sums back is a strategy's affair, of two with one
signature: `gather`, and for a wide expert axis `ragged`.

Tokens go in chunks, so that one chunk's rows are few; a device has room for a quarter more of them than it has on average, and
takes a second pass over its experts where it is sent more.
"""

import math
from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from glm_jax import mesh
from glm_jax.parallel import collectives, exchange, gather, ragged
from glm_jax.parallel.products import ROOM, Layer, Products, Tokens
from pallas_kernels.choose import platform
from pallas_kernels.fp8 import Quantized

STRATEGIES = {"gather": gather, "ragged": ragged}
# Of a chunk on a device, balanced. On a CPU they are never stored, but for weights of 8 bits: those go by a GPU's.
ROUTED_ROWS = {"cpu": 2**24, "tpu": 2**13, "gpu": 2**15}
RAGGED_ABOVE = 8  # devices of the expert axis: with fewer, gathered tokens are hardly more, and never unbalanced
FEW = 256  # tokens of a device, which cost no more than a message: a sampler's


def routed_experts(
    x_BTD: Array,
    experts_BTA: Array,
    weights_BTA: Array,
    gate_EDM: Array | Quantized,
    up_EDM: Array | Quantized,
    down_EMD: Array | Quantized,
    implementation: str | None = None,
    dispatch: str | None = None,
) -> Array:
    """y_BTD = sum over a token's chosen experts of weight * down(silu(gate x) * up x)."""
    layer, how = (gate_EDM, up_EDM, down_EMD), (implementation, dispatch)
    if not mesh.active():
        return _local(how, (), x_BTD, experts_BTA, weights_BTA, *layer)
    tokens, layouts = mesh.activation("BTD"), jax.tree.map(lambda w: jax.typeof(w).sharding.spec, layer)
    run = partial(_local, how, (tokens, *layouts))
    local = jax.shard_map(run, in_specs=(tokens,) * 3 + layouts, out_specs=tokens)
    return local(x_BTD, experts_BTA, weights_BTA, *layer)


def strategy(dispatch: str | None, tokens: int, expert_axis: int, where: str) -> ModuleType:
    """The one that `dispatch` names, or the better one for so many tokens of a device. Where there is no other device to send
    to, all are the same."""
    wide = expert_axis > RAGGED_ABOVE and tokens > FEW and where in exchange.PLATFORMS
    return STRATEGIES[dispatch or ("ragged" if wide else "gather")] if expert_axis > 1 else gather


def _local(
    how: tuple[str | None, str | None],
    layouts: tuple[P, ...],
    x_BTD: Array,
    experts_BTA: Array,
    weights_BTA: Array,
    gate_EDM: Array | Quantized,
    up_EDM: Array | Quantized,
    down_EMD: Array | Quantized,
) -> Array:
    layer = gate_EDM, up_EDM, down_EMD
    if mesh.active():
        tokens, *of_weights = layouts
        over = mesh.axes_of(tokens)
        D_of = (1, 1, 2)  # the dimension that is split between steps
        gate_EDM, up_EDM, down_EMD = (
            jax.tree.map(partial(_whole, D=D, over=over), w, layout)  # 8-bit weights are two arrays of one layout
            for w, layout, D in zip(layer, of_weights, D_of, strict=True)
        )
        layer = gate_EDM, up_EDM, down_EMD
    tokens_BT = x_BTD, experts_BTA, weights_BTA
    x_XD, experts_XA, weights_XA = (collectives.copied(z.reshape(-1, z.shape[-1])) for z in tokens_BT)
    (implementation, dispatch), axis = how, mesh.axis_size(mesh.EXPERT)
    storing = "gpu" if isinstance(layer[0], Quantized) and platform() == "cpu" else platform()
    chunks, room = pieces(len(x_XD), experts_XA.shape[-1], axis, storing)
    products, by = Products(room, implementation), strategy(dispatch, len(x_XD), axis, platform())
    if chunks == 1 and by is gather:  # which jax differentiates, with more kept
        return collectives.summed(by.forward(products, layer, (x_XD, experts_XA, weights_XA)).reshape(x_BTD.shape))
    x_CXD, experts_CXA, weights_CXA = (z.reshape(chunks, -1, z.shape[-1]) for z in (x_XD, experts_XA, weights_XA))
    y_CXD: Array = _in_turn(by, products, layer, (x_CXD, experts_CXA, weights_CXA))
    return collectives.summed(y_CXD.reshape(x_BTD.shape))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_turn(by: ModuleType, products: Products, layer: Layer, chunks: Tokens) -> Array:
    """One chunk after the other. For the backward pass a chunk keeps its tokens alone: what it receives is as large as all
    chunks' tokens together. The layer's gradients are added up in one place, by the products themselves."""
    return jax.lax.map(partial(by.forward, products, layer), chunks)


def _in_turn_forward(
    by: ModuleType, products: Products, layer: Layer, chunks: Tokens
) -> tuple[Array, tuple[Layer, Tokens]]:
    return _in_turn(by, products, layer, chunks), (layer, chunks)


def _in_turn_backward(
    by: ModuleType, products: Products, saved: tuple[Layer, Tokens], dy_CXD: Array
) -> tuple[Layer, tuple[Array, None, Array]]:
    layer, chunks = saved

    def chunk(sums: Layer, of_chunk: tuple[Tokens, Array]) -> tuple[Layer, tuple[Array, Array]]:
        dx_XD, dweights_XA, sums = by.backward(products, layer, *of_chunk, sums)
        return sums, (dx_XD, dweights_XA)

    dlayer, (dx_CXD, dweights_CXA) = jax.lax.scan(chunk, jax.tree.map(jnp.zeros_like, layer), (chunks, dy_CXD))
    return dlayer, (dx_CXD, None, dweights_CXA)


_in_turn.defvjp(_in_turn_forward, _in_turn_backward)


def _whole(w: Array, layout: P, D: int, over: tuple[str, ...]) -> Array:
    """This device's experts with their shards gathered, of a part of their hidden width along the tensor axis, for tokens that are
    split `over` these axes; the gradient is scattered as it is summed, and then summed over copies of the weights."""
    axes = mesh.axes_of((layout[D],))
    missing = {*over} - {mesh.EXPERT, *axes}
    w = jax.lax.pcast(w, tuple(axis for axis in mesh.AXES if axis in missing), to="varying")
    for axis in reversed(axes):  # one at a time, the innermost first: as `mesh.gather` does, and for its reason
        if axis == mesh.TENSOR:
            w = mesh.turn(w, axis, D, w.ndim - D)  # D and M are the last two dimensions
        elif mesh.axis_size(axis) > 1:
            w = mesh.joined(w, axis, D)
    return w


def pieces(tokens: int, choices: int, expert_axis: int, where: str) -> tuple[int, int]:
    """How many chunks a device's tokens go in, the fewest that divide them and route few enough rows; and for how many of a chunk's
    rows there is room."""
    least = -(-tokens * choices // ROUTED_ROWS[where])
    chunks = next(n for n in range(least, tokens + 1) if tokens % n == 0)
    balanced = tokens * choices // chunks
    return chunks, math.ceil(balanced * min(ROOM, expert_axis))
