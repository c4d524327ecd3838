"""The only file that names mesh axes: how devices are laid out, and which letter goes along which axis.

Axes are Explicit: a wrong layout fails while tracing and names the operation. One device is a mesh of size one,
and without any mesh (a notebook that calls a function on plain arrays) every function here leaves its input alone.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from glm_jax import config
from glm_jax.cast import Beside, cast
from glm_jax.config import ConfigError
from glm_jax.spec import Spec, leaves
from pallas_kernels.fp8 import Quantized

PIPELINE, FSDP, CONTEXT, EXPERT, TENSOR = "pipeline", "fsdp", "context", "expert", "tensor"
AXES = ("data", PIPELINE, FSDP, CONTEXT, EXPERT, TENSOR)
OPTIONAL = (PIPELINE, TENSOR)  # told only where they split something
# Rows of tokens are split over these, the tokens of a row over context. Pipeline comes first: `parallel.pipeline` takes it off.
BATCH = (PIPELINE, "data", FSDP, EXPERT)
SHARING = (EXPERT, TENSOR)  # whose devices have each a share of the vocabulary
# Of weights, to which context is more of fsdp; pipeline too, always after these, and then tensor, which `turn` takes off first.
SHARDS = (FSDP, CONTEXT)
WHOLE_ROW = "whole_row"  # what `row` brought together
BLOCK = 16  # rows of a tile of bfloat16

Rules = dict[str, str | tuple[str, ...]]  # letter -> axis, or axes
# Of a weight between steps, with its gradient and its optimizer state; and while its layer computes.
EXPERTS: Rules = {"E": EXPERT, "D": (*SHARDS, PIPELINE, TENSOR)}
EXPERTS_IN_USE: Rules = {"E": EXPERT, "M": TENSOR}  # fsdp's shards are gathered, other devices' experts never are
VOCABULARY: Rules = {"V": (EXPERT, TENSOR, *SHARDS, PIPELINE)}  # of the embedding and the output matrix
VOCABULARY_IN_USE: Rules = {"V": SHARING}  # look-up and loss work on a share of it
OTHERS: Rules = {"D": (*SHARDS, EXPERT, PIPELINE, TENSOR)}
OTHERS_IN_USE: Rules = dict.fromkeys("NKFM", TENSOR)  # some of the heads, some of the hidden width
# S of a cache, which no context axis above 1 meets
ACTIVATIONS: Rules = {"B": BATCH, "T": CONTEXT, "S": CONTEXT} | OTHERS_IN_USE


def make(cfg: config.Mesh, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """A mesh of `devices` (all there are by default) with the sizes of `cfg`; one size may be -1, what is left.

    Neighbours on the network become neighbours in the mesh; `data` goes over slices first, where there are several.
    """
    devices = jax.devices() if devices is None else list(devices)
    cfg = fill(cfg, len(devices))
    sizes = tuple(sizes_of(cfg).values())
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1 and cfg.data % slices == 0:
        inside, over = (cfg.data // slices, *sizes[1:]), (slices, *[1] * len(sizes[1:]))
        placed = mesh_utils.create_hybrid_device_mesh(inside, over, devices, allow_split_physical_axes=True)
    else:
        placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(placed, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def fill(cfg: config.Mesh, devices: int) -> config.Mesh:
    """`cfg` with the -1 replaced by what is left of so many devices; ConfigError if it does not fit them."""
    sizes = sizes_of(cfg)
    known = math.prod(n for n in sizes.values() if n != -1)
    if devices % known or (-1 not in sizes.values() and known != devices):
        raise ConfigError(
            f"mesh {told(sizes)} does not fit {devices} devices; "
            f"make the product {devices}, or set one size to -1 with the others dividing {devices}"
        )
    return config.Mesh(**{axis: n if n != -1 else devices // known for axis, n in sizes.items()})


def sizes_of(cfg: config.Mesh) -> dict[str, int]:
    """Size of each axis, in the mesh's order."""
    return {axis: getattr(cfg, axis) for axis in AXES}


def told(sizes: Mapping[str, int]) -> str:
    """Sizes as they are written in options and messages, of optional axes only those that are any."""
    return ", ".join(f"{axis}={size}" for axis, size in sizes.items() if axis not in OPTIONAL or size > 1)


