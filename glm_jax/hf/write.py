"""Published checkpoints out: `save` writes a folder that transformers and every other tool loads.

Files are written a tensor at a time, weight by weight, so that neither they nor the model need fit the host's memory.
The folder is complete or absent: it is written beside, as NAME.partial, and renamed.
"""

import dataclasses
import itertools
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_jax import model, spec
from glm_jax.config import ConfigError, Model
from glm_jax.hf import config, names
from glm_jax.hf.names import ROUTER_BIAS
from glm_jax.hf.read import copy, dtype_name
from glm_jax.hf.safetensors import INDEX, SINGLE, write
from glm_jax.spec import Spec
from glm_jax.text.chat import STOPS, stop_ids
from glm_jax.text.tokenizer import Tokenizer

BLOCK_BYTES = 2**24  # of an array that are fetched at once
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
COMPANIONS = (  # files of a published folder that go with its weights unchanged
    TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class Source(Protocol):
    """An array, wherever it is: what `Held` makes of one on devices and a checkpoint of one on disk."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, part: tuple[slice, ...]) -> np.ndarray: ...


def save(
    path: Path | str,
    cfg: Model,
    params: model.GLM,
    router_bias_LE: Array,
    *,
    shard_gb: float = 5,
    dtype: Any = None,
    companions: Path | None = None,
) -> None:
    """Write a model as the Hugging Face folder `path`, in files of at most `shard_gb` (1e9 bytes) each.

    dtype: of the parameters; None: as held. The balance bias is written as held (float32, by `model.init`). Tokenizer
    files and token ids are those of the folder `companions`. ConfigError where `path` holds something already, or the
    arrays are not those of `cfg`; whatever stops it leaves no folder behind.
    """
    path = Path(path)
    arrays = {name: Held(w) for name, w in spec.leaves(params)}
    if cfg.router_rows and router_bias_LE is not None:
        arrays[ROUTER_BIAS] = Held(router_bias_LE)
    partial = begin(path)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for _ in export(partial, cfg, arrays, shard_gb=shard_gb, dtype=dtype, companions=companions):
            pass
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def begin(path: Path) -> Path:
    """Where the folder `path` is made before it is renamed; ConfigError where it holds something already."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} exists and is not empty; give another folder, or delete it first")
    return path.absolute().with_name(path.name + ".partial")


def export(
    folder: Path,
    cfg: Model,
    arrays: Mapping[str, Source],
    *,
    shard_gb: float = 5,
    dtype: Any = None,
    companions: Path | None = None,
) -> Iterator[int]:
    """Write all files into `folder`, less the weights' files that are there already. Yields bytes as they are written."""
    if shard_gb <= 0:
        raise ConfigError(f"shard_gb={shard_gb} must be positive")
    if companions is not None:
        check_tokenizer(companions, cfg)
    plans = _plan(cfg, arrays, dtype)
    shards = _shards(plans, shard_gb * 1e9)
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= {plan.name: file for plan in shard}
        if (folder / file).exists():
            yield sum(plan.bytes for plan in shard)
        else:
            yield from _write(folder / file, shard, arrays)
    total = sum(plan.bytes for plan in plans)
    _json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    _describe(folder, cfg, plans, companions)


@dataclass(frozen=True)
class _Planned:
    """A tensor to be written: which one of which array, in which dtype and shape."""

    name: str
    path: str
    number: int  # among the tensors of its array
    declared: Spec
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return names.tensor_shape(self.declared)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def sizes(cfg: Model, arrays: Mapping[str, Source], dtype: Any = None) -> dict[str, int]:
    """Bytes that `export` writes of each array."""
    total: dict[str, int] = {}
    for plan in _plan(cfg, arrays, dtype):
        total[plan.path] = total.get(plan.path, 0) + plan.bytes
    return total


