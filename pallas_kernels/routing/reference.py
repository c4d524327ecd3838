"""The definition: a stable sort, and its inverse by another."""

import jax.numpy as jnp
from jax import Array


def position_map(expert_R: Array, groups: int) -> tuple[Array, Array]:
    position_R = jnp.argsort(jnp.argsort(expert_R, stable=True)).astype(jnp.int32)
    return position_R, (expert_R[:, None] == jnp.arange(groups)).sum(0, dtype=jnp.int32)
