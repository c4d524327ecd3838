"""What a device computes with its own experts, however their tokens came to it."""

from typing import Any, NamedTuple

import jax
from jax import Array

from pallas_kernels import fp8
from pallas_kernels.fp8 import Quantized
from pallas_kernels.grouped_matmul import expert_mlp, expert_mlp_grad

Layer = tuple[Any, Any, Any]  # gate_EDM, up_EDM, down_EMD: arrays, or a sampler's `Quantized`
Tokens = tuple[Array, Array, Array]  # x_XD, experts_XA, weights_XA; of many chunks [chunks, X, ...]

ROOM = 1.25  # for how many times as many rows as there are on average


def experts_of(layer: Layer) -> int:
    """How many experts a device has."""
    return jax.tree.leaves(layer)[0].shape[0]


class Products(NamedTuple):
    """How the kernels compute: see `expert_mlp`. Experts outside 0..E-1 are another device's."""

    at_once: int
    implementation: str | None

    def mlp(self, layer: Layer, tokens: Tokens) -> Array:
        x_XD, experts_XA, weights_XA = tokens
        mlp = fp8.expert_mlp if isinstance(layer[0], Quantized) else expert_mlp
        return mlp(x_XD, *layer, experts_XA, weights_XA, **self._asdict())

    def gradients(self, layer: Layer, tokens: Tokens, dy_XD: Array, sums: Layer) -> tuple[Array, Array, Layer]:
        """Of x and weights; and `sums` with those of the layer added."""
        x_XD, experts_XA, weights_XA = tokens
        return expert_mlp_grad(x_XD, layer, experts_XA, weights_XA, dy_XD, sums, **self._asdict())