def check(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, specs: Any, rows: int, length: int) -> None:
    """Raise ConfigError where a weight or a microbatch of `rows` of `length` tokens cannot be split over `mesh`."""
    check_weights(mesh, specs)
    parts = math.prod(mesh.shape[axis] for axis in BATCH)
    over = [axis for axis in BATCH if axis != PIPELINE or mesh.shape[axis] > 1]
    if rows % parts:
        raise ConfigError(
            f"a microbatch of B={rows} rows cannot be split over {parts} devices ({' x '.join(over)}); "
            f"set microbatch_rows (--batch of a plan) to a multiple of {parts}"
        )
    chunks = 2 * mesh.shape[CONTEXT]  # an early and a late one to each device: see `parallel.context`
    if mesh.shape[CONTEXT] > 1 and length % chunks:
        divisor = f"a divisor of {length // 2}" if length % 2 == 0 else "1"
        raise ConfigError(
            f"a row of T={length} tokens cannot be split over a context axis of {mesh.shape[CONTEXT]}, in {chunks} equal "
            f"chunks; use a multiple of {chunks} tokens, or {divisor} for mesh.context"
        )


def check_weights(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, specs: Any) -> None:
    """Raise ConfigError where a weight cannot be split over `mesh`."""
    for turn in range(3):  # the likelier mistakes first: experts, width, vocabulary
        for name, spec in leaves(specs):
            for layout in (at_rest(spec), in_use(spec)):
                for letter, size, axes in zip(spec.dims, spec.shape, layout, strict=True):
                    if {"E": 0, "V": 2}.get(letter, 1) == turn:
                        _check_split(mesh, name, letter, size, axes)


def _check_split(mesh: Any, name: str, letter: str, size: int, axes: str | tuple[str, ...] | None) -> None:
    several = [axis for axis in _tuple(axes) if mesh.shape[axis] > 1]
    parts = math.prod(mesh.shape[axis] for axis in several)
    if size % parts:
        over = f"{' x '.join(several)} {'axis' if len(several) == 1 else 'axes'}"
        raise ConfigError(
            f"{name}: {letter}={size} cannot be split over {over} of {parts}; "
            f"use a divisor of {size} for mesh.{' times mesh.'.join(several)}"
        )


def at_rest(spec: Spec) -> PartitionSpec:
    """Layout of a weight between steps: every device of a slice has its own part."""
    return _layout(spec, EXPERTS, VOCABULARY, OTHERS)


def in_use(spec: Spec) -> PartitionSpec:
    """Layout of a weight while its layer computes."""
    return _layout(spec, EXPERTS_IN_USE, VOCABULARY_IN_USE, OTHERS_IN_USE)


def in_stages(spec: Spec) -> PartitionSpec:
    """Layout of a stack of layers of which each stage of `parallel.pipeline` has its own."""
    return PartitionSpec(PIPELINE, *without(at_rest(spec), PIPELINE)[1:])


def everywhere(spec: Spec) -> PartitionSpec:
    """Layout of a weight that every device has whole."""
    del spec
    return PartitionSpec()


def axes_of(layout: Iterable[Any]) -> tuple[str, ...]:
    """The axes that a layout splits an array over."""
    return tuple(axis for axes in layout for axis in _tuple(axes))


