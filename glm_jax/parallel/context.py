"""Context parallelism: the tokens of a row lie on several devices, in an order that gives all of them as much to do.

A late token looks at more keys than an early one. So a row is cut into twice as many chunks as there are devices, and
each has an early chunk and the late one that mirrors it. The order is data: whatever is known of a token (targets,
positions, segments, weights) moves with it before it reaches the devices, and attention, which gathers the keys of the
whole row, reads from positions and segments who sees what.
"""

from collections.abc import Mapping

import numpy as np

from glm_jax import mesh


def order(length: int, parts: int) -> np.ndarray:
    """Which token of a row stands at each place: chunks p and 2 * parts - 1 - p are device p's. `length` is a multiple of
    2 * parts."""
    chunks = np.arange(length).reshape(2 * parts, -1)
    return np.stack([chunks[:parts], chunks[::-1][:parts]], axis=1).reshape(-1)


def zigzag(tokens: Mapping[str, np.ndarray], dim: int) -> dict[str, np.ndarray]:
    """Host arrays with dimension `dim`, a row's tokens, in the order for the mesh that is set; unchanged where it has no
    context axis."""
    parts = mesh.axis_size(mesh.CONTEXT)
    if parts == 1:
        return dict(tokens)
    return {name: np.take(z, order(z.shape[dim], parts), axis=dim) for name, z in tokens.items()}
