"""Which group's rows lie in which tile of rows: the list of (tile, group) pairs that a kernel's grid walks.

Groups start at any row, so a tile may hold rows of several groups and is then visited once for each, one visit after the
other: what the visits before have written is still in the chip's fast memory. How many visits there are is known on the
device alone; `rows/tile + E` is a bound, and the grid's length is read from there.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class Visits(NamedTuple):
    """int32 all. W counts visits, G groups: those of the caller and, if the tail is visited, the tail as one more."""

    bound_G: Array  # [G+1] where groups begin and end
    group_W: Array
    tile_W: Array  # the tile of rows that is visited
    source_W: Array  # the tile to read from, and the matrix: those of the last real visit when the tail is visited,
    matrix_W: Array  # so that nothing is fetched for rows of zeros
    count: Array  # [] how many visits there are


def visits(group_sizes_E: Array, rows: int, tile: int, *, tail: bool) -> Visits:
    """With `tail`, each row is visited exactly once, those beyond the last group as group E; without, each group is visited
    at least once, empty ones too, and the tail never. Sizes that sum to more than `rows` are cut off there."""
    groups, tiles = group_sizes_E.shape[0], -(-rows // tile)
    end_G = jnp.minimum(jnp.cumsum(group_sizes_E.astype(jnp.int32)), rows)
    last_tile = jnp.maximum(end_G[-1] - 1, 0) // tile
    if tail:
        end_G = jnp.append(end_G, rows)
    start_G = jnp.concatenate([jnp.zeros_like(end_G[:1]), end_G[:-1]])
    first_G = start_G // tile
    count_G = jnp.where(end_G > start_G, (end_G - 1) // tile - first_G + 1, 0 if tail else 1)
    stop_G = jnp.cumsum(count_G)
    visit_W = jnp.arange(tiles + groups)
    group_W = jnp.minimum((visit_W[:, None] >= stop_G).sum(1, dtype=jnp.int32), len(count_G) - 1)
    tile_W = jnp.minimum((first_G - stop_G + count_G)[group_W] + visit_W, tiles - 1)
    last_group = jnp.max(jnp.where(group_sizes_E > 0, jnp.arange(groups), 0))
    source_W, matrix_W = jnp.minimum(tile_W, last_tile), jnp.minimum(group_W, last_group)
    return Visits(jnp.append(start_G, end_G[-1]), group_W, tile_W, source_W, matrix_W, stop_G[-1])
