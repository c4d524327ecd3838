"""Exact and near duplicates, and what overlaps the held-out documents.

MinHash over 5-grams of words in bands of rows: a pair of Jaccard similarity s becomes a candidate with probability
1 - (1 - s^rows)^bands, at 0.8 that is 0.92 for 14 x 8 and 0.998 for 20 x 6. Every candidate is verified by its exact
similarity, and the smallest id of a cluster survives, so the answer depends neither on the order of the documents nor
on chance.
"""

import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from glm_jax.data.document import Document
from glm_jax.data.shards import Texts

WORD = re.compile(r"[\u4e00-\u9fff]|\w+|[^\w\s]")  # Chinese characters one by one
_BLOCK = 1 << 16  # hashes that are signed at a time: what a core's cache holds
_HEAD_CHARS = 240  # of a dropped document, to read
_PAIRS_OF_ALL = 40  # a band's cluster up to this size is compared pair by pair, a larger one with its smallest id


@dataclass(frozen=True)
class Removal:
    """Why a document was dropped: `cluster` is the id of its cluster's first, `similarity` the measure that decided."""

    id: str
    path: str
    domain: str
    reason: str
    cluster: str
    similarity: float
    head: str

    @classmethod
    def of(cls, document: Document, reason: str, first: Document, similarity: float) -> "Removal":
        head = document.text[:_HEAD_CHARS]
        return cls(document.id, document.path, document.domain, reason, first.id, round(similarity, 4), head)


class Words:
    """Turns texts into arrays of 32-bit word hashes; remembers the words it has seen."""

    def __init__(self):
        self._seen: dict[str, int] = {}

    def __call__(self, text: str) -> np.ndarray:
        seen = self._seen
        words = WORD.findall(text)
        for word in set(words).difference(seen):
            seen[word] = zlib.crc32(word.encode())
        return np.fromiter(map(seen.__getitem__, words), np.uint64, len(words))


def grams(words: np.ndarray, n: int) -> np.ndarray:
    """Sorted distinct 64-bit hashes of the n-grams of `words`; a shorter text has one, of all it has."""
    n = min(n, len(words))
    if n == 0:
        return np.zeros(0, np.uint64)
    size = len(words) - n + 1
    hashed = np.zeros(size, np.uint64)
    for offset in range(n):
        hashed = _mix(hashed * np.uint64(0x9E3779B97F4A7C15) + words[offset : offset + size])
    return np.unique(hashed)


def _mix(x: np.ndarray) -> np.ndarray:
    x = x ^ (x >> np.uint64(31))
    return x * np.uint64(0xBF58476D1CE4E5B9)


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Exact similarity of two sets given as sorted distinct arrays."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / max(len(a) + len(b) - shared, 1)


def signatures(sets: list[np.ndarray], hashes: int) -> np.ndarray:
    """[documents, hashes] uint64: the smallest hash of each non-empty set under as many hash functions."""
    random = np.random.Generator(np.random.PCG64(5))
    factors = random.integers(0, 2**63, hashes, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    shifts = random.integers(0, 2**63, hashes, dtype=np.uint64)
    lengths = np.array([len(found) for found in sets], np.int64)
    ends = np.cumsum(lengths)
    signed = np.empty((len(sets), hashes), np.uint64)
    begin = 0
    while begin < len(sets):
        before = ends[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, before + _BLOCK, "right")))
        flat, starts = np.concatenate(sets[begin:end]), (ends - lengths)[begin:end] - before
        for number, (factor, shift) in enumerate(zip(factors, shifts, strict=True)):
            signed[begin:end, number] = np.minimum.reduceat(flat * factor + shift, starts)
        begin = end
    return signed


def candidates(signature: np.ndarray, rows: int) -> Iterator[tuple[int, int]]:
    """Pairs (smaller, larger index) that agree in a whole band of `rows` hashes."""
    seen: set[tuple[int, int]] = set()
    for begin in range(0, signature.shape[1], rows):
        buckets: dict[bytes, list[int]] = defaultdict(list)
        for index, key in enumerate(np.ascontiguousarray(signature[:, begin : begin + rows])):
            buckets[key.tobytes()].append(index)
        for members in buckets.values():
            firsts = members if len(members) <= _PAIRS_OF_ALL else members[:1]
            for place, first in enumerate(firsts):
                for second in members[place + 1 :]:
                    if (first, second) not in seen:
                        seen.add((first, second))
                        yield first, second


def exact(documents: Iterable[Document]) -> tuple[list[Document], list[Removal]]:
    """One document for each id, the first by path, in the order of ids; and the others."""
    kept: dict[str, Document] = {}
    removed = []
    for document in documents:
        other = kept.setdefault(document.id, document)
        if other is not document:
            stays, goes = sorted((other, document), key=lambda d: d.path)
            kept[document.id] = stays
            removed.append(Removal.of(goes, "exact duplicate", stays, 1.0))
    return [kept[key] for key in sorted(kept)], removed


def near(
    sets: Texts, signature: np.ndarray, threshold: float, rows: int, among: Iterable[int] | None = None
) -> dict[int, int]:
    """Index -> smallest index of its cluster, for every set of 5-grams but the clusters' first. `rows` hashes of the
    `signature` [sets, hashes] are a band. Only the sets `among` are compared, by default all."""
    filled = [index for index in (range(len(signature)) if among is None else among) if len(sets[index])]
    parent = list(range(len(signature)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = index = parent[parent[index]]
        return index

    for a, b in candidates(signature[filled], rows):
        first, second = sorted((root(filled[a]), root(filled[b])))
        if first != second and jaccard(sets[filled[a]], sets[filled[b]]) >= threshold:
            parent[second] = first
    return {index: root(index) for index in range(len(signature)) if root(index) != index}
