"""Published checkpoints in: `load` puts every weight on the mesh, a tensor at a time from the files' memory maps.

`Checkpoint` is what `load` and `experiments.convert` share: it checks every name and shape before anything is read, and
assembles any part of one of our arrays. Reads per-expert and fused experts, bfloat16, float16, float32, and FP8 with a
scale per block (`weight_scale_inv`) or per row (`weight_scale`, compressed-tensors), which it dequantises in float32.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, SingleDeviceSharding

from glm_jax import mesh as meshes
from glm_jax import model, spec
from glm_jax.config import ConfigError, DType, Model
from glm_jax.hf import config, names
from glm_jax.hf.names import ROUTER_BIAS, Tensor
from glm_jax.hf.safetensors import DTYPES, Entry, entries, shown
from glm_jax.spec import Spec

READ_BYTES = 2**24  # of a file that are mapped at once
FP8 = "F8_E4M3"
# tensors beside the weights that say nothing about them: tables that are computed, scales of activations
IGNORED = (".rotary_emb.inv_freq", ".input_scale", ".k_scale", ".v_scale")


def load(path: Path | str, *, dtype: Any, mesh: jax.sharding.Mesh | None = None) -> tuple[Model, model.GLM, Array]:
    """(cfg, params, router_bias_LE) of the published checkpoint in the folder `path`.

    Params are of `dtype`, and so is the computation (cfg.dtype); None: as stored, FP8 in the dtype that config.json
    names. The balance bias keeps its stored dtype, float32 in every published file. Each device of `mesh` gets its
    part of each weight as `glm_jax.mesh.at_rest` lays it out; without a mesh all goes to the default device. On the
    host there is never more than one device's part of one weight. ConfigError names the file or tensor that is wrong,
    or the weight that `mesh` cannot split.
    """
    checkpoint = Checkpoint(Path(path), dtype)
    if mesh is not None:
        meshes.check_weights(mesh, model.specs(checkpoint.cfg))

    def place(name: str, declared: Spec) -> Array:
        where = SingleDeviceSharding(jax.devices()[0])
        if mesh is not None:
            where = NamedSharding(mesh, meshes.at_rest(declared))
        return jax.make_array_from_callback(declared.shape, where, lambda part: checkpoint.read(name, part))

    params = jax.tree_util.tree_map_with_path(
        lambda keys, declared: place(spec.path_name(keys), declared), model.specs(checkpoint.cfg)
    )
    cfg = checkpoint.cfg
    bias_LE = place(ROUTER_BIAS, model.router_bias_spec(cfg)) if cfg.router_rows else model.router_bias(cfg)
    return cfg, params, bias_LE


@dataclass(frozen=True)
class Scale:
    """Scales of an FP8 tensor: one for each block of (rows, columns). `first` is the row of `entry` where those of this
    tensor's expert begin, `offset` the rows of the blocks that lie before the tensor."""

    entry: Entry
    block: tuple[int, int]
    first: int = 0
    offset: int = 0

    def at(self, rows: range, columns: range) -> np.ndarray:
        """The scale of each of these entries, float32, or what broadcasts to it."""
        height, width = self.block
        of_row = self.first + (self.offset + np.arange(rows.start, rows.stop)) // height
        of_column = np.arange(columns.start, columns.stop) // width
        return np.asarray(self.entry.rows(0, self.entry.height), np.float32)[np.ix_(of_row, of_column)]


@dataclass(frozen=True)
class Region:
    """Where one matrix lies: from row `first` of a file's tensor on, to be multiplied by its scales if it has any."""

    entry: Entry
    first: int = 0
    scale: Scale | None = None

    def read(self, rows: range, columns: range) -> np.ndarray:
        """A part of the matrix: mapped, or dequantised in float32."""
        there = self.entry.rows(self.first + rows.start, self.first + rows.stop)[:, columns.start : columns.stop]
        return there if self.scale is None else there.astype(np.float32) * self.scale.at(rows, columns)


