"""Expert dispatch by ragged all-to-all: a token's row goes to each device that has some of its experts, once, with its choices
and weights; what they make of it comes back to be added up. As `gather`, to rounding.

Rows that a device receives for each token of its own, along an axis of n, e = E/n experts to a device: n - 1 when tokens
are gathered; here (n - 1) (1 - C(E-e, A) / C(E, A)) if every choice is as likely: of E = 160, A = 8

    n          4     8    16    32
    gather     3     7    15    31
    ragged   2.7   4.7   6.2   7.1

On a torus that is not yet time: a row crosses n/4 links of a ring of n, where gathered rows leave a copy at every device that they
pass. An axis of 16 gains where it is 4 x 4 or switched, and loses as a ring; wider ones gain more. And the device that is sent
most rows bounds it, while gathered tokens are as many whatever the router does.

Nothing is dropped: a device has room for a quarter more rows than come on average, and takes what is beyond in further
passes. The devices tell each other how many rows they have for whom; all take as many passes as the fullest one needs.
"""

import math
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from glm_jax import mesh
from glm_jax.parallel.exchange import ragged_all_to_all
from glm_jax.parallel.products import ROOM, Layer, Products, Tokens, experts_of
from pallas_kernels.routing import position_map, row_order

TILE = 1024  # tokens whose choices the kernels add at once: room is a multiple, where it is more

Moves = tuple[Array, Array, Array, Array]  # as `ragged_all_to_all` takes them


class Route(NamedTuple):
    """Where the rows of a device's tokens go: they stand receiver by receiver, a token's once for each of its receivers."""

    token_R: Array
    position_XA: Array  # of a choice's row
    first_XA: Array  # whether it is the first choice on its device: the others go with it
    count_IJ: Array  # rows that device i has for device j
    room: int
    passes: Array  # the same number on all devices


def forward(products: Products, layer: Layer, tokens: Tokens) -> Array:
    route = _route(layer, tokens)

    def one(i: Array, y_RD: Array) -> Array:
        there, back = _moves(route, i)
        return _exchange(products.mlp(layer, _arrived(route, layer, tokens, there)), y_RD, back)

    return _added(route, jax.lax.fori_loop(0, route.passes, one, _zeros(tokens[0], len(route.token_R))))


def backward(products: Products, layer: Layer, tokens: Tokens, dy_XD: Array, sums: Layer) -> tuple[Array, Array, Layer]:
    """Gradients of x and weights; and `sums` with those of the layer added."""
    route = _route(layer, tokens)
    x_XD, _, weights_XA = tokens

    def one(i: Array, found: tuple[Array, Array, Layer]) -> tuple[Array, Array, Layer]:
        dx_RD, dweights_RA, sums = found
        there, back = _moves(route, i)
        dy_ZD = _sent(route, dy_XD, there)
        dx_ZD, dweights_ZA, sums = products.gradients(layer, _arrived(route, layer, tokens, there), dy_ZD, sums)
        return _exchange(dx_ZD, dx_RD, back), _exchange(dweights_ZA, dweights_RA, back), sums

    most = len(route.token_R)
    nothing = _zeros(x_XD, most), _zeros(weights_XA, most), sums
    dx_RD, dweights_RA, sums = jax.lax.fori_loop(0, route.passes, one, nothing)
    return _added(route, dx_RD), _added(route, dweights_RA), sums


