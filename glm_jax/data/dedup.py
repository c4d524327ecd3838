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

WORD = re.compile(r"[\u4e00-\u9fff]|\w+|[^\w\s]")  # Chinese characters one by one
_BLOCK = 1 << 16  # hashes that are signed at a time: what a core's cache holds
_HEAD_CHARS = 240  # of a dropped document, to read
_GRAM = 5
_LONG_GRAM = 13  # what two texts share by copying, not by chance
_WHOLE = 100  # 13-grams of a held-out document that is worth looking for inside another
REASONS = ("exact duplicate", "held-out text again", "near duplicate", "overlaps held-out text")
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


def near(sets: list[np.ndarray], threshold: float, bands: int, rows: int) -> dict[int, int]:
    """Index -> smallest index of its cluster, for every set of 5-grams but the clusters' first."""
    filled = [index for index, found in enumerate(sets) if len(found)]
    parent = list(range(len(sets)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = index = parent[parent[index]]
        return index

    signed = signatures([sets[index] for index in filled], bands * rows)
    for a, b in candidates(signed, rows):
        first, second = sorted((root(filled[a]), root(filled[b])))
        if first != second and jaccard(sets[filled[a]], sets[filled[b]]) >= threshold:
            parent[second] = first
    return {index: root(index) for index in range(len(sets)) if root(index) != index}


def overlapping(
    train: Iterable[np.ndarray], held_out: list[np.ndarray], share: float = 0.5
) -> dict[int, tuple[int, float]]:
    """Training document -> (held-out document, share of 13-grams) where at least `share` of either's are the other's."""
    owners = np.repeat(np.arange(len(held_out)), np.array([len(found) for found in held_out], np.int64))
    flat = np.concatenate([np.zeros(0, np.uint64), *held_out])
    order = np.argsort(flat, kind="stable")
    flat, owners = flat[order], owners[order]
    sizes = np.array([len(found) if len(found) >= _WHOLE else np.inf for found in held_out])
    found = {}
    for index, grams_of_it in enumerate(train):
        left, right = np.searchsorted(flat, grams_of_it, "left"), np.searchsorted(flat, grams_of_it, "right")
        hits = right > left
        if not hits.any():
            continue
        owned = np.concatenate([owners[a:b] for a, b in zip(left[hits], right[hits], strict=True)])
        shared = np.bincount(owned, minlength=len(sizes))
        contained = max(hits.mean(), (shared / sizes).max())
        if contained >= share:
            found[index] = (int(shared.argmax()), float(contained))
    return found


def clean(
    train: list[Document], held_out: list[Document], threshold: float, minhash: tuple[int, int] = (14, 8)
) -> tuple[list[Document], list[Document], list[Removal]]:
    """Both without exact duplicates, training also without near duplicates (`minhash`: bands, rows) and without what
    repeats held-out text; and what was removed, with its reason."""
    held_out, removed = exact(held_out)
    taken = {document.id: document for document in held_out}
    removed += [Removal.of(d, "held-out text again", taken[d.id], 1.0) for d in train if d.id in taken]
    train, again = exact(document for document in train if document.id not in taken)
    removed += again
    everything = [*held_out, *train]
    words, sets = Words(), []

    def long_grams(documents: list[Document]) -> Iterator[np.ndarray]:
        """The 5-grams go into `sets` on the way, so that neither all words nor all 13-grams are ever in memory."""
        for document in documents:
            found = words(document.text)
            sets.append(grams(found, _GRAM))
            yield grams(found, _LONG_GRAM)

    of_held_out = list(long_grams(held_out))
    leaks = overlapping(long_grams(train), of_held_out)
    first_of = near(sets, threshold, *minhash)
    kept = []
    for index, document in enumerate(train):
        first = first_of.get(index + len(held_out))
        if index in leaks:
            other, share = leaks[index]
            removed.append(Removal.of(document, "overlaps held-out text", held_out[other], share))
        elif first is not None:
            reason = "overlaps held-out text" if first < len(held_out) else "near duplicate"
            similarity = jaccard(sets[index + len(held_out)], sets[first])
            removed.append(Removal.of(document, reason, everything[first], similarity))
        else:
            kept.append(document)
    return kept, held_out, removed
