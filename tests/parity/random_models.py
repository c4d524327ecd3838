"""Random configurations, weights and inputs that the parity tests and the makers of golden arrays share.

Everything follows from raw bits of PCG64, whose stream NumPy promises never to change: golden arrays need no weights.
"""

import math
from typing import Any

import jax
import numpy as np

from glm_jax import model
from glm_jax.config import Model

ROWS, LENGTH = 3, 21
RATE = 0.15  # deviation of a weight: large enough for routing, attention and norms all to matter


class Bits:
    """Numbers from a seed and a name."""

    def __init__(self, *seed: int):
        self._source = np.random.PCG64(list(seed))

    def below(self, most: int, least: int = 0) -> int:
        return least + int(self._source.random_raw() % np.uint64(most - least))

    def uniform(self, shape: Any) -> np.ndarray:
        """Mean 0, deviation 1, float32 exactly."""
        raw = self._source.random_raw(math.prod(shape)).reshape(shape)
        return ((raw >> np.uint64(40)).astype(np.float32) / 2**24 - 0.5) * np.float32(math.sqrt(12))


def configuration(seed: int, **changes: Any) -> Model:
    """A small model of odd sizes: with or without QK-norm and biases, 1-3 dense layers, 1-4 KV heads, any E and A."""
    of = Bits(seed, 1).below
    K, experts, dense = of(5, 1), of(14, 5), of(4, 1)
    shape = {
        "V": of(80, 30), "D": of(50, 15), "L": dense + of(4, 1), "dense_layers": dense, "N": K * of(4, 1), "K": K,
        "H": 4 * of(6, 1), "F": of(60, 20), "M": of(30, 7), "E": experts, "A": of(min(experts, 6), 2),
        "shared_experts": of(3, 1), "qk_norm": bool(seed % 2), "qkv_bias": bool(seed // 2 % 2),
        "rope_theta": (1e4, 1e6)[of(2)], "routed_scale": (1.0, 2.5)[of(2)],
    }  # fmt: skip
    return Model(**{**shape, "max_positions": 128, "dtype": "float32", "remat": "none", **changes})


def weights(cfg: Model, seed: int) -> tuple[model.GLM, np.ndarray]:
    """Random norms, biases and selection biases too, so that none of them is where it could be forgotten."""
    bits = Bits(seed, 2)

    def make(declared: Any) -> Any:
        return jax.numpy.asarray(RATE * bits.uniform(declared.shape) + (declared.kind == "norm"))

    return jax.tree.map(make, model.specs(cfg)), 0.2 * bits.uniform((cfg.router_rows, cfg.E))


def batch(cfg: Model, seed: int) -> dict[str, np.ndarray]:
    """ids, positions, segments [ROWS, LENGTH]: a left-padded row, a packed one of three documents, and a whole one."""
    of = Bits(seed, 3).below
    segments = np.ones((ROWS, LENGTH), np.int32)
    segments[0, : of(LENGTH // 2, 1)] = 0
    first, second = of(8, 1), of(16, 9)
    segments[1, first:second], segments[1, second:] = 2, 3
    positions = np.stack([_since_change(row) for row in segments])
    ids = np.array([[of(cfg.V) for _ in range(LENGTH)] for _ in range(ROWS)], np.int32)
    return {"ids": ids, "positions": positions, "segments": segments}


def _since_change(row: np.ndarray) -> np.ndarray:
    begins = np.flatnonzero(np.diff(row, prepend=-1))
    return (np.arange(len(row)) - begins[np.searchsorted(begins, np.arange(len(row)), side="right") - 1]).astype(
        np.int32
    )


def visible(segments: np.ndarray) -> np.ndarray:
    """[B, 1, T, S]: whether a token sees another. Padding sees itself, for a softmax needs something."""
    length = segments.shape[1]
    same = segments[:, :, None] == segments[:, None, :]
    real = (segments > 0)[:, None, :]
    return (same & real & np.tri(length, dtype=bool) | np.eye(length, dtype=bool))[:, None]


def targets(rows: dict[str, np.ndarray], ahead: int) -> tuple[np.ndarray, np.ndarray]:
    """(token `ahead` places on, 1 where it is of the same document) of every place."""
    ids, segments = (np.pad(rows[name], ((0, 0), (0, ahead)))[:, ahead:] for name in ("ids", "segments"))
    return ids, ((segments == rows["segments"]) & (segments > 0)).astype(np.float32)


def training_batch(rows: dict[str, np.ndarray], main: bool, mtp: bool) -> dict[str, np.ndarray]:
    """`rows` as the train step takes them, with the weights of the main loss or of the MTP loss only, or of both."""
    (ids, weight), (ids2, weight2) = targets(rows, 1), targets(rows, 2)
    return {**rows, "targets": ids, "weights": weight * main, "mtp_targets": ids2, "mtp_weights": weight2 * mtp}
