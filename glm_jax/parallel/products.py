"""What a device computes with its own experts, however their tokens came to it."""

from typing import NamedTuple

from jax import Array

from pallas_kernels.grouped_matmul import expert_mlp, expert_mlp_grad

Layer = tuple[Array, Array, Array]  # gate_EDM, up_EDM, down_EMD
Tokens = tuple[Array, Array, Array]  # x_XD, experts_XA, weights_XA; of many chunks [chunks, X, ...]

ROOM = 1.25  # for how many times as many rows as there are on average


class Products(NamedTuple):
    """How the kernels compute: see `expert_mlp`. Experts outside 0..E-1 are another device's."""

    at_once: int
    implementation: str | None

    def mlp(self, layer: Layer, tokens: Tokens) -> Array:
        x_XD, experts_XA, weights_XA = tokens
        return expert_mlp(x_XD, *layer, experts_XA, weights_XA, **self._asdict())

    def gradients(self, layer: Layer, tokens: Tokens, dy_XD: Array, sums: Layer) -> tuple[Array, Array, Layer]:
        """Of x and weights; and `sums` with those of the layer added."""
        x_XD, experts_XA, weights_XA = tokens
        return expert_mlp_grad(x_XD, layer, experts_XA, weights_XA, dy_XD, sums, **self._asdict())
