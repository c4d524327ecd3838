"""The step between all documents and the good ones: duplicates and what repeats held-out text or a benchmark go, the rest is
sorted into quality buckets. What can be asked of each document alone is measured by the engine, in shards (`measure`).
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glm_jax.config import Data
from glm_jax.data import dedup, quality, readers, scoring, semantic
from glm_jax.data.dedup import Removal
from glm_jax.data.document import DataError, Document, digest, write_documents
from glm_jax.data.engine import Engine, Shard
from glm_jax.data.measure import BENCHMARK_GRAM, HELD_OUT_FEWEST, HELD_OUT_GRAM, Known, Measures, measure, work

# (documents, texts that none of them may repeat, hash functions) -> measures
Measure = Callable[[Sequence[Document], Sequence[Known], int], Measures]
REASONS = ("exact duplicate", "held-out text again", "near duplicate", "overlaps held-out text")
_SHARD_BYTES = 4_000_000


def clean(
    train: list[Document], held_out: list[Document], data: Data, measured: Measure = measure
) -> tuple[list[Document], Measures, list[Document], list[Removal]]:
    """(training documents that stay, their measures, held-out ones that stay, what was removed and why).

    Neither has exact duplicates any more. Training has no near duplicates either, nothing that repeats held-out text, and
    nothing that contains a problem of `data.benchmarks`. With `data.keep_duplicates` only held-out text and benchmarks count.
    """
    held_out, removed = dedup.exact(held_out)
    taken = {document.id: document for document in held_out}
    removed += [Removal.of(d, "held-out text again", taken[d.id], 1.0) for d in train if d.id in taken]
    train = sorted((d for d in train if d.id not in taken), key=lambda d: (d.id, d.path))
    if not data.keep_duplicates:
        train, again = dedup.exact(train)
        removed += again
    problems = [problem for path in data.benchmarks for problem in benchmark(Path(path))]
    known = [Known.of((d.text for d in held_out), HELD_OUT_GRAM, HELD_OUT_FEWEST)]
    if problems:
        known.append(Known.of((problem.text for problem in problems), BENCHMARK_GRAM, 1))
    everything, bands_rows = [*held_out, *train], data.minhash
    measures = measured(everything, known, bands_rows[0] * bands_rows[1])
    first_of: dict[int, int] = {}
    if not data.keep_duplicates:
        left = np.all(measures.repeats < 0, axis=1)
        left[: len(held_out)] = True
        among = np.flatnonzero(left).tolist()
        first_of = dedup.near(measures.grams, measures.signature, data.duplicate_jaccard, bands_rows[1], among)
    kept = []
    for index in range(len(held_out), len(everything)):
        document, first = everything[index], first_of.get(index)
        for column, texts in enumerate((held_out, problems)[: len(known)]):
            if measures.repeats[index, column] >= 0:
                other = texts[measures.repeats[index, column]]
                reason = "overlaps held-out text" if column == 0 else f"contains a problem of {other.source}"
                removed.append(Removal.of(document, reason, other, measures.shares[index, column]))
                break
        else:
            if first is None:
                kept.append(index)
                continue
            reason = "overlaps held-out text" if first < len(held_out) else "near duplicate"
            similarity = dedup.jaccard(measures.grams[index], measures.grams[first])
            removed.append(Removal.of(document, reason, everything[first], similarity))
    return [everything[index] for index in kept], measures.of(kept), held_out, removed


def without_templates(
    documents: list[Document], measures: Measures, kept: float
) -> tuple[list[Document], Measures, list[Removal]]:
    """The same without the share 1 - `kept` of the pages (all but code) that say what another page says (SemDedup)."""
    pages = [index for index, document in enumerate(documents) if document.domain != "code"]
    of_pages = measures.of(pages)
    gone = semantic.templated([documents[index] for index in pages], of_pages.words, of_pages.counts, kept)
    places = {pages[place] for place in gone}
    stays = [index for index in range(len(documents)) if index not in places]
    return [documents[index] for index in stays], measures.of(stays), [*gone.values()]


def sorted_out(
    train: list[Document],
    held_out: list[Document],
    data: Data,
    measured: Measure,
    scorers: Path,
    to: Path,
    drops: Counter[str],
) -> tuple[list[Document], list[Document], list[Removal]]:
    """(training documents in their buckets, held-out ones, what was removed); counts in `drops`, writes what scorers tell
    about each document into `to`."""
    train, measures, held_out, removed = clean(train, held_out, data, measured)
    drops.update(dict.fromkeys(REASONS, 0))
    if data.semantic_kept < 1:
        train, measures, alike = without_templates(train, measures, data.semantic_kept)
        removed += alike
    drops.update(removal.reason for removal in removed)
    if data.scoring.by == "classifiers":
        train = scoring.sort(train, measures.signals, scorers, to, data, drops)
    else:
        train = quality.with_buckets(train, measures.signals, len(data.bucket_epochs))
    return train, held_out, removed


def by_engine(engine: Engine, folder: Path, tell: Callable[[int, int], None]) -> Measure:
    """`measure` by an engine, over shards that lie in `folder` until all are done."""

    def measured(documents: Sequence[Document], known: Sequence[Known], hashes: int) -> Measures:
        folder.mkdir(exist_ok=True)
        paths = [folder / f"known-{number}.npz" for number in range(len(known))]
        for path, one in zip(paths, known, strict=True):
            one.save(path)
        of_known = digest("".join(digest(path.read_bytes().hex()) for path in paths))
        shards = []
        for number, members in enumerate(_parts(documents)):
            path = folder / f"documents-{number:05d}.jsonl"
            write_documents(path, members)
            key = digest(json.dumps([of_known, [(d.id, d.domain) for d in members]]))
            size = sum(len(document.text) for document in members)
            shards.append(Shard(f"measures-{number:05d}.npz", (path, *paths), key, size))
        engine.run(work, shards, {"hashes": hashes}, folder / "measured", tell)
        found = Measures.joined([Measures.load(folder / "measured" / shard.name) for shard in shards])
        shutil.rmtree(folder)
        return found

    return measured


def _parts(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """Of about `_SHARD_BYTES` characters, at least one."""
    part, size = [], 0
    for document in documents:
        part.append(document)
        size += len(document.text)
        if size >= _SHARD_BYTES:
            yield part
            part, size = [], 0
    if part or not documents:
        yield part


def benchmark(path: Path) -> Iterable[Document]:
    """The problems of a benchmark's file: every text in its records (JSONL, Parquet, Arrow), or a file of text as a whole.

    DataError where there are none.
    """
    texts = [text for text in readers.strings(path) if len(dedup.WORD.findall(text)) >= BENCHMARK_GRAM]
    if not texts:
        raise DataError(
            f"data.benchmarks: {path} has no text of {BENCHMARK_GRAM} words or more; give a benchmark's file of JSONL, "
            "Parquet, Arrow or plain text"
        )
    name = path.name.split(".")[0]
    fields: dict[str, Any] = {"domain": "general", "source": name, "group": f"benchmark:{name}"}
    return [Document.of(text, path=f"{name}/{number}", **fields) for number, text in enumerate(texts)]
