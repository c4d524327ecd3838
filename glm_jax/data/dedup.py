"""Exact and near duplicates, and what overlaps the held-out documents.

MinHash over 5-grams of words in 14 bands of 8 rows (a pair of Jaccard similarity 0.8 becomes a candidate with
probability 0.92); every candidate is verified by its exact similarity, and the smallest id of a cluster survives,
so the answer depends neither on the order of the documents nor on chance.
"""

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

import numpy as np

from glm_jax.data.document import Document

_WORD = re.compile(r"[\u4e00-\u9fff]|\w+|[^\w\s]")  # Chinese characters one by one
_BANDS, _ROWS = 14, 8
_GRAM = 5
_LONG_GRAM = 13  # what two texts share by copying, not by chance
_WHOLE = 100  # 13-grams of a held-out document that is worth looking for inside another
_PAIRS_OF_ALL = 40  # a band's cluster up to this size is compared pair by pair, a larger one with its smallest id


class Words:
    """Turns texts into arrays of 32-bit word hashes; remembers the words it has seen."""

    def __init__(self):
        self._seen: dict[str, int] = {}

    def __call__(self, text: str) -> np.ndarray:
        seen = self._seen
        words = _WORD.findall(text)
        for word in words:
            if word not in seen:
                seen[word] = zlib.crc32(word.encode())
        return np.fromiter((seen[word] for word in words), np.uint64, len(words))


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


def signatures(sets: list[np.ndarray]) -> np.ndarray:
    """[documents, bands * rows] uint64: the smallest hash of each set under as many hash functions."""
    random = np.random.Generator(np.random.PCG64(5))
    factors = random.integers(0, 2**63, _BANDS * _ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    shifts = random.integers(0, 2**63, _BANDS * _ROWS, dtype=np.uint64)
    starts = np.cumsum([0, *map(len, sets)])[:-1]
    flat = np.concatenate(sets)
    return np.stack([np.minimum.reduceat(flat * a + b, starts) for a, b in zip(factors, shifts, strict=True)], axis=1)


def candidates(signature: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs (smaller, larger index) that agree in a whole band."""
    seen: set[tuple[int, int]] = set()
    for band in range(_BANDS):
        rows = signature[:, band * _ROWS : (band + 1) * _ROWS]
        buckets: dict[bytes, list[int]] = defaultdict(list)
        for index, key in enumerate(np.ascontiguousarray(rows)):
            buckets[key.tobytes()].append(index)
        for members in buckets.values():
            firsts = members if len(members) <= _PAIRS_OF_ALL else members[:1]
            for place, first in enumerate(firsts):
                for second in members[place + 1 :]:
                    if (first, second) not in seen:
                        seen.add((first, second))
                        yield first, second


def exact(documents: Iterable[Document], drops: Counter[str]) -> list[Document]:
    """One document for each id, the first by path, in the order of ids."""
    kept: dict[str, Document] = {}
    for document in documents:
        other = kept.get(document.id)
        if other is not None:
            drops["exact duplicate"] += 1
        if other is None or document.path < other.path:
            kept[document.id] = document
    return [kept[key] for key in sorted(kept)]


def near(sets: list[np.ndarray], threshold: float) -> dict[int, int]:
    """Index -> smallest index of its cluster, for every set of 5-grams but the clusters' first."""
    filled = [index for index, found in enumerate(sets) if len(found)]
    parent = list(range(len(sets)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = index = parent[parent[index]]
        return index

    for a, b in candidates(signatures([sets[index] for index in filled])) if filled else ():
        first, second = sorted((root(filled[a]), root(filled[b])))
        if first != second and jaccard(sets[filled[a]], sets[filled[b]]) >= threshold:
            parent[second] = first
    return {index: root(index) for index in range(len(sets)) if root(index) != index}


def overlapping(train: list[np.ndarray], held_out: list[np.ndarray], share: float = 0.5) -> set[int]:
    """Indices of training documents with at least `share` of their 13-grams held out, or of a held-out document's."""
    if not held_out:
        return set()
    owners = np.repeat(np.arange(len(held_out)), [len(found) for found in held_out])
    flat = np.concatenate(held_out)
    order = np.argsort(flat, kind="stable")
    flat, owners = flat[order], owners[order]
    sizes = np.array([len(found) if len(found) >= _WHOLE else np.inf for found in held_out])
    found = set()
    for index, grams_of_it in enumerate(train):
        left, right = np.searchsorted(flat, grams_of_it, "left"), np.searchsorted(flat, grams_of_it, "right")
        hits = right > left
        if not hits.any():
            continue
        owned = np.concatenate([owners[a:b] for a, b in zip(left[hits], right[hits], strict=True)])
        contained = np.bincount(owned, minlength=len(sizes)) / sizes
        if hits.mean() >= share or contained.max() >= share:
            found.add(index)
    return found


def clean(
    train: list[Document], held_out: list[Document], threshold: float, drops: Counter[str]
) -> tuple[list[Document], list[Document]]:
    """Both without exact duplicates, training also without near duplicates and without what repeats held-out text."""
    held_out = exact(held_out, drops)
    taken = {document.id for document in held_out}
    drops["held-out text again"] += sum(document.id in taken for document in train)
    train = exact((document for document in train if document.id not in taken), drops)
    words = Words()
    everything = [words(document.text) for document in [*held_out, *train]]
    long_grams = [grams(found, _LONG_GRAM) for found in everything]
    leaks = overlapping(long_grams[len(held_out) :], long_grams[: len(held_out)])
    first_of = near([grams(found, _GRAM) for found in everything], threshold)
    kept = []
    for index, document in enumerate(train):
        first = first_of.get(index + len(held_out))
        if index in leaks or (first is not None and first < len(held_out)):
            drops["overlaps held-out text"] += 1
        elif first is not None:
            drops["near duplicate"] += 1
        else:
            kept.append(document)
    return kept, held_out