def balanced(tokens: float, choices: int, experts: int, devices: int) -> float:
    """Rows that a device with so many tokens sends, and receives, its own among them, if every choice is as likely."""
    elsewhere = math.comb(experts - experts // devices, choices) / math.comb(experts, choices)
    return tokens * devices * (1 - elsewhere)


def rows(tokens: int, choices: int, experts: int, devices: int) -> tuple[int, int]:
    """Of a chunk: the most that a device can have to send, and for how many it has room when it receives."""
    room = math.ceil(ROOM * balanced(tokens, choices, experts, devices))
    room += -room % TILE if room > TILE else 0
    return tokens * min(choices, devices), min(room, tokens * devices)


def _route(layer: Layer, tokens: Tokens) -> Route:
    _, experts_XA, _ = tokens
    (X, A), devices = experts_XA.shape, mesh.axis_size(mesh.EXPERT)
    most, room = rows(X, A, devices * experts_of(layer), devices)
    device_XA = experts_XA // experts_of(layer)
    before_AA = jnp.tri(A, k=-1, dtype=bool)
    first_XA = ~((device_XA[:, :, None] == device_XA[:, None, :]) & before_AA).any(axis=2)
    position_R, count_J = position_map(jnp.where(first_XA, device_XA, devices).reshape(-1), devices)
    count_IJ = jax.lax.all_gather(count_J, mesh.EXPERT)
    fullest = jax.lax.pmax(count_IJ.sum(axis=0).max(), tuple(axis for axis in mesh.AXES if axis != mesh.PIPELINE))
    position_XA = jnp.minimum(position_R, most - 1).reshape(X, A)
    token_R = row_order(position_R)[:most] // A
    return Route(token_R, position_XA, first_XA, count_IJ, room, (fullest + room - 1) // room)


def _moves(route: Route, i: Array) -> tuple[Moves, Moves]:
    """Pass `i`, there and back. A receiver's rows are queued sender by sender; it takes `room` of them in a pass."""
    count_IJ = route.count_IJ
    own_IJ = jnp.cumsum(count_IJ, axis=1) - count_IJ  # where they begin among the sender's rows
    queue_IJ = jnp.cumsum(count_IJ, axis=0) - count_IJ  # where in the receiver's queue
    first = i * route.room
    start_IJ, stop_IJ = (jnp.clip(z, queue_IJ, queue_IJ + count_IJ) for z in (first, first + route.room))
    size_IJ = stop_IJ - start_IJ
    from_IJ, to_IJ = (jnp.where(size_IJ > 0, start_IJ - z, 0) for z in (queue_IJ - own_IJ, first))
    me = jax.lax.axis_index(mesh.EXPERT)
    there = from_IJ[me], size_IJ[me], to_IJ[me], size_IJ[:, me]
    back = to_IJ[:, me], size_IJ[:, me], from_IJ[:, me], size_IJ[me]
    return there, back


def _arrived(route: Route, layer: Layer, tokens: Tokens, there: Moves) -> Tokens:
    """Others' tokens; of their choices those of experts elsewhere fall outside 0..E-1, as all do where no row came."""
    x_XD, experts_XA, weights_XA = tokens
    bits_XA = jax.lax.bitcast_convert_type(weights_XA, jnp.int32)
    choices_X2A = jnp.concatenate([experts_XA + 1, bits_XA], axis=1)  # one message, for TPU pads a row to 128 words
    x_ZD, choices_Z2A = (_sent(route, z, there) for z in (x_XD, choices_X2A))
    numbers_ZA, bits_ZA = jnp.split(choices_Z2A, 2, axis=1)
    first = 1 + jax.lax.axis_index(mesh.EXPERT) * experts_of(layer)
    return x_ZD, numbers_ZA - first, jax.lax.bitcast_convert_type(bits_ZA, jnp.float32)


def _sent(route: Route, z_XD: Array, there: Moves) -> Array:
    """What comes here of everybody's tokens, and zeros behind."""
    return _exchange(z_XD[route.token_R], _zeros(z_XD, route.room), there)


def _exchange(operand: Array, output: Array, moves: Moves) -> Array:
    return ragged_all_to_all(operand, output, *moves, axis=mesh.EXPERT)


def _zeros(like: Array, rows: int) -> Array:
    return jax.lax.full_like(like, 0, shape=(rows, *like.shape[1:]))


def _added(route: Route, z_RD: Array) -> Array:
    """Of each token what its receivers sent back, added in float32."""
    of_choice = (
        jnp.where(route.first_XA[:, a, None], z_RD[route.position_XA[:, a]].astype(jnp.float32), 0)
        for a in range(route.first_XA.shape[1])
    )
    return reduce(jnp.add, of_choice).astype(z_RD.dtype)
