"""The key-value cache: what the model remembers of a row of tokens while it is sampled."""

import dataclasses

import jax.numpy as jnp
from flax import struct
from jax import Array

from glm_jax.config import Model


@struct.dataclass
class Cache:
    """Keys and values of every decoder layer, filled from the left; each row has its own length.

    Heads stand before slots, as the products of attention read them. The layers are one array, or a tuple of one each
    where the parameters are unstacked: a step then reads and writes them in place.
    `segments_BS` is 0 where nothing real has been written (free slots, padding), so attention never looks there.
    """

    k_LBKSH: Array | tuple[Array, ...]
    v_LBKSH: Array | tuple[Array, ...]
    positions_BS: Array
    segments_BS: Array
    length_B: Array


def empty(cfg: Model, rows: int, capacity: int, stacked: bool = True) -> Cache:
    """A cache for `rows` rows of up to `capacity` tokens, in the model's dtype; `stacked` as the parameters are."""
    shape = (rows, cfg.K, capacity, cfg.H)
    slots = jnp.zeros((rows, capacity), jnp.int32)

    def layers() -> Array | tuple[Array, ...]:
        if stacked:
            return jnp.zeros((cfg.L, *shape), cfg.dtype)
        return tuple(jnp.zeros(shape, cfg.dtype) for _ in range(cfg.L))

    return Cache(layers(), layers(), slots, slots, jnp.zeros(rows, jnp.int32))


def place(cache: Cache, positions_BT: Array, segments_BT: Array) -> Cache:
    """Write where the next tokens stand; the layers' keys and values follow with `extend`.

    Real tokens (segment > 0) come first in each row; padding behind them is overwritten by the next call.
    """
    at = _slots(cache, positions_BT.shape[1])
    return dataclasses.replace(
        cache,
        positions_BS=cache.positions_BS.at[at].set(positions_BT, mode="drop"),
        segments_BS=cache.segments_BS.at[at].set(segments_BT, mode="drop"),
    )


def extend(cache: Cache, layer: Array | int, k_BTKH: Array, v_BTKH: Array) -> Cache:
    """Write one layer's keys and values of the next tokens."""
    rows_B1, slots_BT = _slots(cache, k_BTKH.shape[1])

    def write(old: Array | tuple, new_BTKH: Array) -> Array | tuple:
        if isinstance(old, tuple):
            new_BKSH = old[layer].at[rows_B1, :, slots_BT].set(new_BTKH, mode="drop")
            return (*old[:layer], new_BKSH, *old[layer + 1 :])
        return old.at[layer, rows_B1, :, slots_BT].set(new_BTKH, mode="drop")

    return dataclasses.replace(cache, k_LBKSH=write(cache.k_LBKSH, k_BTKH), v_LBKSH=write(cache.v_LBKSH, v_BTKH))


def read(cache: Cache, layer: Array | int) -> tuple[Array, Array]:
    """One layer's keys and values, [B, S, K, H]."""
    return cache.k_LBKSH[layer].swapaxes(1, 2), cache.v_LBKSH[layer].swapaxes(1, 2)


def advance(cache: Cache, segments_BT: Array) -> Cache:
    """Count the real tokens that have been written."""
    return dataclasses.replace(cache, length_B=cache.length_B + jnp.sum(segments_BT > 0, axis=1, dtype=jnp.int32))


def _slots(cache: Cache, count: int) -> tuple[Array, Array]:
    rows_B1 = jnp.arange(cache.length_B.shape[0])[:, None]
    return rows_B1, cache.length_B[:, None] + jnp.arange(count)
