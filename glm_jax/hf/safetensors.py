"""The safetensors format, a tensor at a time: reading maps no more than the rows asked for, writing holds one block.

The `safetensors` package reads and writes whole dictionaries (and no FP8 into NumPy); a stacked weight of GLM-4.5 is
larger than most hosts' memory, so the format itself is here: eight bytes of length, a JSON header of dtypes, shapes and
offsets, then the data. Tests read what is written here with that package, and the other way round.
"""

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from glm_jax.config import ConfigError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
LENGTH_BYTES = 8
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota, what a file system or a limit lets a file be


@dataclass(frozen=True)
class Entry:
    """One tensor of a file. Nothing is read until rows are asked for."""

    name: str
    file: Path
    code: str
    shape: tuple[int, ...]
    start: int

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.code]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Columns of the tensor seen as a matrix: its last dim; a vector is one column."""
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def height(self) -> int:
        """Rows of the same matrix."""
        return self.size // max(self.width, 1)

    def rows(self, first: int, last: int) -> np.ndarray:
        """Rows [first, last) of the tensor seen as a matrix, mapped from the file; unmapped when no longer used."""
        if (last - first) * self.width == 0:
            return np.zeros((last - first, self.width), self.dtype)
        at = self.start + first * self.width * self.dtype.itemsize
        return np.memmap(self.file, self.dtype, "r", at, (last - first, self.width))


def entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of the checkpoint in `folder`: of the single file, which goes first as in transformers, or of those
    that its index names."""
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        return {entry.name: entry for entry in header(folder / SINGLE)}
    if not index.is_file():
        raise ConfigError(f"{folder} has neither {INDEX} nor {SINGLE}; give the folder of a Hugging Face checkpoint")
    named = _json(index.read_bytes(), index).get("weight_map")
    if not isinstance(named, dict):
        raise ConfigError(f"{index} has no weight_map that says which file holds each tensor; download it again")
    for name, file in named.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ConfigError(
                f"{index} says that {name} is in {file!r}, where the name of a file beside it is expected"
            )
    absent = sorted({file for file in named.values() if not (folder / file).is_file()})
    if absent:
        raise ConfigError(f"{index} names {len(absent)} files that are not there: {shown(absent)}; download them")
    found = {entry.name: entry for file in sorted(set(named.values())) for entry in header(folder / file)}
    for name, file in named.items():
        if name not in found or found[name].file.name != file:
            raise ConfigError(f"{index} says that {name} is in {file}, but that file does not hold it")
    return found


def header(path: Path) -> Iterator[Entry]:
    """The tensors of one file in the order of their data, after checking that they fill it, without hole or overlap."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(LENGTH_BYTES), "little")
        if LENGTH_BYTES + length > size:
            raise ConfigError(f"{path} is truncated: a header of {length} bytes in a file of {size}; download it again")
        described = _json(f.read(length), path)
    described.pop("__metadata__", None)
    start = end = LENGTH_BYTES + length
    for begin, stop, name, code, shape in sorted(_described(path, *item) for item in described.items()):
        if start + begin != end:
            raise ConfigError(
                f"{path} is damaged: {name} begins at byte {start + begin}, where the one before ends at {end}; download it again"
            )
        end = start + stop
        if end > size:
            raise ConfigError(f"{path} is truncated: {name} ends at byte {end} of {size}; download it again")
        if code in DTYPES and math.prod(shape) * DTYPES[code].itemsize != stop - begin:
            raise ConfigError(f"{path}: {name} is {code} {list(shape)}, but has {stop - begin} bytes")
        yield Entry(name, path, code, shape, start + begin)
    if end != size:
        raise ConfigError(f"{path} is damaged: its tensors end at byte {end} of {size}; download it again")


def _described(path: Path, name: str, one: Any) -> tuple[int, int, str, str, tuple[int, ...]]:
    """(begin, end, name, dtype, shape) of a tensor in a header."""
    match one:
        case {"dtype": str(code), "shape": [*shape], "data_offsets": [begin, end]} if all(
            isinstance(n, int) and n >= 0 for n in (*shape, begin, end)
        ):
            return begin, end, name, code, tuple(shape)
    raise ConfigError(f"{path} is damaged: {name} is described as {one}; download it again")


@contextlib.contextmanager
def write(
    path: Path, tensors: Sequence[tuple[str, np.dtype, tuple[int, ...]]]
) -> Iterator[Callable[[np.ndarray], None]]:
    """A file with these tensors (name, dtype, shape): what it gives takes their entries in order, in pieces of any size.

    The file is complete or absent: it is written beside and renamed.
    """
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        described[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    temporary, size = path.with_name(path.name + ".tmp"), LENGTH_BYTES + len(text) + end
    try:
        with open(temporary, "wb") as f:
            f.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
            yield lambda block: _put(f, block)
            assert f.tell() == size, f"{path}: {size - f.tell()} bytes of its tensors have not been given"
            f.flush()
            os.fsync(f.fileno())
    except OSError as error:
        if error.errno not in FULL:
            raise
        free = shutil.disk_usage(path.parent).free
        told = f"{error.strerror} for its {size} bytes ({free} are free now); make room, or name another disk"
        raise OSError(error.errno, told, str(path)) from None
    temporary.replace(path)


def _put(file: IO[bytes], block: np.ndarray) -> None:
    file.write(np.ascontiguousarray(block).view(np.uint8).data)


def shown(names: Iterable[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _json(text: bytes, path: Path) -> dict[str, Any]:
    try:
        described = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError):
        described = None
    if not isinstance(described, dict):
        raise ConfigError(f"{path} is damaged: no JSON object where its tensors are described; download it again")
    return described