def _plan(cfg: Model, arrays: Mapping[str, Source], dtype: Any) -> list[_Planned]:
    """All tensors in the order of the files: wider dtypes first, so that every tensor is aligned to its entries."""
    chosen = None if dtype is None else np.dtype(jnp.dtype(dtype_name(dtype)))
    declared = names.weights(cfg)
    if declared.keys() != arrays.keys():
        wrong = sorted(declared.keys() ^ arrays.keys())
        raise ConfigError(f"params are not those of cfg: {', '.join(wrong)} in one of them only")
    for path, one in declared.items():
        if tuple(arrays[path].shape) != one.shape:
            raise ConfigError(f"{path} has shape {list(arrays[path].shape)}, but cfg makes it {list(one.shape)}")
    plans = []
    for path, one in declared.items():
        own = chosen if chosen is not None and path != ROUTER_BIAS else _own_dtype(path, arrays[path])
        plans += [_Planned(tensor.name, path, number, one, own) for number, tensor in enumerate(names.tensors(one))]
    shared = {plan.path: plan for plan in plans if not plan.declared.batch}
    plans += [dataclasses.replace(shared[path], name=name) for name, path in names.copies(cfg).items()]
    return sorted(plans, key=lambda plan: -plan.dtype.itemsize)


def _own_dtype(path: str, array: Source) -> np.dtype:
    try:
        return np.dtype(jnp.dtype(dtype_name(array.dtype)))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _shards(plans: Sequence[_Planned], most: float) -> list[list[_Planned]]:
    """Consecutive tensors, as many as fit; a tensor that is larger alone."""
    shards: list[list[_Planned]] = [[]]
    size = 0
    for plan in plans:
        if shards[-1] and size + plan.bytes > most:
            shards.append([])
            size = 0
        shards[-1].append(plan)
        size += plan.bytes
    return shards


def _write(file: Path, shard: Sequence[_Planned], arrays: Mapping[str, Source]) -> Iterator[int]:
    """Write one file; the sizes of its pieces come out as they are written."""
    with write(file, [(plan.name, plan.dtype, plan.shape) for plan in shard]) as put:
        for (path, _), same in itertools.groupby(
            enumerate(shard), lambda item: (item[1].path, item[1].number - item[0])
        ):
            plans = [plan for _, plan in same]
            for piece in _entries(arrays[path], plans):
                put(piece)
                yield piece.nbytes


def _entries(array: Source, plans: Sequence[_Planned]) -> Iterator[np.ndarray]:
    """The entries of neighbouring tensors of one array as they lie in a file, a block at a time."""
    declared, size = plans[0].declared, math.prod(plans[0].shape)
    first, last = plans[0].number * size, (plans[-1].number + 1) * size
    order, begin = names.file_order(declared), 0
    for part in blocks(declared, array.dtype.itemsize):
        end = begin + math.prod(one.stop - one.start for one in part)
        if begin < last and first < end:
            there = np.asarray(array[part]).transpose(order)
            piece = np.empty(there.shape, plans[0].dtype)
            copy(piece, there)
            yield piece.reshape(-1)[max(first - begin, 0) : last - begin]
        begin = end


def blocks(declared: Spec, itemsize: int) -> Iterator[tuple[slice, ...]]:
    """The parts of an array, of `block_shape` each, in the order in which their entries lie in a file."""
    steps = block_shape(declared, itemsize)
    cuts = [
        [slice(i, min(i + n, size)) for i in range(0, size, n)] for n, size in zip(steps, declared.shape, strict=True)
    ]
    order = names.file_order(declared)
    for part in itertools.product(*(cuts[dim] for dim in order)):
        yield tuple(part[order.index(dim)] for dim in range(len(order)))