class Checkpoint:
    """A published checkpoint whose names, shapes and sizes have been found right; nothing of it has been read."""

    def __init__(self, folder: Path, dtype: Any = None):
        self.folder = folder
        self.published = config.read(folder)
        self._entries = entries(folder)
        self._block = self.published.block
        name = self.published.dtype if dtype is None else dtype_name(dtype)
        self.cfg = dataclasses.replace(self.published.model, mtp_layers=self._mtp_layers(), dtype=name)
        self._dtype = None if dtype is None else jnp.dtype(name)
        self.weights = names.weights(self.cfg)
        self._check_names()
        self._check_copies()

    @cached_property
    def dtypes(self) -> dict[str, np.dtype]:
        """Dtype in which each weight is read."""
        return {path: self._dtype_of(path) for path in self.weights}

    def read(self, path: str, part: Sequence[slice] | None = None) -> np.ndarray:
        """One of our arrays, or a part of it."""
        declared = self.weights[path]
        whole = [slice(None)] * len(declared.shape)
        ranges = tuple(range(*one.indices(n)) for one, n in zip(part or whole, declared.shape, strict=True))
        out = np.empty([len(r) for r in ranges], self.dtypes[path])
        batch, ins, outs = len(declared.batch), len(declared.ins), len(declared.outs)
        sizes = declared.shape[batch:]
        in_range = _flat(ranges[batch : batch + ins], sizes[:ins])
        out_range = _flat(ranges[batch + ins :], sizes[ins : ins + outs])
        first = [r.start for r in ranges[:batch]]
        for tensor in names.tensors(declared, ranges[:batch]):
            local = tuple(i - start for i, start in zip(tensor.index, first, strict=True))
            target = out[local].reshape(len(in_range), len(out_range))
            self._fill(target, self._region(declared, tensor), names.transposed(declared), in_range, out_range)
        return out

    def _fill(self, target: np.ndarray, region: Region, transposed: bool, ins: range, outs: range) -> None:
        """Copy a matrix, or a part of it, in pieces of READ_BYTES."""
        if not region.entry.shape[1:]:  # a vector: its entries are the file's rows
            ins, outs, target = outs, range(1), target.reshape(-1, 1)
        rows, columns = (outs, ins) if transposed else (ins, outs)
        target = target.T if transposed else target
        step = max(1, READ_BYTES // (region.entry.width * region.entry.dtype.itemsize))
        for begin in range(rows.start, rows.stop, step):
            piece = range(begin, min(begin + step, rows.stop))
            copy(target[piece.start - rows.start : piece.stop - rows.start], region.read(piece, columns))

    def _region(self, declared: Spec, tensor: Tensor) -> Region:
        entry = self._entries.get(tensor.name)
        if entry is not None:
            return Region(entry, 0, self._scale(entry))
        assert tensor.fused is not None  # _check_names has seen it
        fused, entry = tensor.fused, self._entries[tensor.fused.name]
        rows = names.tensor_shape(declared)[0]
        offset = fused.part * rows
        return Region(entry, fused.expert * fused.parts * rows + offset, self._scale(entry, fused.expert, offset))

    def _scale(self, entry: Entry, expert: int = 0, offset: int = 0) -> Scale | None:
        """Scales of an FP8 tensor: those of its blocks, of its rows, or the one that all share."""
        if entry.code != FP8:
            return None
        rows, columns = entry.shape[-2:]
        block_wise = self._entries.get(f"{entry.name}_scale_inv")
        if block_wise is not None:
            return Scale(block_wise, self._block, expert * _blocks(rows, self._block[0]), offset)
        shared = self._entries[f"{entry.name}_scale"]
        if shared.size == 1:
            return Scale(shared, (entry.size, columns))
        return Scale(shared, (1, columns), expert * rows, offset)

    def _dtype_of(self, path: str) -> np.dtype:
        if self._dtype is not None and path != ROUTER_BIAS:
            return self._dtype
        declared = self.weights[path]
        parts = (self._region(declared, tensor).entry for tensor in names.tensors(declared))
        named = jnp.dtype(self.published.dtype)
        stored = {named if entry.code == FP8 else entry.dtype for entry in parts}
        return stored.pop() if len(stored) == 1 else np.dtype(np.float32)

    def _mtp_layers(self) -> int:
        """As many as config.json names, or as there are where it is silent; none where it names one that is not there
        (what saves the main model alone leaves the number as it was)."""
        layer = model.LAYER.format(L=self.published.model.L)
        there = any(name.startswith(layer) for name in self._entries)
        named = self.published.mtp_layers
        return int(there) if named is None else named * there

    def _check_names(self) -> None:
        """Raise ConfigError for a tensor that is missing, superfluous, of another shape, or of a dtype nobody can read."""
        needed: dict[str, tuple[int, ...]] = {}
        for declared in self.weights.values():
            shape = names.tensor_shape(declared)
            for tensor in names.tensors(declared):
                fused = tensor.fused
                if fused is not None and tensor.name not in self._entries and fused.name in self._entries:
                    needed[fused.name] = (self.cfg.E, fused.parts * shape[0], *shape[1:])
                else:
                    needed[tensor.name] = shape
        embedding = names.tensor_shape(self.weights["embed_VD"])
        needed |= dict.fromkeys(names.copies(self.cfg).keys() & self._entries.keys(), embedding)
        self._check_present(needed)
        scales = dict(self._scales(needed))
        self._check_present(scales)
        for name, shape in {**needed, **scales}.items():
            self._check_entry(self._entries[name], shape)
        extra = self._entries.keys() - needed.keys() - scales.keys()
        extra = sorted(name for name in extra if not name.endswith(IGNORED))
        if extra:
            raise ConfigError(
                f"{self.folder} holds {len(extra)} tensors that its {config.FILE} has no place for: {shown(extra)}; "
                "a wrong config.json, or another architecture"
            )

    def _check_present(self, needed: dict[str, tuple[int, ...]]) -> None:
        missing = [name for name in needed if name not in self._entries]
        if missing:
            described = [f"{name} {list(needed[name])}" for name in missing]
            raise ConfigError(f"{self.folder} lacks {len(missing)} tensors: {shown(described)}")

    def _check_entry(self, entry: Entry, shape: tuple[int, ...]) -> None:
        if entry.code not in DTYPES:
            raise ConfigError(f"{entry.file}: {entry.name} is {entry.code}; known: {', '.join(DTYPES)}")
        if entry.shape != shape:
            raise ConfigError(
                f"{entry.file}: {entry.name} has shape {list(entry.shape)}, but {config.FILE} makes it {list(shape)}"
            )

    def _scales(self, needed: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of the scales that FP8 tensors need: of blocks if they are there, else of rows or of the whole."""
        for name in needed:
            if self._entries[name].code != FP8:
                continue
            *experts, rows, columns = needed[name]
            height, width = self._block
            if f"{name}_scale_inv" in self._entries:
                yield f"{name}_scale_inv", (*experts, _blocks(rows, height), _blocks(columns, width))
                continue
            shape = (*experts, rows, 1)
            there = self._entries.get(f"{name}_scale")
            if there is not None and there.size in (1, math.prod(shape)):
                shape = there.shape
            yield f"{name}_scale", shape

    def _check_copies(self) -> None:
        """Raise ConfigError where the MTP layer's copy of the embedding or of the head is not what it repeats."""
        for name, path in names.copies(self.cfg).items():
            copied = self._entries.get(name)
            if copied is None:
                continue
            (original,) = (self._entries[tensor.name] for tensor in names.tensors(self.weights[path]))
            if copied.code != original.code:
                raise ConfigError(f"{copied.file}: {name} is {copied.code}, but {original.name} is {original.code}")
            step = max(1, READ_BYTES // (copied.width * original.dtype.itemsize))
            for begin in range(0, copied.shape[0], step):
                end = min(begin + step, copied.shape[0])
                same = (words(copied.rows(begin, end)) == words(original.rows(begin, end))).all(axis=1)
                if not same.all():
                    raise ConfigError(
                        f"{copied.file}: row {begin + int(np.argmin(same))} of {name} differs from that of {original.name}, "
                        "which it should repeat: the MTP layer shares the main model's embedding and head"
                    )


def dtype_name(dtype: Any) -> DType:
    """float32, bfloat16 or float16, however it is written."""
    name = jnp.dtype(dtype).name
    if name not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype={name}: parameters are float32, bfloat16 or float16")
    return name


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source, cast if need be; equal dtypes as plain words, which NumPy moves much faster than bfloat16."""
    if target.dtype == source.dtype:
        words(target)[...] = words(source)
    else:
        target[...] = source.astype(target.dtype)


def words(z: np.ndarray) -> np.ndarray:
    """The same bits as unsigned integers."""
    return z.view(np.dtype(f"u{z.dtype.itemsize}"))


def _flat(ranges: Sequence[range], sizes: Sequence[int]) -> range:
    """The range of a part of neighbouring dims once they are one; the part must be contiguous there."""
    start, length = 0, 1
    for r, size in zip(ranges, sizes, strict=True):
        assert length == 1 or len(r) == size, "a part of a matrix with a hole"
        start, length = start * size + r.start, length * len(r)
    return range(start, start + length)


def _blocks(size: int, block: int) -> int:
    return -(-size // block)
