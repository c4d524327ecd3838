"""The only file that names mesh axes: how devices are laid out, and which letter goes along which axis.

Axes are Explicit: a wrong layout fails while tracing and names the operation. One device is a mesh of size one,
and without any mesh (a notebook that calls a function on plain arrays) every function here leaves its input alone.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from glm_jax import config
from glm_jax.config import ConfigError
from glm_jax.spec import Spec, leaves

AXES = ("data", "fsdp", "expert")
BATCH = AXES  # rows of tokens are split over every axis
EXPERT = "expert"

AT_REST = {"D": "fsdp", "E": "expert"}  # letter -> axis of a weight, its gradient and its optimizer state
IN_USE = {"E": "expert"}  # the same while a layer computes: the fsdp shards have been gathered
ACTIVATIONS = {"B": BATCH, "X": BATCH}


def make(cfg: config.Mesh, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """A mesh of `devices` (all there are by default) with the sizes of `cfg`; one size may be -1, what is left."""
    devices = jax.devices() if devices is None else list(devices)
    sizes = [cfg.data, cfg.fsdp, cfg.expert]
    known = math.prod(n for n in sizes if n != -1)
    if len(devices) % known or (-1 not in sizes and known != len(devices)):
        raise ConfigError(
            f"mesh data={cfg.data}, fsdp={cfg.fsdp}, expert={cfg.expert} does not fit {len(devices)} devices; "
            f"make the product {len(devices)}, or set one size to -1 with the others dividing {len(devices)}"
        )
    sizes = [n if n != -1 else len(devices) // known for n in sizes]
    return jax.sharding.Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def check(mesh: jax.sharding.Mesh, specs: Any, rows: int) -> None:
    """Raise ConfigError where a weight or a microbatch of `rows` cannot be split over `mesh`."""
    if rows % mesh.size:
        raise ConfigError(
            f"a microbatch of B={rows} rows cannot be split over {mesh.size} devices (data x fsdp x expert); "
            f"set microbatch_rows to a multiple of {mesh.size}"
        )
    for name, spec in leaves(specs):
        for letter, size, axis in zip(spec.dims, spec.shape, at_rest(spec), strict=True):
            if axis and size % mesh.shape[axis]:
                raise ConfigError(
                    f"{name}: {letter}={size} cannot be split over {axis} axis of {mesh.shape[axis]}; "
                    f"use a divisor of {size} for mesh.{axis}"
                )


def at_rest(spec: Spec) -> PartitionSpec:
    """Layout of a weight between steps."""
    return _layout(spec, AT_REST)


def in_use(spec: Spec) -> PartitionSpec:
    """Layout of a weight while its layer computes."""
    return _layout(spec, IN_USE)


def activation(dims: str) -> PartitionSpec:
    """Layout of an activation named by its letters."""
    return PartitionSpec(*(ACTIVATIONS.get(letter) for letter in dims))


def shardings(mesh: jax.sharding.Mesh, specs: Any) -> Any:
    """NamedSharding at rest for every weight of `specs`."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, at_rest(spec)), specs)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Layout of a stack of microbatches [C, B, T]: rows split over every axis."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH))


def process_share(mesh: jax.sharding.Mesh, rows: int) -> tuple[int, int]:
    """(index, count): this process's devices hold part `index` of `count` equal parts of a microbatch of `rows` rows."""
    held = NamedSharding(mesh, PartitionSpec(BATCH)).addressable_devices_indices_map((rows,))
    parts = [index[0].indices(rows) for index in held.values() if index]
    begin, end = min(part[0] for part in parts), max(part[1] for part in parts)
    return begin // (end - begin), rows // (end - begin)


def placed(batch: Any) -> Any:
    """Host arrays [B, T] on the devices: rows split over every axis of the mesh that is set, or the default device."""
    layout = NamedSharding(jax.sharding.get_mesh(), activation("BT")) if active() else None
    return jax.device_put(batch, layout)