def block_shape(declared: Spec, itemsize: int) -> tuple[int, ...]:
    """Shape of the largest blocks of at most BLOCK_BYTES that lie in one piece in a file."""
    steps, order = list(declared.shape), names.file_order(declared)
    for place, dim in enumerate(order):
        rest = math.prod(declared.shape[other] for other in order[place + 1 :]) * itemsize
        steps[dim] = max(1, min(declared.shape[dim], BLOCK_BYTES // rest))
        if rest <= BLOCK_BYTES:
            break
    return tuple(steps)


class Held:
    """An array on devices (or in NumPy), read a part at a time."""

    def __init__(self, array: Any):
        self._array = array
        self.shape, self.dtype = tuple(array.shape), np.dtype(array.dtype)

    def __getitem__(self, part: tuple[slice, ...]) -> np.ndarray:
        if not isinstance(self._array, Array):
            return np.asarray(self._array)[part]
        out = np.empty([one.stop - one.start for one in part], self.dtype)
        for shard in self._array.addressable_shards:
            if shard.replica_id == 0:
                _overlap(out, part, shard, self.shape)
        return out


def _overlap(out: np.ndarray, part: tuple[slice, ...], shard: Any, shape: tuple[int, ...]) -> None:
    """Copy into `out`, which is `part` of a whole array of `shape`, what a device holds of it."""
    here, there = [], []
    for wanted, held, size in zip(part, shard.index, shape, strict=True):
        first, last, _ = held.indices(size)
        begin, end = max(first, wanted.start), min(last, wanted.stop)
        if begin >= end:
            return
        here.append(slice(begin - wanted.start, end - wanted.start))
        there.append(slice(begin - first, end - first))
    on_host = (
        jax.default_backend() == "cpu"
    )  # there NumPy sees the device's own memory, elsewhere a cached copy of it all
    data = np.asarray(shard.data)[tuple(there)] if on_host else np.asarray(shard.data[tuple(there)])
    copy(out[tuple(here)], data)


def _describe(folder: Path, cfg: Model, plans: Iterable[_Planned], companions: Path | None) -> None:
    """config.json, generation_config.json, the companions, and the tokenizer's settings where they have none."""
    bytes_of: dict[str, int] = {}
    for plan in plans:
        bytes_of[plan.dtype.name] = bytes_of.get(plan.dtype.name, 0) + plan.bytes
    described = config.written(cfg, dtype_name(max(bytes_of, key=lambda name: bytes_of[name])))
    ids = _token_ids(cfg, companions)
    if companions is not None:
        for name in COMPANIONS:
            if (companions / name).is_file():
                shutil.copyfile(companions / name, folder / name)
    if not (folder / "generation_config.json").exists():
        _json(folder / "generation_config.json", {"_from_model_config": True, **ids})
    if (folder / TOKENIZER).exists() and not (folder / TOKENIZER_CONFIG).exists():
        ends = {"eos_token": STOPS[0], "pad_token": STOPS[0], "model_max_length": cfg.max_positions}
        _json(folder / TOKENIZER_CONFIG, {"tokenizer_class": "PreTrainedTokenizerFast", **ends})
    _json(folder / config.FILE, {**described, **ids})


def check_tokenizer(folder: Path, cfg: Model) -> None:
    """ConfigError where the `tokenizer.json` in `folder` lacks a special token, has more ids than `cfg` has rows, or is
    none; silence where there is no such file."""
    if (folder / TOKENIZER).is_file():
        Tokenizer.load(folder / TOKENIZER, cfg.V)


def _token_ids(cfg: Model, companions: Path | None) -> dict[str, Any]:
    """Token ids of the companions' config.json, or by name from their tokenizer; null where nothing says."""
    ids: dict[str, Any] = dict.fromkeys(TOKEN_IDS)
    if companions is None:
        return ids
    described = companions / config.FILE  # in a data folder of ours, something else
    there = json.loads(described.read_text(encoding="utf-8")) if described.is_file() else {}
    if there.get("model_type") == config.MODEL_TYPE:
        return {name: there.get(name) for name in TOKEN_IDS}
    if (companions / TOKENIZER).is_file():
        tokenizer = Tokenizer.load(companions / TOKENIZER, cfg.V)
        ids |= {"eos_token_id": [*stop_ids(tokenizer)], "pad_token_id": tokenizer.end}
    return ids


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
