"""Dialogues as rows: rendered, packed best-fit, with the mask of what is trained. The same folder layout as `prepare`'s.

    OUT/<stage>/        tokens, offsets, trained, shared, segments and row_starts (.npy), stage.json
    OUT/dialogues.jsonl what the rows were made from, to be read by people
    OUT/tokenizer.json  and chat_template.jinja, which goes with it
    OUT/manifest.json   counts

The manifest is written last: a folder without one is made again.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glm_jax.config import ConfigError
from glm_jax.data import packing
from glm_jax.data.document import write
from glm_jax.data.input import Batch, Piece, assemble, row_pieces
from glm_jax.data.shards import Flat
from glm_jax.data.stages import Prepared, Tokens, id_dtype
from glm_jax.text.chat import Rendered, render_tokens
from glm_jax.text.tokenizer import Tokenizer

LEAST_SHARED = 32  # tokens before the first user turn, from which on dialogues share a row's copy of them


@dataclass(frozen=True)
class Dialogue:
    """A whole dialogue, ending with the assistant's turn. Messages and tools as in `glm_jax.text.chat`."""

    messages: tuple[dict, ...]
    tools: tuple[dict, ...] | None = None
    enable_thinking: bool = True
    ids: tuple[int, ...] | None = None  # its tokens where they are known, as a sampled one's: never rendered again
    trained: tuple[bool, ...] | None = None

    def tokens(self, tokenizer: Tokenizer) -> Rendered:
        """Ids and which of them are trained."""
        if self.ids is not None and self.trained is not None:
            return Rendered(list(self.ids), list(self.trained))
        return render_tokens(
            tokenizer, list(self.messages), self.tools, self.enable_thinking, add_generation_prompt=False
        )

    def record(self) -> dict[str, Any]:
        """What people read, JSON-ready."""
        return {"messages": self.messages, "tools": self.tools, "enable_thinking": self.enable_thinking}

    def whole(self) -> dict[str, Any]:
        """All of it, JSON-ready: a sampled dialogue with its own tokens."""
        return self.record() | {"ids": self.ids, "trained": self.trained}

    @classmethod
    def from_whole(cls, whole: dict[str, Any]) -> "Dialogue":
        """The dialogue that `whole` told."""
        tuples = {name: None if whole[name] is None else tuple(whole[name]) for name in ("tools", "ids", "trained")}
        return cls(tuple(whole["messages"]), enable_thinking=whole["enable_thinking"], **tuples)


@dataclass(frozen=True)
class Packed:
    """Dialogues in rows. Those that begin with the same tools share a row's copy of that beginning."""

    tokens: Tokens  # of the shared beginnings, then of what follows in each dialogue
    trained: np.ndarray  # bool, of each token
    plan: packing.Plan
    shared: np.ndarray  # bool, of each segment of the plan

    def row(self, index: int, seq_len: int, end: int) -> Batch:
        """Row `index` as arrays; an empty one beyond the last."""
        empty = Piece(self.tokens.flat[:0], 0, self.trained[:0], False)
        if index >= len(self.plan):
            return assemble([empty], seq_len, isolate=True, end=end)
        tokens, trained = (Flat(flat, self.tokens.offsets) for flat in (self.tokens.flat, self.trained))
        shared = self.shared[self.plan.row_starts[index] : self.plan.row_starts[index + 1]]
        pieces = row_pieces(self.plan.row(index), tokens, trained, shared)
        return assemble(pieces or [empty], seq_len, isolate=True, end=end)


