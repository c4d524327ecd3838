"""Microbatches of a prepared stage: a grain dataset over the rows of its plan.

The position is one number, so resuming is exact and instant, and depends neither on hosts nor on workers.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import absl.flags
import grain
import numpy as np

from glm_jax.config import Stage
from glm_jax.data import shards, stages
from glm_jax.data.document import DataError
from glm_jax.data.packing import LOOKAHEAD
from glm_jax.data.shards import Store

Batch = dict[str, np.ndarray]
_PASSES = 2**31  # no end in sight; with grain's own endless repeat the length overflows for one row a batch


class Rows:
    """Rows of a stage by index, as arrays of `seq_len` (see `assemble`). A grain source."""

    def __init__(self, folder: Path, stage: Stage):
        folder = Path(folder) / stage.name
        facts = _facts(folder)
        if facts["seq_len"] != stage.seq_len or facts["packing"] != stage.packing:
            raise DataError(
                f"{folder} was prepared with seq_len={facts['seq_len']} packing={facts['packing']}, the run asks for "
                f"seq_len={stage.seq_len} packing={stage.packing}; prepare the data again into another folder"
            )
        self.facts = facts
        self._stage = stage
        self._row_starts = np.load(folder / "row_starts.npy")
        self._trained = self._shared = self._first = None
        if (folder / shards.TABLE).exists():
            self._segments = np.load(folder / shards.TABLE, mmap_mode="r")
            self._first = np.load(folder / "first.npy")
            self._tokens = shards.Shards(folder, stages.id_dtype(facts["vocab_size"]))
        else:
            self._segments = np.load(folder / "segments.npy", mmap_mode="r")
            offsets = np.load(folder / "offsets.npy")
            self._tokens = shards.Flat(np.load(folder / "tokens.npy", mmap_mode="r"), offsets)
            if (folder / "trained.npy").exists():  # of dialogues: which tokens are the assistant's
                self._trained = shards.Flat(np.load(folder / "trained.npy", mmap_mode="r"), offsets)
            if (folder / "shared.npy").exists():  # segments that the rest of their row continues
                self._shared = np.load(folder / "shared.npy")

    def __len__(self) -> int:
        return len(self._row_starts) - 1

    def __getitem__(self, index: int) -> Batch:
        here = slice(self._row_starts[index], self._row_starts[index + 1])
        segments = self._segments[here]
        if self._first is not None:
            segments = shards.numbered(segments, self._first)
        shared = None if self._shared is None else self._shared[here]
        pieces = row_pieces(segments, self._tokens, self._trained, shared)
        return assemble(pieces, self._stage.seq_len, self._stage.isolate, self.facts["end"])


class Piece(NamedTuple):
    """A stretch of a document: its tokens with up to two beyond, its length without them, which are trained (None: all),
    and whether the pieces behind it continue it, each on its own (None: in no row of the stage)."""

    tokens: np.ndarray
    length: int
    trained: np.ndarray | None = None
    shared: bool | None = None


def row_pieces(
    segments: np.ndarray, tokens: Store, trained: Store | None = None, shared: np.ndarray | None = None
) -> list[Piece]:
    """The pieces of a row's segments [n, 3] (text, start, length); `trained` goes with `tokens`, `shared` with the segments."""
    pieces = []
    for number, (text, start, length) in enumerate(segments.tolist()):
        here = (text, start, start + length + LOOKAHEAD)
        mask = None if trained is None else trained(*here)
        pieces.append(Piece(tokens(*here), length, mask, None if shared is None else bool(shared[number])))
    return pieces


