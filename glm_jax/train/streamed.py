"""Checkpoints an array's block at a time, for conversion of models that no host's memory holds.

orbax writes the folder, with a number in the place of each array, and commits it; the arrays themselves are then written
by tensorstore where orbax looks for them. What comes out is an orbax checkpoint like any other
(`checkpoint.Checkpoints` restores it), and any of ours can be read the same way.
"""

import itertools
import logging
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from glm_jax import model, spec
from glm_jax.config import Model
from glm_jax.train import checkpoint

STEP = 0  # of a converted checkpoint
PARAMS, ROUTER_BIAS = "params", "router_bias_LE"
SMALL_CHUNK = 2**24  # bytes: parts of a larger chunk would decode it again and again
_COMPRESSOR = {"id": "zstd", "level": 1}  # as orbax has it


class Stored:
    """An array of a checkpoint, on disk: a part is read when it is asked for. `Whole` reads it where its chunks are large."""

    def __init__(self, store: ts.TensorStore, whole: "Whole"):
        self._store, self._whole = store, whole
        self.shape, self.dtype = tuple(store.shape), np.dtype(store.dtype.numpy_dtype)

    def __getitem__(self, part: tuple[slice, ...]) -> np.ndarray:
        if math.prod(_chunk(self._store)) * self.dtype.itemsize > SMALL_CHUNK:
            return self._whole.of(self._store)[part]
        return self._store[part].read().result()


class Whole:
    """All of the array that was asked for last, in memory: it is read chunk by chunk, and no chunk twice."""

    def __init__(self):
        self._store, self._values = None, np.empty(0)

    def of(self, store: ts.TensorStore) -> np.ndarray:
        if store is not self._store:
            self._store, self._values = None, np.empty(0)  # the one before goes first
            self._values = np.empty(store.shape, store.dtype.numpy_dtype)
            chunk = _chunk(store)
            for index in itertools.product(*(range(0, n, step) for n, step in zip(store.shape, chunk, strict=True))):
                part = tuple(slice(i, min(i + step, n)) for i, step, n in zip(index, chunk, store.shape, strict=True))
                self._values[part] = store[part].read().result()
            self._store = store
        return self._values


def arrays(folder: Path, cfg: Model) -> dict[str, Stored]:
    """Dotted path -> array of the parameters, and `router_bias_LE`, in the last checkpoint of a stage's folder.

    Training's chunks lie across the parts of an array that are asked for: of these arrays one at a time is in memory.
    """
    state = _state(folder, checkpoint.committed(folder)[-1])
    checkpoint.check_sums(state)
    names = {path: f"{PARAMS}.{path}" for path, _ in spec.leaves(model.specs(cfg))}
    names |= {ROUTER_BIAS: ROUTER_BIAS} if cfg.router_rows else {}
    whole = Whole()
    return {path: Stored(_open(state, name), whole) for path, name in names.items()}


class Writer:
    """Writes the one checkpoint of a folder array by array; what an earlier writer has finished stays."""

    def __init__(self, folder: Path, cfg: Model, dtypes: Mapping[str, np.dtype]):
        self._state = _state(folder, STEP)
        if not checkpoint.committed(folder):
            _skeleton(folder, cfg, dtypes)

    def done(self, path: str, shape: tuple[int, ...]) -> bool:
        """Whether an array is there."""
        name = self._name(path)
        return (self._state / name).is_dir() and tuple(_open(self._state, name).shape) == shape

    def write(
        self, path: str, like: Any, chunk: tuple[int, ...], pieces: Iterable[tuple[tuple[slice, ...], np.ndarray]]
    ) -> Iterator[int]:
        """Write an array with the shape and dtype of `like` from its (part, values), a chunk each; yields their bytes.

        The array is complete or absent: it is written beside and renamed.
        """
        final = self._state / self._name(path)
        beside = final.with_name(f"{final.name}.partial")
        shutil.rmtree(beside, ignore_errors=True)
        layout = {"metadata": {"chunks": chunk, "compressor": _COMPRESSOR}}
        made = {"driver": "zarr", "kvstore": _files(beside), **layout}
        store = ts.open(made, create=True, dtype=ts.dtype(like.dtype), shape=like.shape).result()
        for part, values in pieces:
            store[part].write(values).result()
            yield values.nbytes
        shutil.rmtree(final, ignore_errors=True)
        beside.rename(final)
        checkpoint.note_sums(self._state, final)

    def _name(self, path: str) -> str:
        return path if path == ROUTER_BIAS else f"{PARAMS}.{path}"


def _skeleton(folder: Path, cfg: Model, dtypes: Mapping[str, np.dtype]) -> None:
    """A committed checkpoint whose arrays are numbers."""

    def number(keys: tuple, _: Any) -> np.ndarray:
        return np.zeros((), dtypes[spec.path_name(keys)])

    tree = {PARAMS: jax.tree_util.tree_map_with_path(number, model.specs(cfg))}
    tree |= {ROUTER_BIAS: np.zeros((), np.float32)} if cfg.router_rows else {}
    handlers = {"state": ocp.PyTreeCheckpointHandler(use_ocdbt=False), "meta": ocp.JsonCheckpointHandler()}
    absl = logging.getLogger("absl")
    before = absl.level
    absl.setLevel(logging.ERROR)  # it warns that there is no database to merge, which is what we ask for
    try:
        manager = ocp.CheckpointManager((folder / "checkpoints").absolute(), item_handlers=handlers)
        manager.save(STEP, args=ocp.args.Composite(state=ocp.args.PyTreeSave(tree), meta=ocp.args.JsonSave({})))
        manager.close()
    finally:
        absl.setLevel(before)


def _open(state: Path, name: str) -> ts.TensorStore:
    """An array, to be read: in a folder of its own, or in the one database of all that orbax makes while training."""
    kvstore = _files(state / name)
    if not (state / name).is_dir():
        kvstore = {"driver": "ocdbt", "base": f"file://{state}/", "path": f"{name}/"}
    return ts.open({"driver": "zarr", "kvstore": kvstore}, open=True, read=True).result()


def _state(folder: Path, step: int) -> Path:
    return (folder / "checkpoints" / str(step) / "state").absolute()


def _files(folder: Path) -> dict[str, str]:
    return {"driver": "file", "path": f"{folder}/"}


def _chunk(store: ts.TensorStore) -> tuple[int, ...]:
    shape = store.chunk_layout.read_chunk.shape
    return tuple(whole if n is None else n for n, whole in zip(shape or store.shape, store.shape, strict=True))
