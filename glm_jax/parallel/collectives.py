"""What devices do together inside `mesh.per_shard`: those along the expert axis bring their tokens together, those along the tensor
axis, which have the same, add up what each makes of its part of a weight.
"""

import jax
from jax import Array

from glm_jax import mesh


def vary(share: Array) -> Array:
    """The head or the embedding, which differ along the axes that share the vocabulary alone, so that their
    gradient is summed over the other devices."""
    others = tuple(axis for axis in mesh.AXES if axis not in mesh.SHARING)
    return jax.lax.pcast(share, others, to="varying") if mesh.active() else share


def sharing() -> tuple[str, ...]:
    """The axes above 1 whose devices have each a share of the vocabulary, for the same tokens once these are `gathered`."""
    return tuple(axis for axis in mesh.SHARING if mesh.axis_size(axis) > 1)


def total(x: Array) -> Array:
    """The sum over all devices of what is equal on those that share the vocabulary."""
    return jax.lax.psum(x, tuple(axis for axis in mesh.AXES if axis not in sharing())) if mesh.active() else x


def copied(x: Array) -> Array:
    """What is equal along the tensor axis, for a product with a part of a weight on each of its devices."""
    return jax.lax.pcast(x, mesh.TENSOR, to="varying") if mesh.active() else x


def summed(y: Array) -> Array:
    """The sum along the tensor axis of such products."""
    return jax.lax.psum(y, mesh.TENSOR) if mesh.active() else y


def gathered(x: Array) -> Array:
    """The rows of all devices along the expert axis, a block of each device's in turn."""
    if mesh.axis_size(mesh.EXPERT) == 1:
        return x
    return jax.lax.all_gather(_blocks(x, 1), mesh.EXPERT, axis=1, tiled=True).reshape(-1, *x.shape[1:])


def scattered(x: Array) -> Array:
    """Of rows that `gathered` brought together, this device's, summed along the expert axis."""
    if mesh.axis_size(mesh.EXPERT) == 1:
        return x
    blocks = _blocks(x, mesh.axis_size(mesh.EXPERT))
    return jax.lax.psum_scatter(blocks, mesh.EXPERT, scatter_dimension=1, tiled=True).reshape(-1, *x.shape[1:])


def own(x: Array) -> Array:
    """What `gathered` had from this device; equal along the tensor axis, also where that is one device."""
    x = summed(x) if mesh.axis_size(mesh.TENSOR) == 1 else x
    if mesh.axis_size(mesh.EXPERT) == 1:
        return x
    blocks = _blocks(x, mesh.axis_size(mesh.EXPERT))
    rows = blocks.shape[1] // mesh.axis_size(mesh.EXPERT)
    mine = jax.lax.dynamic_slice_in_dim(blocks, jax.lax.axis_index(mesh.EXPERT) * rows, rows, axis=1)
    return mine.reshape(-1, *x.shape[1:])


def _blocks(x: Array, devices: int) -> Array:
    """[blocks, rows of a block from so many devices, ...]. Scattered along an inner dimension, a sum travels as it is; along
    the outermost, TPU's compiler pads it and sends a part of it twice."""
    rows = x.shape[0] // devices
    return x.reshape(rows // mesh.BLOCK if rows % mesh.BLOCK == 0 else 1, -1, *x.shape[1:])
