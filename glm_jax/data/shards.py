"""Where a stage's token arrays lie, and how a stretch of one is read: flat in one file, or in ArrayRecord shards.

The flat form is read by slices of a memory-mapped file and is what small corpora use. Shards hold one compressed record
for each text, may lie on any file system that grain reads, and keep the row plan at 16 bytes a segment: a table of
(shard, text in the shard, start, length), in `rows.npy`.
"""

from pathlib import Path
from typing import Protocol

import numpy as np

_OPTIONS = "group_size:1,zstd"  # one text a group: what random reading wants
_NAME = "tokens-{:05d}.array_record"
TABLE = "rows.npy"


class Store(Protocol):
    """Reads tokens `start:stop` of text number `item`, fewer where the text ends before."""

    def __call__(self, item: int, start: int, stop: int) -> np.ndarray: ...


class Texts(Protocol):
    """Token arrays by number."""

    def __getitem__(self, index: int) -> np.ndarray: ...


class Flat:
    """Arrays end to end: text i is `flat[offsets[i]:offsets[i + 1]]`. `flat` may be anything that stands by the token."""

    def __init__(self, flat: np.ndarray, offsets: np.ndarray):
        self._flat, self._offsets = flat, offsets

    def __call__(self, item: int, start: int, stop: int) -> np.ndarray:
        begin = self._offsets[item]
        return self._flat[begin + start : min(begin + stop, self._offsets[item + 1])]


class Shards:
    """The ArrayRecord shards of a folder; texts are numbered through all of them."""

    def __init__(self, folder: Path, dtype: np.dtype):
        import grain  # here, because half a second of it would delay every script's --help

        files = sorted(map(str, folder.glob(_NAME.replace("{:05d}", "*"))))
        self._records = grain.sources.ArrayRecordDataSource(files)
        self._dtype = dtype

    def __call__(self, item: int, start: int, stop: int) -> np.ndarray:
        return np.frombuffer(self._records[int(item)], self._dtype)[start:stop]


def split(lengths: np.ndarray, shard_tokens: int) -> np.ndarray:
    """[shards + 1] int64: the texts `first[s]:first[s + 1]` of shard s, `shard_tokens` tokens or one text more."""
    begins = np.cumsum(lengths, dtype=np.int64) - lengths
    shard = begins // shard_tokens
    return np.append(np.unique(shard, return_index=True)[1], len(lengths)).astype(np.int64)


def save(folder: Path, items: Texts, first: np.ndarray) -> None:
    """Write the texts as shards, cut as `split` says."""
    from array_record.python.array_record_module import ArrayRecordWriter

    for shard, (begin, end) in enumerate(zip(first[:-1].tolist(), first[1:].tolist(), strict=True)):
        writer = ArrayRecordWriter(str(folder / _NAME.format(shard)), _OPTIONS)
        for index in range(begin, end):
            writer.write(items[index].tobytes())
        writer.close()


def table(segments: np.ndarray, first: np.ndarray) -> np.ndarray:
    """uint32 [segments, 4] (shard, text in it, start, length) of a plan's int64 [segments, 3] (text, start, length)."""
    shard = np.searchsorted(first, segments[:, 0], "right") - 1
    parts = (shard, segments[:, 0] - first[shard], segments[:, 1], segments[:, 2])
    return np.stack(parts, axis=1).astype(np.uint32)


def numbered(rows: np.ndarray, first: np.ndarray) -> np.ndarray:
    """int64 [n, 3] (text, start, length) of a stretch of a `table`."""
    rows = rows.astype(np.int64)
    return np.stack([first[rows[:, 0]] + rows[:, 1], rows[:, 2], rows[:, 3]], axis=1)