def abstract(cfg: config.Mesh) -> jax.sharding.AbstractMesh:
    """The mesh without devices: enough to check and to trace."""
    return jax.sharding.AbstractMesh(tuple(sizes_of(cfg).values()), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def activation(dims: str) -> PartitionSpec:
    """Layout of an activation named by its letters. In a stage of `parallel.pipeline` there is no pipeline axis."""
    layout = PartitionSpec(*(ACTIVATIONS.get(letter) for letter in dims))
    return without(layout, PIPELINE) if in_stage() else layout


def shardings(mesh: jax.sharding.Mesh, specs: Any) -> Any:
    """NamedSharding at rest for every weight of `specs`."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, at_rest(spec)), specs)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Layout of a stack of microbatches [C, B, T]: rows split, and the tokens of each."""
    return NamedSharding(mesh, PartitionSpec(None, *activation("BT")))


def process_share(mesh: jax.sharding.Mesh, rows: int) -> tuple[int, int]:
    """(index, count): this process's devices hold part `index` of `count` equal parts of a microbatch of `rows` rows.

    A part is a set of rows, neighbours or not; processes whose devices hold other tokens of the same rows share one.
    """
    held: dict[int, set[int]] = {}
    for device, where in NamedSharding(mesh, PartitionSpec(BATCH)).devices_indices_map((rows,)).items():
        held.setdefault(device.process_index, set()).add(where[0].indices(rows)[0])
    parts = sorted({tuple(sorted(part)) for part in held.values()})
    if len(set(map(len, parts))) > 1 or sum(map(len, parts)) > len(set().union(*parts)):
        raise ConfigError(
            f"mesh {told(mesh.shape)}: processes hold some of each other's rows; make mesh.context times mesh.tensor a "
            f"multiple or a divisor of the {jax.local_device_count()} devices of a process"
        )
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def placed(batch: Any) -> Any:
    """Host arrays [B, T] on the devices of the mesh that is set, rows and tokens split, or on the default device."""
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


def in_stage() -> bool:
    """Whether this is traced for one stage of a pipeline, to which the mesh has no pipeline axis."""
    return PIPELINE in jax.sharding.get_abstract_mesh().manual_axes


def without(layout: PartitionSpec, *these: str) -> PartitionSpec:
    """`layout` with nothing split over these axes."""
    return PartitionSpec(*(tuple(axis for axis in _tuple(axes) if axis not in these) or None for axes in layout))


def axis_size(axis: str) -> int:
    """Devices along `axis` of the mesh that is set; 1 without one."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def gather(params: Any, specs: Any, dtype: Any) -> Any:
    """The FSDP gather, in sight: a layer's weights from their layout at rest to the one in use, cast to `dtype` on the way.
    A gradient is scattered as it is summed: no device ever has the whole sum.

    Experts stay as they lie: they are gathered where their tokens are, in `parallel.expert`. So do a sampler's weights of 8 bits.
    """

    def use(spec: Spec, w: Array | Beside | Quantized) -> Array | Quantized:
        if isinstance(w, Quantized):
            return w
        w = cast(w, spec, dtype)
        return w if not active() or "E" in spec.batch else _gathered(w, in_use(spec))

    return jax.tree.map(use, specs, params)


def spread(params: Any, specs: Any, dtype: Any, layout: Callable[[Spec], PartitionSpec]) -> Any:
    """Weights cast and brought to another layout to be held there, as sampling does; gradients had better use `gather`."""

    def use(spec: Spec, w: Array | Beside) -> Array:
        w = cast(w, spec, dtype)
        return jax.sharding.reshard(w, layout(spec)) if active() else w

    return jax.tree.map(use, specs, params)


def _gathered(w: Array, there: PartitionSpec) -> Array:
    """`w` in the layout `there`, which splits it over fewer axes than its own, or over tensor along another dimension.

    Its type says `reduced` of the axes that it is equal on, so that a product's gradient for it stays the partial sum of each
    device until the transposed gather scatters it. One axis at a time, the innermost first: of several at once TPU's compiler makes
    an all-reduce, for twice the bytes. In a stage of a pipeline jax has no `reduced`: there a gradient is summed on every device
    before it is split, unless the compiler makes one of the two.
    """
    # along tensor, whose devices have the same tokens and so the same gradient, a weight that they all have whole is gathered by jax;
    # and a pipeline of one is none
    plain = {TENSOR: TENSOR not in axes_of(there), PIPELINE: axis_size(PIPELINE) == 1}
    w = jax.sharding.reshard(w, without(jax.typeof(w).sharding.spec, *(axis for axis in plain if plain[axis])))
    here = jax.typeof(w).sharding.spec.partitions
    leaving = [(d, axis) for d in range(w.ndim) for axis in reversed(_tuple(here[d])) if axis not in _tuple(there[d])]
    turned = [(d, axis) for d, axis in leaving if axis in axes_of(there)]  # the innermost of its dimension
    steps = [step for step in leaving if step not in turned]
    over = {axis for _, axis in steps}
    if in_stage() or all(axis_size(axis) == 1 for axis in over):
        return jax.sharding.reshard(w, there)
    equal = [axis for axis in AXES if axis not in (TENSOR, *axes_of(there))]

    def local(w: Array) -> Array:
        # first, so that a gradient is summed over copies of the weights last, when it is scattered: between slices that is slow
        w = jax.lax.pcast(w, tuple(axis for axis in equal if axis not in over), to="reduced")
        for d, axis in turned:
            w = turn(w, axis, d, next(e for e in range(w.ndim) if axis in _tuple(there[e])))
        for d, axis in steps:
            w = joined(w, axis, d, to="reduced")
        return w

    return jax.shard_map(
        local, in_specs=PartitionSpec(*here), out_specs=PartitionSpec(*there, reduced=frozenset(equal))
    )(w)


def turn(shard: Array, axis: str, d: int, e: int) -> Array:
    """Inside shard_map: what is split over a mesh axis along dimension d is split along e, each device's part as large as before."""
    return jax.lax.all_to_all(shard, axis, split_axis=e, concat_axis=d, tiled=True) if axis_size(axis) > 1 else shard


def joined(shard: Array, axis: str, d: int, to: Literal["varying", "reduced"] = "varying") -> Array:
    """Inside shard_map: the shards of a mesh axis side by side along dimension d.

    Shards that are no whole tiles, or lie along the innermost dimension, come along one of their own, the outermost in memory too:
    scattered along any other, TPU's compiler sums their gradient everywhere first, for twice the bytes.
    """
    if shard.shape[d] % BLOCK == 0 and d < shard.ndim - 1:
        return jax.lax.all_gather(shard, axis, axis=d, tiled=True, to=to)
    return _apart(shard, axis, d, to)


def _apart(shard: Array, axis: str, d: int, to: Literal["varying", "reduced"]) -> Array:
    """The shards along a dimension of their own, until they are here."""
    shards = jax.lax.all_gather(shard, axis, axis=0, to=to)
    shards = with_layout_constraint(shards, Layout(major_to_minor=tuple(range(shards.ndim))))
    return jnp.moveaxis(shards, 0, d).reshape([*shard.shape[:d], -1, *shard.shape[d + 1 :]])


def whole(x: Array, batch: Sequence[int]) -> Array:
    """`x` with no dimension split but those in `batch`."""
    if not active():
        return x
    layout = jax.typeof(x).sharding.spec
    return jax.sharding.reshard(x, PartitionSpec(*(layout[d] if d in batch else None for d in range(x.ndim))))


def local_bytes(x: Array) -> int:
    """Bytes of `x` that one device has."""
    return x.nbytes // math.prod(map(axis_size, axes_of(jax.typeof(x).sharding.spec))) if active() else x.nbytes


def rest(x: Array, spec: Spec) -> Array:
    """A weight-shaped `x` in its layout between steps."""
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


def put_rows(x: Array, some_B: Array, rows: Array) -> Array:
    """`x` with `rows` in place of rows some_B, where one device has them all."""
    if not active():
        return x.at[some_B].set(rows)
    spec = jax.typeof(x).sharding.spec
    put = jax.shard_map(
        lambda x, some_B, rows: x.at[some_B].set(rows), in_specs=(spec, PartitionSpec(), spec), out_specs=spec
    )
    return put(x, some_B, rows)


def out_sharding(dims: str) -> PartitionSpec | None:
    """For operations that take `out_sharding`: the layout of an activation named `dims`, None without a mesh."""
    return activation(dims) if active() else None


def per_shard(fn: Callable, ins: Sequence[str], outs: str | tuple[str, ...]) -> Callable:
    """`fn` on each device's tokens: activations named by `ins` in (None, or several of one layout, too), those named by `outs` back; the
    output matrix, "DV", and the embedding, "VD", with their share of the vocabulary. Kernels run inside."""
    if not active():
        return fn

    def layout(dims: str, x: Any) -> PartitionSpec:
        share = {"DV": (None, SHARING), "VD": (SHARING,)}.get(dims)
        return PartitionSpec(*share, reduced=jax.typeof(x).sharding.spec.reduced) if share else activation(dims)

    def run(*arrays: Any) -> Any:
        layouts = tuple(map(layout, ins, arrays))
        return jax.shard_map(fn, in_specs=layouts, out_specs=jax.tree.map(activation, outs))(*arrays)

    return run


def copied_as(z: Array, x: Array) -> Array:
    """Inside `per_shard`: `z`, the same on all devices, as one that varies where `x` does: a kernel's inputs vary alike."""
    missing = jax.typeof(x).manual_axis_type.varying - jax.typeof(z).manual_axis_type.varying
    return jax.lax.pcast(z, tuple(axis for axis in AXES if axis in missing), to="varying") if missing else z


def row(z: Array) -> Array:
    """Inside `per_shard`: `z`, [B, T, ...], of all tokens of its rows, from the devices along the context axis, named for what
    rematerialisation may keep."""
    return checkpoint_name(_apart(z, CONTEXT, 1, "varying"), WHOLE_ROW) if axis_size(CONTEXT) > 1 else z


def _layout(spec: Spec, experts: Rules, vocabulary: Rules, others: Rules) -> PartitionSpec:
    split = set(spec.dims) - set(spec.replicate)
    rules = experts if "E" in split else vocabulary if "V" in split else others
    return PartitionSpec(*(rules.get(letter) if letter in split else None for letter in spec.dims))


def _tuple(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()
