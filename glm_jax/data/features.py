"""Texts as bags of hashed n-grams, made by NumPy for many texts at a time: what classifiers read.

A word is a run of letters in lower case, of digits (each counts as a 0, so that lengths are told apart and values are not),
of blanks (two or more: indentation says something) or of line ends; punctuation and Chinese, Japanese and Korean
characters stand alone. Of a long text the beginning and the middle are read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

_BLOCK_CHARS = 1 << 20  # texts that are hashed at a time
_BLANK, _LINE, _LETTER, _DIGIT, _SIGN = range(5)
_FIRST_CJK = 0x2E80
_LONGEST = 64  # characters of a word after which its hash begins to repeat its factors
_POWERS = np.cumprod(np.full(_LONGEST, 0x9E3779B97F4A7C15, np.uint64), dtype=np.uint64)


def _kinds() -> np.ndarray:
    kinds = np.full(128, _SIGN, np.uint8)
    kinds[[9, 11, 12, 32]] = _BLANK
    kinds[[10, 13]] = _LINE
    kinds[48:58] = _DIGIT
    for letter in range(26):
        kinds[[65 + letter, 97 + letter]] = _LETTER
    return kinds


_KINDS = _kinds()


@dataclass(frozen=True)
class Bags:
    """Sparse rows of unit length: row i has `values[offsets[i]:offsets[i+1]]` in `columns` of the same places."""

    offsets: np.ndarray  # int64
    columns: np.ndarray  # int32, ascending within a row
    values: np.ndarray  # float32: 1 + log count, divided by the row's length

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def rows(self) -> np.ndarray:
        """The row of each value."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def __getitem__(self, chosen: np.ndarray) -> "Bags":
        """The rows of the indices `chosen`, in their order."""
        lengths = np.diff(self.offsets)[chosen]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        places = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1][chosen] - offsets[:-1], lengths)
        return Bags(offsets, self.columns[places], self.values[places])


def of_words(texts: Sequence[str], bits: int, chars: int = 4000) -> Bags:
    """Words and pairs of neighbouring words in 2^bits columns; `chars` of each text are read."""
    return _blockwise(texts, bits, chars, _words)


def of_characters(texts: Sequence[str], bits: int, chars: int = 600) -> Bags:
    """One to four neighbouring letters in 2^bits columns, everything else being one blank: for languages."""
    return _blockwise(texts, bits, chars, _characters)


def _blockwise(
    texts: Sequence[str],
    bits: int,
    chars: int,
    hashed: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
) -> Bags:
    parts, begin = [], 0
    heads = [_head(text, chars) for text in texts]
    while begin < len(heads):
        end, size = begin, 0
        while end < len(heads) and (end == begin or size + len(heads[end]) <= _BLOCK_CHARS):
            size += len(heads[end])
            end += 1
        points = [np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32) for text in heads[begin:end]]
        rows = np.repeat(np.arange(end - begin), [len(found) for found in points])
        hashes, rows = hashed(np.concatenate(points).astype(np.uint64), rows)
        parts.append(_bags(hashes, rows, end - begin, bits))
        begin = end
    if not parts:
        return Bags(np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))
    ends = np.concatenate([[0], np.cumsum([part.offsets[-1] for part in parts])])
    offsets = [part.offsets[:-1] + before for part, before in zip(parts, ends, strict=False)]
    return Bags(
        np.concatenate([*offsets, ends[-1:]]),
        np.concatenate([part.columns for part in parts]),
        np.concatenate([part.values for part in parts]),
    )


def _head(text: str, chars: int) -> str:
    if len(text) <= chars:
        return text
    half, middle = chars // 2, len(text) // 2
    return text[:half] + "\n" + text[middle : middle + half]


