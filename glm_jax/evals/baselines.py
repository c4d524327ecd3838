"""What others pay for the texts that the model is measured on: `zlib -9`, and counts of byte quadruples."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax import Array

from glm_jax import model
from glm_jax.config import Run, Stage
from glm_jax.data.document import DOMAINS, read_documents
from glm_jax.data.heldout import read_held_out
from glm_jax.data.prepare import load_tokenizer, zlib_bits_per_byte
from glm_jax.data.stages import usable
from glm_jax.evals import bits_per_byte as bpb

ORDER = 3


def compare(data: Path, run: Run, stage: Stage, params: model.GLM, router_bias_LE: Array) -> dict[str, Any]:
    """`bits_per_byte` {model, zlib, order3} of the held-out modules of the standard library, each whole and alone,
    their number `documents` and size `bytes`.

    The model reads windows as long as the rows of `stage`. zlib knows nothing but the module; the order-3 model has
    counted the documents that the stages are made from.
    """
    modules = bpb.stdlib_modules(read_held_out(data))
    texts = [module.text for module in modules]
    windows = bpb.cut(texts, load_tokenizer(data, run.model.V), stage.seq_len, stage.microbatch_rows)
    training = (d for domain in DOMAINS for d in read_documents(data / "documents" / f"{domain}.jsonl"))
    counts = ByteModel(document.text.encode() for document in usable(list(training), run.data))
    figures = {
        "model": bpb.bits_per_byte(run.model, params, router_bias_LE, windows),
        "zlib": zlib_bits_per_byte(modules),
        "order3": counts.bits_per_byte([text.encode() for text in texts]),
    }
    rounded = {name: round(value, 5) for name, value in figures.items()}
    return {"bits_per_byte": rounded, "documents": len(modules), "bytes": int(windows.size.sum())}


class ByteModel:
    """An order-3 model of bytes: counts over training text, orders 3..0 interpolated as Witten and Bell (1991) do.

    p_k(c | context) = (n(context, c) + t(context) p_{k-1}(c)) / (n(context) + t(context)), with t the number of
    different bytes seen after the context; below order 0 all 256 bytes are alike. A document begins after NULs.
    """

    def __init__(self, documents: Iterable[bytes]):
        grams, counts = np.unique(_grams(documents), return_counts=True)  # sorted, so that a context's lie together
        self._orders = []
        for order in range(ORDER, -1, -1):
            contexts, first = np.unique(grams >> 8, return_index=True)
            totals = np.add.reduceat(counts, first)
            kinds = np.diff(first, append=len(grams))
            self._orders.insert(0, (grams, counts, contexts, totals, kinds))
            if order:
                grams, inverse = np.unique(grams & (256**order - 1), return_inverse=True)
                counts = np.bincount(inverse, counts).astype(np.int64)

    def bits_per_byte(self, documents: Sequence[bytes]) -> float:
        """Mean over all bytes of -log2 p. The end of a document costs nothing."""
        wanted = _grams(documents)
        p = np.full(len(wanted), 1 / 256)
        for order, (grams, counts, contexts, totals, kinds) in enumerate(self._orders):
            gram = wanted & (256 ** (order + 1) - 1)
            n, n_context, t = (
                _look_up(keys, values, key)
                for keys, values, key in (
                    (grams, counts, gram),
                    (contexts, totals, gram >> 8),
                    (contexts, kinds, gram >> 8),
                )
            )
            p = np.where(n_context > 0, (n + t * p) / np.maximum(n_context + t, 1), p)
        return float(-np.log2(p).mean())


def _grams(documents: Iterable[bytes]) -> np.ndarray:
    """Every byte with the three before it as one uint32, the oldest on top."""
    parts = []
    for document in documents:
        text = np.frombuffer(bytes(ORDER) + document, np.uint8).astype(np.uint32)
        size = len(document)
        parts.append(sum(text[i : i + size] << np.uint32(8 * (ORDER - i)) for i in range(ORDER + 1)))
    return np.concatenate(parts)


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value at each wanted key of a sorted table, 0 where it is missing."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
