"""Whether files still hold the bytes that were written: a sum of each, noted when they are and compared before they are read."""

import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from glm_jax.config import ConfigError

PIECE = 2**20  # bytes read at once
THREADS = min(16, os.cpu_count() or 1)

Sums = dict[str, list[int]]  # name below a folder -> [bytes, CRC-32]


def sums(folder: Path, paths: Iterable[Path]) -> Sums:
    """Of the files among `paths`, which lie below `folder`."""
    names = sorted(path.relative_to(folder).as_posix() for path in paths if path.is_file())
    return dict(zip(names, _read(folder, names), strict=True))


def check(folder: Path, noted: Mapping[str, Sequence[int]]) -> None:
    """ConfigError that names the first file below `folder` that is missing or other than `noted`. Of several processes each
    reads its share, and all learn what one of them finds."""
    names = sorted(noted)
    mine = range(jax.process_index(), len(names), jax.process_count())
    found = _read(folder, [names[i] for i in mine])
    first = min((i for i, now in zip(mine, found, strict=True) if now != list(noted[names[i]])), default=len(names))
    if jax.process_count() > 1:
        first = int(multihost_utils.process_allgather(np.int32(first)).min())
    if first < len(names):
        path = folder / names[first]
        what = "holds other bytes than were written" if path.exists() else "is missing"
        raise ConfigError(
            f"{path} {what}; copy it again, or delete {folder.parent} to go on from the checkpoint before it"
        )


def _read(folder: Path, names: Sequence[str]) -> list[list[int]]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda name: _sum(folder / name), names))


def _sum(path: Path) -> list[int]:
    """Nothing of a file that is missing."""
    if not path.exists():
        return []
    size = total = 0
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            size, total = size + len(piece), zlib.crc32(piece, total)
    return [size, total]