def assemble(pieces: Sequence[Piece], seq_len: int, isolate: bool, end: int) -> Batch:
    """One row of pieces.

    Isolated: positions restart and targets stay inside the document, also beyond the piece. Otherwise the row is one
    text, whose last tokens may reach into pieces beyond `seq_len`. A target that is not trained, like padding, has
    weight 0; padding holds `end` and segment 0. Pieces behind a shared one have its segment as their prefix, and positions
    that go on from its end.
    """
    width = seq_len + LOOKAHEAD
    ids = np.full(width, end, np.int32)
    segments = np.zeros(width, np.int32)
    positions = np.arange(width, dtype=np.int32)
    ahead = {1: np.full(width, end, np.int32), 2: np.full(width, end, np.int32)}
    weight = {1: np.zeros(width, np.float32), 2: np.zeros(width, np.float32)}
    prefixes = np.zeros(width, np.int32)
    at, prefix, before = 0, 0, 0
    for number, (tokens, length, trained, shared) in enumerate(pieces, start=1):
        here = slice(at, at + length)
        ids[here] = tokens[:length]
        segments[here] = number if isolate else 1
        if isolate:
            positions[here] = before + np.arange(length)
            prefixes[here] = prefix or number
            if shared:
                prefix, before = number, length
            for shift in (1, 2):
                known = tokens[shift : length + shift]
                ahead[shift][at : at + len(known)] = known
                weight[shift][at : at + len(known)] = 1 if trained is None else trained[shift : length + shift]
        at += length
    if isolate:
        positions[at:] = 0
    else:
        for shift in (1, 2):
            ahead[shift][:-shift] = ids[shift:]
            weight[shift][:-shift] = segments[shift:]
    row = {
        "ids": ids, "targets": ahead[1], "weights": weight[1], "mtp_targets": ahead[2], "mtp_weights": weight[2],
        "positions": positions, "segments": segments,
    }  # fmt: skip
    if any(piece.shared is not None for piece in pieces):
        row["prefixes"] = prefixes
    return {name: array[:seq_len] for name, array in row.items()}


class Microbatches:
    """Endless microbatches [microbatch_rows, seq_len] of a stage: rows shuffled by `seed`, anew in each pass.

    Of a microbatch, host `index` of `count` (`share`) reads its equal part, and the parts laid one behind the other are
    the same for every count. `workers` processes may read ahead; 0 reads in the calling thread, which for slices of
    local files is fastest. Neither changes what comes nor what a position means.
    """

    def __init__(self, folder: Path, stage: Stage, seed: int = 0, share: tuple[int, int] = (0, 1), workers: int = 0):
        index, count = share
        if stage.microbatch_rows % count:
            raise DataError(
                f"microbatches of {stage.microbatch_rows} rows cannot be shared by {count} hosts; "
                f"set microbatch_rows to a multiple of {count}"
            )
        self.rows = Rows(folder, stage)
        endless = grain.MapDataset.source(self.rows).shuffle(seed=seed).repeat(_PASSES)
        self._batches = endless.batch(stage.microbatch_rows // count)[index::count]
        self._identity = f"{self.rows.facts['key']}/{seed}/{stage.microbatch_rows}"
        self._workers = workers
        self._go_to(0)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self._microbatch += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position, JSON-ready: what `set_state` takes to go on with the microbatch that would come next."""
        return {"microbatch": self._microbatch, "rows": self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position of the same data, seed and microbatch size; DataError for another."""
        if state["rows"] != self._identity:
            raise DataError(
                f"the position is of rows {state['rows']}, these are {self._identity} (data/seed/microbatch_rows); "
                "go on with the data, seed and microbatch size that the checkpoint was made with"
            )
        self.close()
        self._go_to(int(state["microbatch"]))

    def close(self) -> None:
        self._iterator.close()

    def _go_to(self, microbatch: int) -> None:
        self._microbatch = microbatch
        left = self._batches[microbatch:].to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        if self._workers:
            absl.flags.FLAGS.mark_as_parsed()  # grain's workers ask for flags, which a plain script never parses
            left = left.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._workers))
        self._iterator = iter(left)


def _facts(folder: Path) -> dict[str, Any]:
    if not (folder.parent / "manifest.json").is_file():
        raise DataError(
            f"{folder.parent} is no finished data folder; make it with python -m experiments.data --out {folder.parent}"
        )
    if not (folder / "stage.json").is_file():
        known = sorted(path.parent.name for path in folder.parent.glob("*/stage.json"))
        raise DataError(f"{folder.parent} has no stage {folder.name!r}; it has {', '.join(known)}")
    return json.loads((folder / "stage.json").read_text(encoding="utf-8"))
