"""Packing as a plan: which stretch of which document stands in which row. Nothing is read or copied here.

`truncate` is GLM-4.5's pre-training: the shuffled documents laid end to end and cut at the row length. `best_fit` is
its mid-training: Best-Fit-Decreasing over unlimited rows (Ding et al. 2024), which cuts only what exceeds a row.
"""

import bisect
from dataclasses import dataclass

import numpy as np

LOOKAHEAD = 2  # tokens after a row's end that its last positions predict: the next one, and the MTP layer's


@dataclass(frozen=True)
class Plan:
    """Row r consists of `segments[row_starts[r]:row_starts[r + 1]]`, each (document, start, length) in tokens."""

    segments: np.ndarray  # int64 [segments, 3]
    row_starts: np.ndarray  # int64 [rows + 1]

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    def row(self, index: int) -> np.ndarray:
        return self.segments[self.row_starts[index] : self.row_starts[index + 1]]


def truncate(lengths: np.ndarray, seq_len: int, rows: int | None = None) -> Plan:
    """Cut the documents, laid end to end, into full rows; each carries `LOOKAHEAD` tokens of the next."""
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = ends - lengths
    total = int(ends[-1]) if len(ends) else 0
    possible = max(total - LOOKAHEAD, 0) // seq_len
    count = possible if rows is None else min(rows, possible)
    row_begin = np.arange(count, dtype=np.int64) * seq_len
    row_end = row_begin + seq_len + LOOKAHEAD
    first = np.searchsorted(ends, row_begin, "right")
    last = np.searchsorted(starts, row_end, "left")  # one past the last document that begins before the end
    row_starts = np.concatenate([[0], np.cumsum(last - first)]).astype(np.int64)
    row = np.repeat(np.arange(count), last - first)
    document = np.arange(row_starts[-1]) - row_starts[row] + first[row]
    begin = np.maximum(row_begin[row], starts[document])
    end = np.minimum(row_end[row], ends[document])
    segments = np.stack([document, begin - starts[document], end - begin], axis=1)
    keep = segments[:, 2] > 0
    kept_before = np.concatenate([[0], np.cumsum(keep)])
    return Plan(segments[keep].astype(np.int64), kept_before[row_starts].astype(np.int64))


def best_fit(lengths: np.ndarray, seq_len: int) -> Plan:
    """Longest piece first, each into the fullest row that still holds it. Documents longer than a row are cut."""
    pieces = [
        (min(seq_len, int(length) - start), document, start)
        for document, length in enumerate(lengths)
        for start in range(0, int(length), seq_len)
    ]
    pieces.sort(key=lambda piece: (-piece[0], piece[1], piece[2]))
    rows: list[list[tuple[int, int, int]]] = []
    open_rows: dict[int, list[int]] = {}  # free tokens -> rows with so many
    free_sizes: list[int] = []  # its keys, sorted
    for length, document, start in pieces:
        place = bisect.bisect_left(free_sizes, length)
        if place == len(free_sizes):
            row, free = len(rows), seq_len
            rows.append([])
        else:
            free = free_sizes[place]
            row = open_rows[free].pop()
            if not open_rows[free]:
                del open_rows[free], free_sizes[place]
        rows[row].append((document, start, length))
        left = free - length
        if left:
            if left not in open_rows:
                open_rows[left] = []
                bisect.insort(free_sizes, left)
            open_rows[left].append(row)
    segments = np.array([piece for row in rows for piece in row], np.int64).reshape(-1, 3)
    return Plan(segments, np.cumsum([0, *map(len, rows)], dtype=np.int64))
