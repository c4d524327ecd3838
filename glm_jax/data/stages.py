"""From documents to the rows of one training stage: which documents, how often, FIM, packing."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glm_jax.config import Data, Stage
from glm_jax.data import code, mixture, packing, shards
from glm_jax.data.document import DIALOGUES, DOMAINS, Document, unit
from glm_jax.text.tokenizer import Tokenizer

_CHUNK_CHARS = 1 << 20  # text given to the tokenizer at a time
_FIM_ROW_SHARE = 0.5  # of a row: the size of the pieces that a long file is cut into for FIM


@dataclass(frozen=True)
class Tokens:
    """Arrays of tokens, or of hashes, end to end: item i is `flat[offsets[i]:offsets[i + 1]]`."""

    flat: np.ndarray  # uint16, or uint32 for more than 65,536 rows of vocabulary
    offsets: np.ndarray  # int64

    @classmethod
    def of(cls, items: Sequence[np.ndarray], dtype: np.dtype) -> "Tokens":
        offsets = np.concatenate([[0], np.cumsum([len(item) for item in items], dtype=np.int64)]).astype(np.int64)
        return cls(np.concatenate(items).astype(dtype) if items else np.zeros(0, dtype), offsets)

    @classmethod
    def joined(cls, parts: Sequence["Tokens"]) -> "Tokens":
        """The items of all `parts`, at least one."""
        ends = np.cumsum([0, *(len(part.flat) for part in parts)])
        offsets = [part.offsets[1:] + end for part, end in zip(parts, ends[:-1], strict=True)]
        return cls(np.concatenate([part.flat for part in parts]), np.concatenate([[0], *offsets]).astype(np.int64))

    def of_items(self, chosen: Sequence[int]) -> "Tokens":
        """The items of these numbers."""
        return Tokens.of([self[index] for index in chosen], self.flat.dtype)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.flat[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def save(self, folder: Path) -> None:
        np.save(folder / "tokens.npy", self.flat)
        np.save(folder / "offsets.npy", self.offsets)

    @classmethod
    def load(cls, folder: Path) -> "Tokens":
        return cls(np.load(folder / "tokens.npy", mmap_mode="r"), np.load(folder / "offsets.npy"))


def id_dtype(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def encode_all(texts: Sequence[str], tokenizer: Tokenizer, progress: Callable[[int, int], None]) -> list[np.ndarray]:
    """Ids of every text, without an end token. `progress` gets characters done and in all."""
    dtype, total = id_dtype(tokenizer.vocab_size), sum(map(len, texts))
    encoded, begin, done = [], 0, 0
    while begin < len(texts):
        end, size = begin, 0
        while end < len(texts) and (end == begin or size + len(texts[end]) <= _CHUNK_CHARS):
            size += len(texts[end])
            end += 1
        encoded += [np.array(ids, dtype) for ids in tokenizer.encode_batch(texts[begin:end])]
        begin, done = end, done + size
        progress(done, total)
    return encoded


def usable(documents: list[Document], data: Data) -> list[Document]:
    """Documents of the buckets that are read at all."""
    return [document for document in documents if data.bucket_epochs[document.bucket] > 0]


@dataclass(frozen=True)
class Prepared:
    """A stage's rows, and what is worth telling about them."""

    tokens: Tokens
    plan: packing.Plan
    facts: dict[str, Any]

    def save(self, folder: Path, shard_tokens: int = 0) -> None:
        """Write them flat, or with `shard_tokens` as shards of about so many tokens."""
        np.save(folder / "row_starts.npy", self.plan.row_starts)
        if not shard_tokens:
            self.tokens.save(folder)
            np.save(folder / "segments.npy", self.plan.segments)
            return
        first = shards.split(self.tokens.lengths, shard_tokens)
        shards.save(folder, self.tokens, first)
        np.save(folder / "first.npy", first)
        np.save(folder / shards.TABLE, shards.table(self.plan.segments, first))


