"""One small classifier for every question that is asked of a text: logistic regression on bags of hashed n-grams, trained
in JAX, one weight a column and class.

Training is Adagrad (Duchi et al. 2011) on minibatches in an order that follows from the seed. The same examples give the same
bits on the same machine; scores are NumPy's alone, so reading documents needs no jax.
"""

import functools
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glm_jax.data import features
from glm_jax.data.document import DataError, staged

_FORMAT = 1
_BATCH = 32
_COLUMNS = (
    768  # of a text that one step of training looks at: of more, those with the smallest hash of place and column
)
_ADAGRAD = 1e-6  # sum of squares that a weight begins with
_FEATURES = {"words": features.of_words, "characters": features.of_characters}


@dataclass(frozen=True)
class Classifier:
    """`weights` [2^bits, classes] float16, `bias` [classes] float32; `reads` names the n-grams."""

    classes: tuple[str, ...]
    reads: str
    bits: int
    weights: np.ndarray
    bias: np.ndarray

    def bags(self, texts: Sequence[str]) -> features.Bags:
        return _FEATURES[self.reads](texts, self.bits)

    def scores(self, bags: features.Bags) -> np.ndarray:
        """[texts, classes] float64: log-odds that the text is of the class. A text without n-grams has the bias."""
        from scipy import sparse  # here, because scripts answer --help without it

        shape = (len(bags), 1 << self.bits)
        table = sparse.csr_array((bags.values, bags.columns, bags.offsets), shape=shape)
        return (table @ self.weights.astype(np.float32)).astype(np.float64) + self.bias

    def save(self, path: Path) -> None:
        """One file, the same bytes for the same classifier."""
        about = {"format": _FORMAT, "classes": self.classes, "reads": self.reads, "bits": self.bits}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, about=np.array(json.dumps(about)), weights=self.weights, bias=self.bias)
        with staged(path) as temporary:
            temporary.write_bytes(buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> "Classifier":
        with np.load(path, allow_pickle=False) as held:
            about = json.loads(str(held["about"]))
            if about["format"] != _FORMAT:
                raise DataError(f"{path} has format {about['format']}, this version reads {_FORMAT}; train it again")
            return cls(tuple(about["classes"]), about["reads"], about["bits"], held["weights"], held["bias"])


def train(
    bags: features.Bags, targets: np.ndarray, classes: Sequence[str], *, reads: str, bits: int, epochs: int = 4,
    rate: float = 1.0, seed: int = 0,
) -> Classifier:  # fmt: skip
    """A classifier from examples and `targets` [texts, classes] in [0, 1]: labels, or how much of the class there is.

    Each class is a question of its own (one against the rest). Float32 throughout; ValueError for targets of another
    shape.
    """
    if targets.shape != (len(bags), len(classes)):
        raise ValueError(f"targets {targets.shape} of {len(bags)} texts and {len(classes)} classes")
    random = np.random.Generator(np.random.PCG64(seed))
    order = np.concatenate([random.permutation(len(bags)) for _ in range(epochs)])
    batches = np.resize(order, (-(-len(order) // _BATCH), _BATCH))  # the last is filled up from the first
    weights, bias = _adagrad(*_padded(bags), targets.astype(np.float32), batches, 1 << bits, rate)
    return Classifier(tuple(classes), reads, bits, weights.astype(np.float16), bias)


def _adagrad(columns, values, targets, batches, width: int, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """(weights [width, classes], bias [classes]) after one step a batch."""
    import jax  # here, because everything but training does without
    import jax.numpy as jnp

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        held = (jnp.zeros((width, targets.shape[1])), jnp.zeros(targets.shape[1]))
        squares = jax.tree.map(lambda h: jnp.full_like(h, _ADAGRAD), held)
        for chosen in batches:
            held, squares = _step()(held, squares, columns[chosen], values[chosen], targets[chosen], rate)
    return np.asarray(held[0]), np.asarray(held[1])


@functools.cache
def _step():
    """One step of Adagrad, compiled once for all scorers: their batches have one shape."""
    import jax
    import jax.numpy as jnp

    def loss(held, columns_BK, values_BK, targets_BC):
        weights_FC, bias_C = held
        logits_BC = jnp.einsum("bk,bkc->bc", values_BK, weights_FC[columns_BK]) + bias_C
        return jnp.sum(jnp.logaddexp(0.0, logits_BC) - targets_BC * logits_BC) / len(columns_BK)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(held, squares, columns_BK, values_BK, targets_BC, rate):
        grads = jax.grad(loss)(held, columns_BK, values_BK, targets_BC)
        squares = jax.tree.map(lambda s, g: s + g * g, squares, grads)
        return jax.tree.map(lambda h, g, s: h - rate * g * jax.lax.rsqrt(s), held, grads, squares), squares

    return step


def _padded(bags: features.Bags) -> tuple[np.ndarray, np.ndarray]:
    """[texts, K] columns and values, zeros after a text's last; a text with more than K keeps K of them."""
    lengths = np.diff(bags.offsets)
    rows = bags.rows
    mixed = (bags.columns.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    order = np.lexsort((mixed, rows))
    place = np.arange(len(rows)) - np.repeat(bags.offsets[:-1], lengths)
    kept = place < _COLUMNS
    shape = (len(bags), _COLUMNS)
    columns, values = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    columns[rows[kept], place[kept]] = bags.columns[order][kept]
    values[rows[kept], place[kept]] = bags.values[order][kept]
    return columns, values


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """The chance that a positive example scores above a negative one, ties half (area under the ROC curve)."""
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]
    n = int(positive.sum())
    if n in (0, len(positive)):
        return float("nan")
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(positive) - n)))