def _bags(hashes: np.ndarray, rows: np.ndarray, count: int, bits: int) -> Bags:
    """Rows from one hash a feature: equal ones are counted."""
    keys = (rows.astype(np.uint64) << np.uint64(bits)) | (hashes >> np.uint64(64 - bits))
    keys, counts = np.unique(keys, return_counts=True)
    row = (keys >> np.uint64(bits)).astype(np.int64)
    values = 1 + np.log(counts)
    length = np.sqrt(np.bincount(row, weights=values * values, minlength=count))
    offsets = np.searchsorted(row, np.arange(count + 1)).astype(np.int64)
    columns = (keys & np.uint64((1 << bits) - 1)).astype(np.int32)
    return Bags(offsets, columns, (values / length[row]).astype(np.float32))


def _words(points: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(hash, row) of every word and of every pair of neighbours within a row."""
    kinds = _kinds_of(points)
    points = np.where(kinds == _DIGIT, 48, _lower(points, kinds))
    alone = (kinds == _SIGN) | (points >= _FIRST_CJK)
    begins = alone.copy()
    begins[:1] = True
    begins[1:] |= alone[:-1] | (kinds[1:] != kinds[:-1]) | (rows[1:] != rows[:-1])
    starts = np.flatnonzero(begins)
    lengths = np.diff(np.append(starts, len(points)))
    place = (np.arange(len(points)) - np.repeat(starts, lengths)) % _LONGEST
    words = np.add.reduceat((points + np.uint64(1)) * _POWERS[place], starts) if len(starts) else points
    said = (kinds[starts] != _BLANK) | (lengths > 1)
    words, row = _mix(words[said]), rows[starts[said]]
    pairs = _mix(words[:-1] * np.uint64(3) + words[1:])
    within = row[:-1] == row[1:]
    return np.concatenate([words, pairs[within]]), np.concatenate([row, row[:-1][within]])


def _characters(points: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(hash, row) of one to four neighbouring letters; what is no letter is a blank, and blanks do not follow blanks."""
    kinds = _kinds_of(points)
    points = np.where(kinds == _LETTER, _lower(points, kinds), 32)
    kept = np.ones(len(points), bool)
    kept[1:] = (points[1:] != 32) | (points[:-1] != 32) | (rows[1:] != rows[:-1])
    points, rows = points[kept], rows[kept]
    found = [(_mix(points + np.uint64(1)), rows)]
    together = points.copy()
    for further in range(1, 4):
        together = together[:-1] * np.uint64(0x100000001B3) + points[further:]
        inside = rows[further:] == rows[:-further]
        found.append((_mix(together[inside] + np.uint64(further << 60)), rows[further:][inside]))
    return np.concatenate([hashed for hashed, _ in found]), np.concatenate([row for _, row in found])


def _kinds_of(points: np.ndarray) -> np.ndarray:
    kinds = _KINDS[np.minimum(points, 127).astype(np.int64)]
    kinds[points > 127] = _LETTER
    # punctuation beyond ASCII: Latin-1's signs, general punctuation, CJK's own and full-width forms
    for first, last in ((0x80, 0xBF), (0x2000, 0x2BFF), (0x3000, 0x303F), (0xFF00, 0xFF20)):
        kinds[(points >= first) & (points <= last)] = _SIGN
    return kinds


def _lower(points: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """ASCII, Latin-1, Greek and Cyrillic capitals as small letters."""
    capital = (points >= 65) & (points <= 90) & (kinds == _LETTER)
    capital |= (points >= 0xC0) & (points <= 0xDE) & (points != 0xD7)
    capital |= ((points >= 0x391) & (points <= 0x3A9)) | ((points >= 0x410) & (points <= 0x42F))
    lower = points + np.where(capital, np.uint64(32), np.uint64(0))
    return lower + np.where((points >= 0x400) & (points <= 0x40F), np.uint64(80), np.uint64(0))


def _mix(hashes: np.ndarray) -> np.ndarray:
    """Spread over all 64 bits (two rounds of a multiplicative hash)."""
    hashes = (hashes ^ (hashes >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    return (hashes ^ (hashes >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