def build(
    stage: Stage,
    data: Data,
    documents: list[Document],
    tokens: Tokens,
    tokenizer: Tokenizer,
    progress: Callable[[int, int], None],
) -> Prepared:
    """Rows of `stage` from training documents and their tokens (each ended), as a pure function of the arguments."""
    if stage.long_documents:
        documents, tokens = _with_repositories(documents, tokens, tokenizer, data)
    pool = mixture.Pool(
        [d.id for d in documents], [d.domain for d in documents], [d.bucket for d in documents], tokens.lengths
    )
    instances = mixture.instances(pool, mixture.epochs(pool, stage, data.bucket_epochs), data.seed, stage.name)
    rewritten = _fill_in_the_middle(stage, data.seed, documents, tokens, instances, tokenizer, progress)
    items: list[np.ndarray] = []
    stored_at: dict[tuple[int, int], int] = {}  # (document, tokens) -> item: passes without FIM share one
    stream: list[int] = []  # items in the order of reading
    for instance, (document, _, count) in enumerate(instances.tolist()):
        new = rewritten.get(instance, [])
        if not new and (document, count) not in stored_at:
            stored_at[document, count] = len(items)
            new = [tokens[document][:count]]
        stream += range(len(items), len(items) + len(new)) if new else [stored_at[document, count]]
        items += new
    stored = Tokens.of(items, id_dtype(tokenizer.vocab_size))
    lengths = stored.lengths[stream]
    if stage.packing == "truncate":
        plan = packing.truncate(lengths, stage.seq_len, rows=-(-stage.tokens // stage.seq_len))
    else:
        plan = packing.best_fit(lengths, stage.seq_len)
    plan.segments[:, 0] = np.array(stream, np.int64)[plan.segments[:, 0]]
    return Prepared(stored, plan, _facts(stage, documents, instances, tokens, plan, len(rewritten)))


def _with_repositories(
    documents: list[Document], tokens: Tokens, tokenizer: Tokenizer, data: Data
) -> tuple[list[Document], Tokens]:
    """Files of a repository become one document in dependency order (or, with `shuffle_files`, in none); the others stay."""
    single = [index for index, document in enumerate(documents) if document.repo is None]
    files: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        if document.repo is not None:
            files[document.repo].append(document)
    repositories, items = [], [tokens[index] for index in single]
    row_of = {document.id: index for index, document in enumerate(documents)}
    for name in sorted(files):
        text_of = {file.path: file for file in files[name]}
        order = sorted(text_of, key=lambda path: unit("file", path)) if data.shuffle_files else None
        arranged = code.arranged({path: file.text for path, file in text_of.items()}, data.cycles, order)
        headers = tokenizer.encode_batch([header for header, _ in arranged])
        parts = [
            part
            for ids, (_, path) in zip(headers, arranged, strict=True)
            for part in (np.array(ids, tokens.flat.dtype), tokens[row_of[text_of[path].id]][:-1])
        ]
        items.append(np.concatenate([*parts, np.array([tokenizer.end], tokens.flat.dtype)]))
        size = sum(file.size for file in files[name])
        repositories.append(
            Document.of(
                "".join(header + text_of[path].text for header, path in arranged),
                domain="code",
                source="repository",
                path=name,
                group=name,
                bucket=round(sum(file.bucket * file.size for file in files[name]) / size),
            )
        )
    return [documents[index] for index in single] + repositories, Tokens.of(items, tokens.flat.dtype)


def _fill_in_the_middle(
    stage: Stage, seed: int, documents: list[Document], tokens: Tokens, instances: np.ndarray, tokenizer: Tokenizer,
    progress: Callable[[int, int], None],
) -> dict[int, list[np.ndarray]]:  # fmt: skip
    """Instance -> its FIM texts, for `fim_rate` of the passes over code, chosen by hash.

    A file longer than a row is first cut at line ends into pieces of half a row, each a FIM text of its own, except
    in a stage of long documents, where it stays whole and plain.
    """
    parts: list[tuple[int, int, str, str]] = []  # instance, piece, special token, text
    lengths = tokens.lengths
    for instance, (index, number, count) in enumerate(instances.tolist()):
        document, length = documents[index], int(lengths[index])
        clipped = count < length
        chosen = unit("fim", seed, stage.name, document.id, number) < stage.fim_rate
        if document.domain != "code" or document.is_patch or clipped or not chosen:
            continue
        found = [document.text]
        if length + 3 > stage.seq_len:
            if stage.long_documents:
                continue
            found = code.pieces(document.text, int(stage.seq_len * _FIM_ROW_SHARE * len(document.text) / length))
        for piece, text in enumerate(found):
            keys = (seed, stage.name, document.id, number, piece)
            parts += [(instance, piece, token, part) for token, part in code.fill_in_the_middle(text, *keys)]
    encoded = encode_all([part[3] for part in parts], tokenizer, progress)
    end = np.array([tokenizer.end], id_dtype(tokenizer.vocab_size))
    rewritten: dict[int, list[np.ndarray]] = defaultdict(list)
    for begin in range(0, len(parts), 3):
        joined = [
            piece
            for (_, _, token, _), ids in zip(parts[begin : begin + 3], encoded[begin : begin + 3], strict=True)
            for piece in (end.dtype.type([tokenizer.id(token)]), ids)
        ]
        rewritten[parts[begin][0]].append(np.concatenate([*joined, end]))
    return rewritten


def _facts(
    stage: Stage, documents: list[Document], instances: np.ndarray, tokens: Tokens, plan: packing.Plan, fim: int
) -> dict[str, Any]:
    size: dict[tuple[str, int], int] = Counter()
    read: dict[tuple[str, int], int] = Counter()
    for document, length in zip(documents, tokens.lengths.tolist(), strict=True):
        size[document.domain, document.bucket] += length
    for index, _, count in instances.tolist():
        read[documents[index].domain, documents[index].bucket] += count
    domains = (*DOMAINS, *(name for name in DIALOGUES if any(d == name for d, _ in size)))
    epochs = {
        name: {str(b): round(read[d, b] / n, 3) for (d, b), n in sorted(size.items()) if d == name} for name in domains
    }
    overlap = packing.LOOKAHEAD * len(plan) if stage.packing == "truncate" else 0
    placed = int(plan.segments[:, 2].sum()) - overlap
    return {
        **{field: getattr(stage, field) for field in ("name", "seq_len", "packing", "long_documents", "fim_rate")},
        "rows": len(plan),
        "tokens": placed,
        "padding": round(1 - placed / max(len(plan) * stage.seq_len, 1), 6),
        "readings_of_documents": len(instances),
        "readings_with_fim": fim,
        "tokens_by_domain": {name: sum(n for (d, _), n in read.items() if d == name) for name in domains},
        "epochs_by_bucket": epochs,
    }


def restated(stage: Stage) -> dict[str, Any]:
    """The fields of a stage that decide its rows."""
    kept = ("name", "tokens", "seq_len", "mixture", "packing", "fim_rate", "long_documents")
    return {name: value for name, value in dataclasses.asdict(stage).items() if name in kept}
