"""Dialogues as rows: rendered, packed best-fit, with the mask of what is trained. The same folder layout as `prepare`'s.

OUT/<stage>/        tokens.npy, offsets.npy, trained.npy, segments.npy, row_starts.npy, stage.json
OUT/dialogues.jsonl what the rows were made from, to be read by people
OUT/tokenizer.json
OUT/manifest.json   counts; written last
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
from glm_jax.data.input import Batch, Piece, assemble
from glm_jax.data.stages import Tokens, id_dtype
from glm_jax.text.chat import Rendered, render_tokens
from glm_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Dialogue:
    """A whole dialogue, ending with the assistant's turn. Messages and tools as in `glm_jax.text.chat`."""

    messages: tuple[dict, ...]
    tools: tuple[dict, ...] | None = None
    enable_thinking: bool = True
    ids: tuple[int, ...] | None = None  # of a sampled dialogue: its own tokens, never rendered again
    trained: tuple[bool, ...] | None = None

    def tokens(self, tokenizer: Tokenizer) -> Rendered:
        """Ids and which of them are trained."""
        if self.ids is not None and self.trained is not None:
            return Rendered(list(self.ids), list(self.trained))
        return render_tokens(
            tokenizer, list(self.messages), self.tools, self.enable_thinking, add_generation_prompt=False
        )

    def record(self) -> dict[str, Any]:
        return {"messages": self.messages, "tools": self.tools, "enable_thinking": self.enable_thinking}


def prepare(out: Path, dialogues: Sequence[Dialogue], tokenizer: Tokenizer, stage: str, seq_len: int) -> dict[str, Any]:
    """Make the data folder of an SFT stage, or leave a finished one alone if it holds the same; returns its facts.

    Dialogues longer than a row are dropped and counted: half an answer teaches to stop in the middle. ConfigError
    where none is left, or where the folder holds other rows.
    """
    rendered = [dialogue.tokens(tokenizer) for dialogue in dialogues]
    kept = [i for i, item in enumerate(rendered) if len(item.ids) <= seq_len and any(item.trained)]
    if not kept:
        raise ConfigError(
            f"none of {len(dialogues)} dialogues fits a row of seq_len={seq_len} with something to train on; "
            "raise sft.seq_len or shorten the dialogues"
        )
    dtype = id_dtype(tokenizer.vocab_size)
    tokens = Tokens.of([np.array(rendered[i].ids, dtype) for i in kept], dtype)
    trained = np.concatenate([np.array(rendered[i].trained, bool) for i in kept])
    plan = packing.best_fit(tokens.lengths, seq_len)
    key = hashlib.sha256(tokens.flat.tobytes() + trained.tobytes() + plan.segments.tobytes()).hexdigest()[:12]
    facts = {
        "name": stage, "seq_len": seq_len, "packing": "best_fit", "key": key, "end": tokenizer.end,
        "vocab_size": tokenizer.vocab_size, "rows": len(plan), "tokens": int(tokens.lengths.sum()),
        "trained_tokens": int(trained.sum()), "dialogues": len(kept), "longer_than_a_row": len(dialogues) - len(kept),
    }  # fmt: skip
    manifest = out / "manifest.json"
    if manifest.is_file():
        found = json.loads(manifest.read_text(encoding="utf-8"))["stages"][0]
        if found != facts:
            raise ConfigError(
                f"{out} holds other dialogues (key {found['key']}, now {key}); use another folder or delete it"
            )
        return facts
    folder = out / stage
    shutil.rmtree(folder, ignore_errors=True)  # left by a killed run
    folder.mkdir(parents=True)
    tokens.save(folder)
    np.save(folder / "trained.npy", trained)
    np.save(folder / "segments.npy", plan.segments)
    np.save(folder / "row_starts.npy", plan.row_starts)
    write(folder / "stage.json", json.dumps(facts, indent=1))
    lines = (json.dumps(dialogues[i].record(), ensure_ascii=False) + "\n" for i in kept)
    write(out / "dialogues.jsonl", "".join(lines))
    tokenizer.save(out / "tokenizer.json")
    write(manifest, json.dumps({"settings": {"V": tokenizer.vocab_size}, "stages": [facts]}, indent=1))
    return facts


def batches(rendered: Sequence[Rendered], seq_len: int, rows: int, end: int) -> list[Batch]:
    """All of `rendered` packed best-fit into batches of `rows` rows, the last one padded: for a validation loss."""
    plan = packing.best_fit(np.array([len(item.ids) for item in rendered]), seq_len)
    arrays = [(np.array(item.ids, np.int32), np.array(item.trained, bool)) for item in rendered]

    def row(index: int) -> Batch:
        segments = plan.row(index) if index < len(plan) else ()
        pieces = [Piece(arrays[i][0], int(length), arrays[i][1]) for i, _, length in segments]
        return assemble(pieces, seq_len, isolate=True, end=end)

    packed = [[row(index) for index in range(first, first + rows)] for first in range(0, len(plan), rows)]
    return [{name: np.stack([one[name] for one in group]) for name in group[0]} for group in packed]
