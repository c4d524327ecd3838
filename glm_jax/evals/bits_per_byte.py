"""Held-out bits per byte: what a model pays for a text, in the unit in which compressors are measured too.

The tokens of a text follow `<|endoftext|>`, and each of them is counted once (the end of the text is not). A text is
cut into windows of `seq_len` tokens, each beginning a quarter window before the end of the one before: every token
sees all of its text that precedes it, or at least a quarter of a window. Windows of different texts share rows,
isolated from each other; all batches have one shape.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax import Array

from glm_jax import losses, mesh, model
from glm_jax.config import ConfigError, Model, Run, Stage
from glm_jax.data.document import DOMAINS, Document
from glm_jax.data.heldout import read_held_out
from glm_jax.data.packing import best_fit
from glm_jax.data.prepare import load_tokenizer
from glm_jax.text.tokenizer import Tokenizer
from glm_jax.train.loop import Evaluate

CODE_AND_MATH = "code+math"
_NOT_COUNTED = -1


@dataclass(frozen=True)
class Windows:
    """Texts as batches of one compiled shape. `owner` in a batch is the text that pays for a target, or -1."""

    batches: list[dict[str, np.ndarray]]
    size: np.ndarray  # bytes of UTF-8 of each text


def bits_per_byte(cfg: Model, params: model.GLM, router_bias_LE: Array, windows: Windows) -> float:
    """Bits per byte over all texts of `windows`, with the mesh that is set or none."""
    return float(bits(cfg, params, router_bias_LE, windows).sum() / windows.size.sum())


def bits(cfg: Model, params: model.GLM, router_bias_LE: Array, windows: Windows) -> np.ndarray:
    """Bits that the model needs for each text, float64."""
    total = np.zeros(len(windows.size))
    for batch in windows.batches:
        counted = batch["owner"] != _NOT_COUNTED
        arrays = {**{name: z for name, z in batch.items() if name != "owner"}, "weights": counted.astype(np.float32)}
        nll_BT = np.asarray(negative_log_likelihood(cfg, params, router_bias_LE, mesh.placed(arrays)), np.float64)
        total += np.bincount(batch["owner"][counted], nll_BT[counted], minlength=len(total))
    return total / math.log(2)


def cut(texts: Sequence[str], tokenizer: Tokenizer, seq_len: int, rows: int) -> Windows:
    """Tokenise `texts` and lay their windows out in batches of `rows` rows (a multiple of the devices)."""
    if not texts:
        raise ConfigError("no held-out documents to evaluate on; raise data.held_out or loop.eval_bytes")
    pieces = [
        (owner, *window)
        for owner, ids in enumerate(tokenizer.encode_batch(texts))
        for window in _windows(np.array([tokenizer.end, *ids], np.int32), seq_len)
    ]
    packed = best_fit(np.array([len(tokens) - 1 for _, tokens, _ in pieces]), seq_len)
    batches = []
    for first in range(0, len(packed), rows):
        batch = {name: np.zeros((rows, seq_len), np.int32) for name in ("ids", "targets", "positions", "segments")}
        batch["owner"] = np.full((rows, seq_len), _NOT_COUNTED, np.int32)
        for row in range(min(rows, len(packed) - first)):
            _fill({name: z[row] for name, z in batch.items()}, [pieces[i] for i, _, _ in packed.row(first + row)])
        batches.append(batch)
    return Windows(batches, np.array([len(text.encode()) for text in texts]))


def evaluator(data: Path, run: Run, stage: Stage) -> Evaluate:
    """The evaluation that `train_stage` calls: bits per byte of the domains general, code, math, code+math (by bytes),
    stdlib (held-out modules of the standard library) and long.

    Each domain's held-out documents up to `run.loop.eval_bytes`, the same ones every time; windows as long as the
    stage's rows, for the domain long as the last stage's.
    """
    tokenizer = load_tokenizer(data, run.model.V)
    domains = _domains(data, run.loop.eval_bytes)
    short = list(dict.fromkeys(text for name, texts in domains.items() if name != "long" for text in texts))
    parts = [(short, stage), (domains["long"], run.stages[-1])]
    prepared = [(texts, cut(texts, tokenizer, at.seq_len, batch_rows(run, at))) for texts, at in parts]

    def evaluate(cfg: Model, params: model.GLM, router_bias_LE: Array) -> dict[str, float]:
        short, long = (
            {
                text: (b, size)
                for text, b, size in zip(texts, bits(cfg, params, router_bias_LE, windows), windows.size, strict=True)
            }
            for texts, windows in prepared
        )
        values = {}
        for name, texts in domains.items():
            paid, size = np.sum([(long if name == "long" else short)[text] for text in texts], axis=0)
            values[name] = round(float(paid / size), 5)
        return values

    return evaluate


def batch_rows(run: Run, stage: Stage) -> int:
    """Rows of a batch for evaluation: the stage's microbatch, rounded up to a multiple of the devices."""
    devices = mesh.make(run.mesh).size
    return -(-stage.microbatch_rows // devices) * devices


def stdlib_modules(held_out: Sequence[Document]) -> list[Document]:
    """The held-out modules of the standard library, one document each."""
    return [d for d in held_out if d.stdlib_module and d.domain == "code"]


def _domains(data: Path, max_bytes: int) -> dict[str, list[str]]:
    """Texts of each domain. A domain without any is an error: no table must lose a row in silence."""
    held_out = read_held_out(data)
    documents = {name: [d for d in held_out if d.domain == name] for name in (*DOMAINS, "long")}
    documents["stdlib"] = stdlib_modules(held_out)
    texts = {name: _excerpts([d.text for d in chosen], max_bytes) for name, chosen in documents.items()}
    empty = [name for name, chosen in texts.items() if not chosen]
    if empty:
        raise ConfigError(f"no held-out documents in {', '.join(empty)}; raise data.held_out and make the data again")
    return {**texts, CODE_AND_MATH: texts["code"] + texts["math"]}


def _excerpts(texts: Sequence[str], max_bytes: int) -> list[str]:
    """Beginnings of the texts in the given order, `max_bytes` in all; no text takes more than an eighth of that."""
    chosen, left = [], max_bytes
    for text in texts:
        excerpt = text.encode()[: min(left, max_bytes // 8)].decode(errors="ignore")
        if excerpt:
            chosen.append(excerpt)
            left -= len(excerpt.encode())
    return chosen


def _windows(tokens: np.ndarray, seq_len: int) -> Iterator[tuple[np.ndarray, int]]:
    """(up to seq_len + 1 tokens, how many of its first targets an earlier window has counted)."""
    overlap = seq_len // 4
    for first in range(0, max(1, len(tokens) - 1 - overlap), seq_len - overlap):
        yield tokens[first : first + seq_len + 1], overlap if first else 0


def _fill(row: dict[str, np.ndarray], pieces: Sequence[tuple[int, np.ndarray, int]]) -> None:
    """Write windows one after another into a row; segments number them from 1."""
    at = 0
    for segment, (owner, tokens, known) in enumerate(pieces, start=1):
        to = at + len(tokens) - 1
        row["ids"][at:to], row["targets"][at:to] = tokens[:-1], tokens[1:]
        row["positions"][at:to], row["segments"][at:to] = np.arange(to - at), segment
        row["owner"][at + known : to] = owner
        at = to


@partial(jax.jit, static_argnames="cfg")
def negative_log_likelihood(cfg: Model, params: model.GLM, router_bias_LE: Array, batch: dict[str, Array]) -> Array:
    """Negative log-likelihood in nats of every target, float32 [B, T], whole on every device: each process reads it."""
    aux = model.hidden(
        cfg, params, router_bias_LE, batch["ids"], positions_BT=batch["positions"], segments_BT=batch["segments"],
        prefixes_BT=batch.get("prefixes"),
    )  # fmt: skip
    _, log_prob_BT = losses.next_token(
        aux.hidden_BTD, model.output_matrix(cfg, params), batch["targets"], batch["weights"], cfg.implementation
    )
    return mesh.whole(-log_prob_BT, ())