def concrete(shapes: Any) -> Any:
    """ShapeDtypeStructs from `jax.eval_shape`, with their layouts on the devices of the mesh that is set, or on the
    default device."""

    def place(z: Any) -> jax.ShapeDtypeStruct:
        where = SingleDeviceSharding(jax.devices()[0])
        if active():
            where = NamedSharding(jax.sharding.get_mesh(), z.sharding.spec if z.sharding else PartitionSpec())
        return jax.ShapeDtypeStruct(z.shape, z.dtype, sharding=where)

    return jax.tree.map(place, shapes)


def active() -> bool:
    """Whether a mesh is set (`jax.set_mesh`)."""
    return not jax.sharding.get_abstract_mesh().empty


def axis_size(axis: str) -> int:
    """Devices along `axis` of the mesh that is set; 1 without one."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def gather(params: Any, specs: Any, dtype: Any) -> Any:
    """The FSDP gather, in sight: weights from their layout at rest to the one in use, cast to `dtype` on the way.

    Norm scales and the router keep their own precision: both are computed in float32 (spec section 1.1).
    """

    def use(spec: Spec, w: Array) -> Array:
        w = w if spec.kind in ("norm", "router") else w.astype(dtype)
        return jax.sharding.reshard(w, in_use(spec)) if active() else w

    return jax.tree.map(use, specs, params)


def whole(x: Array, spec: Spec) -> Array:
    """A weight-shaped `x` with every matrix whole on its device: its batch letters take the axes that divide them."""
    return jax.sharding.reshard(x, _whole(spec, x.shape)) if active() else x


def rest(x: Array, spec: Spec) -> Array:
    """A weight-shaped `x` back in its layout between steps."""
    return jax.sharding.reshard(x, at_rest(spec)) if active() else x


def constrain(x: Array, dims: str) -> Array:
    """`x` in the layout of an activation named `dims`."""
    return jax.sharding.reshard(x, activation(dims)) if active() else x


def zeros(like: Any) -> Array:
    """Zeros of the shape, dtype and layout of `like`, an array's type from `jax.eval_shape`."""
    layout = like.sharding.spec if like.sharding else PartitionSpec()
    return jnp.zeros(like.shape, like.dtype, out_sharding=layout if active() else None)


def rows_of(x: Array, source_B: Array) -> Array:
    """Row source_B[b] of `x` as row b, whichever device has it."""
    return x.at[source_B].get(out_sharding=jax.typeof(x).sharding.spec if active() else None)


def out_sharding(dims: str) -> PartitionSpec | None:
    """For operations that take `out_sharding`: the layout of an activation named `dims`, None without a mesh."""
    return activation(dims) if active() else None


def per_shard(fn: Callable, ins: Sequence[str], outs: str | tuple[str, ...]) -> Callable:
    """`fn` on each device's rows: activations named by `ins` in, those named by `outs` back. Kernels run inside."""
    if not active():
        return fn
    return jax.shard_map(fn, in_specs=tuple(map(activation, ins)), out_specs=jax.tree.map(activation, outs))


def vary(w: Array) -> Array:
    """Inside `per_shard`: a replicated input of a kernel, so that its gradient is summed over the devices."""
    return jax.lax.pcast(w, BATCH, to="varying") if active() else w


def total(x: Array) -> Array:
    """Inside `per_shard`: the sum over all devices."""
    return jax.lax.psum(x, BATCH) if active() else x


def _layout(spec: Spec, rules: dict[str, str]) -> PartitionSpec:
    return PartitionSpec(*(None if letter in spec.replicate else rules.get(letter) for letter in spec.dims))


def _whole(spec: Spec, shape: tuple[int, ...]) -> PartitionSpec:
    free, sizes = list(AXES), dict(zip(spec.dims, shape, strict=True))
    layout: dict[str, tuple[str, ...]] = dict.fromkeys(spec.dims, ())
    for letter, axis in (("E", EXPERT), ("L", "fsdp"), ("E", "fsdp")):
        if letter not in spec.batch or axis not in free:
            continue
        if sizes[letter] % math.prod(map(axis_size, (*layout[letter], axis))) == 0:
            layout[letter] += (axis,)
            free.remove(axis)
    return PartitionSpec(*(layout[letter] or None for letter in spec.dims))
