"""Expert dispatch by all-gather: every device has the tokens of its expert axis, runs those of their choices that are its
own, and the sums are scattered to where the tokens came from. Perfectly balanced whatever the router does.

A device receives the tokens of all others: n - 1 rows for each of its own, along an axis of n.
"""

import jax
from jax import Array

from glm_jax import mesh
from glm_jax.parallel import collectives
from glm_jax.parallel.products import Layer, Products, Tokens, experts_of


def forward(products: Products, layer: Layer, tokens: Tokens) -> Array:
    return collectives.scattered(products.mlp(layer, _gathered(layer, tokens)))


def backward(products: Products, layer: Layer, tokens: Tokens, dy_XD: Array, sums: Layer) -> tuple[Array, Array, Layer]:
    """Gradients of x and weights; and `sums` with those of the layer added."""
    gathered = _gathered(layer, tokens)
    dx_XD, dweights_XA, sums = products.gradients(layer, gathered, collectives.gathered(dy_XD), sums)
    return collectives.scattered(dx_XD), collectives.scattered(dweights_XA), sums


def _gathered(layer: Layer, tokens: Tokens) -> Tokens:
    """The tokens of the expert axis; of their choices those of experts elsewhere fall outside 0..E-1."""
    if not mesh.active():
        return tokens
    x_XD, experts_XA, weights_XA = map(collectives.gathered, tokens)
    return x_XD, experts_XA - jax.lax.axis_index(mesh.EXPERT) * experts_of(layer), weights_XA
