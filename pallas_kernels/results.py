"""What a kernel says of its results before it has run."""

import jax
from jax import Array
from jax.typing import DTypeLike


def result_like(x: Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    """A result that varies over the same mesh axes as `x`, which `shard_map` asks a kernel to say."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)
