"""The key-value cache: what the model remembers of a row of tokens while it is sampled."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import struct
from jax import Array

from glm_jax import mesh
from glm_jax.config import ConfigError, Model


@struct.dataclass
class Shared:
    """What all rows of a cache begin with, held once: keys and values by layer, and the experts that each token took."""

    k_LKSH: tuple[Array, ...]
    v_LKSH: tuple[Array, ...]
    experts_SLA: Array


@struct.dataclass
class Cache:
    """Keys and values of every decoder layer, filled from the left; each row has its own length.

    Whoever calls keeps `length_B` and what is written next within `shared_tokens` and the capacity: lengths are known only
    while the program runs, and what does not fit is dropped.
    Heads stand before slots, as the products of attention read them. The layers are one array, or a tuple of one each
    where the parameters are unstacked: a step then reads and writes them in place.
    `shared` stands before the slots of every row; `length_B` counts it too.
    `experts_BSLA` are the experts that each token took in the MoE layers, -1 where none has been read.
    `segments_BS` is 0 where nothing real has been written (free slots, padding), so attention never looks there.
    """

    k_LBKSH: Array | tuple[Array, ...]
    v_LBKSH: Array | tuple[Array, ...]
    positions_BS: Array
    segments_BS: Array
    experts_BSLA: Array
    length_B: Array
    shared: Shared | None = None

    @property
    def shared_tokens(self) -> int:
        return 0 if self.shared is None else self.shared.k_LKSH[0].shape[1]


def empty(cfg: Model, rows: int, capacity: int, stacked: bool = True, begun: Cache | None = None) -> Cache:
    """A cache for `rows` rows of up to `capacity` tokens, in the model's dtype; `stacked` as the parameters are.

    With `begun`, a full cache of one row (unstacked), every row begins with that row's tokens. ConfigError on a mesh that
    splits rows of tokens: they are sampled one at a time.
    """
    if mesh.axis_size(mesh.CONTEXT) > 1:
        raise ConfigError(
            f"mesh.context={mesh.axis_size(mesh.CONTEXT)} splits rows of tokens, and sampling reads them one by one; give its "
            "devices to mesh.fsdp"
        )

    def zeros(dims: str, *shape: int, dtype: Any = jnp.int32) -> Array:
        return mesh.constrain(jnp.zeros(shape, dtype), dims)

    def layers() -> Array | tuple[Array, ...]:
        shape = (rows, cfg.K, capacity, cfg.H)
        if stacked:
            return zeros("LBKSH", cfg.L, *shape, dtype=cfg.dtype)
        return tuple(zeros("BKSH", *shape, dtype=cfg.dtype) for _ in range(cfg.L))

    none_BSLA = zeros("BSLA", rows, capacity, cfg.moe_layers, cfg.A, dtype=jnp.int16) - 1
    where = (zeros("BS", rows, capacity), zeros("BS", rows, capacity))
    cache = Cache(layers(), layers(), *where, none_BSLA, zeros("B", rows))
    if begun is None:
        return cache
    if stacked:
        raise ValueError("a cache that begins with another one's tokens is not stacked; give stacked=False")
    k_LKSH, v_LKSH = (tuple(mesh.constrain(z_BKSH, "LKSH")[0] for z_BKSH in z) for z in (begun.k_LBKSH, begun.v_LBKSH))
    shared = Shared(k_LKSH, v_LKSH, mesh.constrain(begun.experts_BSLA, "LSLA")[0])
    return dataclasses.replace(cache, length_B=cache.length_B + k_LKSH[0].shape[1], shared=shared)


def place(cache: Cache, positions_BT: Array, segments_BT: Array) -> Cache:
    """Write where the next tokens stand; the layers' keys and values follow with `extend`.

    Real tokens (segment > 0) come first in each row; padding behind them is overwritten by the next call.
    ValueError for more tokens than even an empty cache takes.
    """
    new, capacity = positions_BT.shape[1], cache.segments_BS.shape[1]
    if new > capacity:
        raise ValueError(f"T={new} tokens do not fit a cache of capacity {capacity}; give empty_cache at least {new}")

    def write(old_BS: Array, length_B: Array, new_BT: Array) -> Array:
        return old_BS.at[_slots(length_B, new_BT)].set(new_BT, mode="drop")

    write = mesh.per_shard(write, ("BS", "B", "BT"), "BS")
    return dataclasses.replace(
        cache,
        positions_BS=write(cache.positions_BS, _used_B(cache), positions_BT),
        segments_BS=write(cache.segments_BS, _used_B(cache), segments_BT),
    )


def extend(cache: Cache, layer: Array | int, k_BTKH: Array, v_BTKH: Array) -> Cache:
    """Write one layer's keys and values of the next tokens."""

    used_B = _used_B(cache)

    def write(old: Array, length_B: Array, new_BTKH: Array, *layer: Array) -> Array:
        rows_B1, slots_BT = _slots(length_B, new_BTKH)
        return old.at[(*layer, rows_B1, slice(None), slots_BT)].set(new_BTKH, mode="drop")

    def put(old: Array | tuple[Array, ...], new_BTKH: Array) -> Array | tuple[Array, ...]:
        if isinstance(old, tuple):
            new_BKSH = mesh.per_shard(write, ("BKSH", "B", "BTKH"), "BKSH")(old[layer], used_B, new_BTKH)
            return (*old[:layer], new_BKSH, *old[layer + 1 :])
        return mesh.per_shard(write, ("LBKSH", "B", "BTKH", ""), "LBKSH")(old, used_B, new_BTKH, layer)

    return dataclasses.replace(cache, k_LBKSH=put(cache.k_LBKSH, k_BTKH), v_LBKSH=put(cache.v_LBKSH, v_BTKH))


def read(cache: Cache, layer: Array | int) -> tuple[Array, Array]:
    """One layer's keys and values, [B, S, K, H]."""
    return cache.k_LBKSH[layer].swapaxes(1, 2), cache.v_LBKSH[layer].swapaxes(1, 2)


def advance(cache: Cache, segments_BT: Array, experts_BTLA: Array) -> Cache:
    """Note the experts of the tokens that have been written, and count the real ones."""

    def write(old_BSLA: Array, length_B: Array, new_BTLA: Array) -> Array:
        return old_BSLA.at[_slots(length_B, new_BTLA)].set(new_BTLA, mode="drop")

    new_BTLA = jnp.where(segments_BT[:, :, None, None] > 0, experts_BTLA, -1).astype(cache.experts_BSLA.dtype)
    write = mesh.per_shard(write, ("BSLA", "B", "BTLA"), "BSLA")
    experts_BSLA = write(cache.experts_BSLA, _used_B(cache), new_BTLA)
    return dataclasses.replace(
        cache, experts_BSLA=experts_BSLA, length_B=cache.length_B + jnp.sum(segments_BT > 0, axis=1, dtype=jnp.int32)
    )


def _used_B(cache: Cache) -> Array:
    """Slots that each row has filled."""
    return cache.length_B - cache.shared_tokens


def _slots(length_B: Array, new_BT: Array) -> tuple[Array, Array]:
    """Index of the rows, and of the slots that the next tokens take."""
    return jnp.arange(length_B.shape[0])[:, None], length_B[:, None] + jnp.arange(new_BT.shape[1])
