"""What cleaning asks of every document, measured once: n-grams, their MinHash, what it repeats, its quality, its words.

A measure of a document needs no other document but those that nobody may train on, so that shards of documents are measured
wherever an engine likes (`work`); what needs all of them (clusters, ranks) is left to `glm_jax.data.cleaning`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glm_jax.data import dedup, quality, semantic
from glm_jax.data.document import Document, read_documents
from glm_jax.data.stages import Tokens

HELD_OUT_GRAM, BENCHMARK_GRAM = 13, 10  # words that two texts share by copying, not by chance
HELD_OUT_FEWEST = 100  # n-grams of a held-out document that is worth looking for inside another
_GRAM = 5
_SHARE = 0.5  # of the n-grams of either text, from which on one repeats the other


@dataclass(frozen=True)
class Known:
    """Texts that training documents must not repeat, as the sorted hashes of all their n-grams."""

    n: int
    flat: np.ndarray  # uint64, sorted
    owners: np.ndarray  # int64: the text of each hash
    sizes: np.ndarray  # float64: n-grams of each text; infinite for those that are too short to be looked for in others

    @classmethod
    def of(cls, texts: Iterable[str], n: int, fewest: int) -> "Known":
        words = dedup.Words()
        sets = [dedup.grams(words(text), n) for text in texts]
        owners = np.repeat(np.arange(len(sets)), np.array([len(found) for found in sets], np.int64))
        flat = np.concatenate([np.zeros(0, np.uint64), *sets])
        order = np.argsort(flat, kind="stable")
        sizes = np.array([len(found) if len(found) >= fewest else np.inf for found in sets])
        return cls(n, flat[order], owners[order], sizes)

    def repeated_by(self, words: np.ndarray) -> tuple[int, float]:
        """(the text that a document of these words repeats, share of n-grams); (-1, 0) where it repeats none."""
        found = dedup.grams(words, self.n)
        left, right = np.searchsorted(self.flat, found, "left"), np.searchsorted(self.flat, found, "right")
        hits = right > left
        if not hits.any():
            return -1, 0.0
        owned = np.concatenate([self.owners[a:b] for a, b in zip(left[hits], right[hits], strict=True)])
        shared = np.bincount(owned, minlength=len(self.sizes))
        share = max(hits.mean(), (shared / self.sizes).max())
        return (int(shared.argmax()), float(share)) if share >= _SHARE else (-1, 0.0)

    def save(self, path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, n=np.array(self.n), flat=self.flat, owners=self.owners, sizes=self.sizes)

    @classmethod
    def load(cls, path: Path) -> "Known":
        with np.load(path, allow_pickle=False) as held:
            return cls(int(held["n"]), held["flat"], held["owners"], held["sizes"])


@dataclass(frozen=True)
class Measures:
    """Of documents in their order; `repeats` and `shares` have a column for each `Known`."""

    grams: Tokens  # distinct hashes of 5-grams, sorted
    signature: np.ndarray  # uint64 [documents, hashes]; 0 for a document without words
    repeats: np.ndarray  # int64
    shares: np.ndarray  # float64
    signals: np.ndarray  # float64: the transparent score of quality
    words: Tokens  # hashes of the distinct words of a page; none of code
    counts: np.ndarray  # float32, of each of these words

    def save(self, path: Path) -> None:
        ragged = {"grams": self.grams, "words": self.words}
        plain = {name: getattr(self, name) for name in ("signature", "repeats", "shares", "signals", "counts")}
        parts = {f"{name}_{part}": getattr(z, part) for name, z in ragged.items() for part in ("flat", "offsets")}
        with path.open("wb") as file:
            np.savez(file, **plain, **parts)

    @classmethod
    def load(cls, path: Path) -> "Measures":
        with np.load(path, allow_pickle=False) as held:
            found = dict(held)
        grams, words = (Tokens(found.pop(f"{name}_flat"), found.pop(f"{name}_offsets")) for name in ("grams", "words"))
        return cls(grams=grams, words=words, **found)

    def of(self, chosen: Sequence[int]) -> "Measures":
        """Of the documents of these places, without what only the search for duplicates reads: n-grams and signatures."""
        counts = Tokens(self.counts, self.words.offsets)
        return Measures(
            grams=self.grams.of_items(()),
            signature=self.signature[:0],
            repeats=self.repeats[chosen],
            shares=self.shares[chosen],
            signals=self.signals[chosen],
            words=self.words.of_items(chosen),
            counts=counts.of_items(chosen).flat,
        )

    @classmethod
    def joined(cls, parts: Sequence["Measures"]) -> "Measures":
        """Of all the documents of `parts`."""
        arrays = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("signature", "repeats", "shares", "signals", "counts")
        }
        return cls(
            grams=Tokens.joined([part.grams for part in parts]),
            words=Tokens.joined([part.words for part in parts]),
            **arrays,
        )


def measure(documents: Sequence[Document], known: Sequence[Known], hashes: int) -> Measures:
    """The measures of `documents`, with `hashes` hash functions for MinHash."""
    words, sets, repeats, pages = dedup.Words(), [], [], []
    for document in documents:
        found = words(document.text)
        sets.append(dedup.grams(found, _GRAM))
        repeats.append([one.repeated_by(found) for one in known])
        empty = (np.zeros(0, np.int32), np.zeros(0, np.float32))
        pages.append(empty if document.domain == "code" else semantic.word_counts(document.text))
    signature = np.zeros((len(documents), hashes), np.uint64)
    filled = [index for index, found in enumerate(sets) if len(found)]
    if filled:
        signature[filled] = dedup.signatures([sets[index] for index in filled], hashes)
    pairs = np.array(repeats, np.float64).reshape(len(documents), len(known), 2)
    return Measures(
        grams=Tokens.of(sets, np.dtype(np.uint64)),
        signature=signature,
        repeats=pairs[:, :, 0].astype(np.int64),
        shares=pairs[:, :, 1],
        signals=np.array([quality.score(document) for document in documents], np.float64),
        words=Tokens.of([found for found, _ in pages], np.dtype(np.int32)),
        counts=np.concatenate([np.zeros(0, np.float32), *(count for _, count in pages)]),
    )


def work(inputs: Sequence[Path], output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """For `glm_jax.data.engine`: the documents of `inputs[0]`, of which none may repeat the texts of the other inputs."""
    documents = read_documents(inputs[0])
    measure(documents, [Known.load(path) for path in inputs[1:]], settings["hashes"]).save(output)
    return {"documents": len(documents)}