def pack(rendered: Sequence[Rendered], seq_len: int, tokenizer: Tokenizer) -> Packed:
    """Best-fit rows of `seq_len`. Each dialogue fits a row."""
    user, dtype = tokenizer.id("<|user|>"), id_dtype(tokenizer.vocab_size)
    followers: dict[tuple[int, ...], list[int]] = {}
    for i, item in enumerate(rendered):
        begin = item.ids.index(user) if user in item.ids else 0
        followers.setdefault(tuple(item.ids[:begin]) if begin >= LEAST_SHARED else (), []).append(i)
    items = [np.array(prefix, dtype) for prefix in followers]
    trained = [np.zeros(len(prefix), bool) for prefix in followers]
    segments: list[tuple[int, int, int]] = []
    shared, row_starts = [], [0]
    for number, (prefix, members) in enumerate(followers.items()):
        rest = np.array([len(rendered[i].ids) - len(prefix) for i in members])
        plan = packing.best_fit(rest, seq_len - len(prefix))
        for row in range(len(plan)):
            if prefix:
                segments.append((number, 0, len(prefix)))
            chosen = [(len(items) + int(member), 0, int(length)) for member, _, length in plan.row(row)]
            segments += chosen
            shared += [True] * bool(prefix) + [False] * len(chosen)
            row_starts.append(len(segments))
        items += [np.array(rendered[i].ids[len(prefix) :], dtype) for i in members]
        trained += [np.array(rendered[i].trained[len(prefix) :], bool) for i in members]
    plan = packing.Plan(np.array(segments, np.int64).reshape(-1, 3), np.array(row_starts, np.int64))
    return Packed(Tokens.of(items, dtype), np.concatenate(trained), plan, np.array(shared, bool))


def prepare(out: Path, dialogues: Sequence[Dialogue], tokenizer: Tokenizer, stage: str, seq_len: int) -> dict[str, Any]:
    """Make the data folder of an SFT stage, or leave a finished one alone if it holds the same; returns its facts.

    Dialogues longer than a row are dropped and counted, for half an answer teaches to stop in the middle; so are those in which
    nobody says anything to train on. ConfigError where none is left, or where the folder holds other rows.
    """
    rendered = [dialogue.tokens(tokenizer) for dialogue in dialogues]
    short = [i for i, item in enumerate(rendered) if len(item.ids) <= seq_len]
    kept = [i for i in short if any(rendered[i].trained)]
    if not kept:
        raise ConfigError(
            f"none of {len(dialogues)} dialogues fits a row of seq_len={seq_len} with something to train on; "
            "raise sft.seq_len or shorten the dialogues"
        )
    packed = pack([rendered[i] for i in kept], seq_len, tokenizer)
    hashed = (packed.tokens.flat, packed.trained, packed.plan.segments, packed.shared)
    facts = {
        "name": stage, "seq_len": seq_len, "packing": "best_fit", "end": tokenizer.end,
        "key": hashlib.sha256(b"".join(z.tobytes() for z in hashed)).hexdigest()[:12],
        "vocab_size": tokenizer.vocab_size, "rows": len(packed.plan), "tokens": int(packed.plan.segments[:, 2].sum()),
        "trained_tokens": int(packed.trained.sum()), "dialogues": len(kept),
        "dialogue_tokens": sum(len(rendered[i].ids) for i in kept), "longer_than_a_row": len(dialogues) - len(short),
        "nothing_to_train": len(short) - len(kept),
    }  # fmt: skip
    manifest = out / "manifest.json"
    if manifest.is_file():
        found = json.loads(manifest.read_text(encoding="utf-8"))["stages"][0]
        if any(found[name] != facts[name] for name in ("key", "seq_len", "vocab_size")):
            raise ConfigError(
                f"{out} holds other dialogues (key {found['key']}, now {facts['key']}); use another folder or delete it"
            )
        return facts
    folder = out / stage
    shutil.rmtree(folder, ignore_errors=True)  # left by a killed run
    folder.mkdir(parents=True)
    Prepared(packed.tokens, packed.plan, facts).save(folder)
    np.save(folder / "trained.npy", packed.trained)
    np.save(folder / "shared.npy", packed.shared)
    write(folder / "stage.json", json.dumps(facts, indent=1))
    lines = (json.dumps(dialogues[i].record(), ensure_ascii=False) + "\n" for i in kept)
    write(out / "dialogues.jsonl", "".join(lines))
    tokenizer.save(out / "tokenizer.json")
    write(manifest, json.dumps({"settings": {"V": tokenizer.vocab_size}, "stages": [facts]}, indent=1))
    return facts


def batches(rendered: Sequence[Rendered], seq_len: int, rows: int, tokenizer: Tokenizer) -> list[Batch]:
    """All of `rendered` in batches of `rows` rows, the last one padded: for a validation loss."""
    packed = pack(rendered, seq_len, tokenizer)
    groups = [
        [packed.row(index, seq_len, tokenizer.end) for index in range(first, first + rows)]
        for first in range(0, len(packed.plan), rows)
    ]
    return [{name: np.stack([row[name] for row in group]) for name in group[0]} for group in groups]
