"""Random configurations, weights and inputs that parity tests and the makers of golden arrays share. NumPy only."""

from typing import Any

import jax
import numpy as np

from glm_jax import model
from glm_jax.config import Model

ROWS, LENGTH = 3, 21


def configuration(seed: int) -> Model:
    """A small model of odd sizes: with or without QK-norm and biases, 1-3 dense layers, 1-4 KV heads, any E and A."""
    random = np.random.default_rng([seed, 1])
    pick = random.integers
    K, experts = int(pick(1, 5)), int(pick(5, 14))
    dense = int(pick(1, 4))
    return Model(
        V=int(pick(30, 80)), D=int(pick(15, 50)), L=dense + int(pick(1, 4)), dense_layers=dense,
        N=K * int(pick(1, 4)), K=K, H=4 * int(pick(1, 6)), F=int(pick(20, 60)), M=int(pick(7, 30)), E=experts,
        A=int(pick(2, min(experts, 6))), shared_experts=int(pick(1, 3)), mtp_layers=1, qk_norm=bool(seed % 2),
        qkv_bias=bool(seed // 2 % 2), rope_fraction=0.5, rope_theta=float(random.choice([1e4, 1e6])), max_positions=128,
        routed_scale=float(random.choice([1.0, 2.5])), norm_eps=1e-5, dtype="float32", remat="none",
    )  # fmt: skip


def weights(cfg: Model, seed: int, dtype: Any = np.float32) -> tuple[model.GLM, np.ndarray]:
    """Random norms, biases and selection biases too, so that none of them is where it could be forgotten."""
    noise = np.random.default_rng([seed, 2])

    def make(spec: Any) -> np.ndarray:
        return (0.15 * noise.normal(size=spec.shape) + (spec.kind == "norm")).astype(dtype)

    params = jax.tree.map(make, model.specs(cfg))
    return params, (0.2 * noise.normal(size=(cfg.router_rows, cfg.E))).astype(np.float32)


def batch(cfg: Model, seed: int) -> dict[str, np.ndarray]:
    """ids, positions, segments [ROWS, LENGTH]: a left-padded row, a packed one of three documents, and a whole one."""
    random = np.random.default_rng([seed, 3])
    segments, positions = np.ones((2, ROWS, LENGTH), np.int32) * np.array([1, 0]).reshape(2, 1, 1)
    padding = int(random.integers(1, LENGTH // 2))
    segments[0, :padding] = 0
    cuts = np.sort(random.choice(np.arange(2, LENGTH - 1), 2, replace=False))
    segments[1] = 1 + np.searchsorted(cuts, np.arange(LENGTH), side="right")
    for row in range(ROWS):
        begins = np.flatnonzero(np.diff(segments[row], prepend=-1))
        since = np.maximum.accumulate(np.where(np.isin(np.arange(LENGTH), begins), np.arange(LENGTH), 0))
        positions[row] = np.arange(LENGTH) - since
    ids = random.integers(0, cfg.V, (ROWS, LENGTH)).astype(np.int32)
    return {"ids": ids, "positions": positions, "segments": segments}


def visible(segments: np.ndarray) -> np.ndarray:
    """[B, 1, T, S]: whether a token sees another; padding sees itself, for a softmax needs something."""
    length = segments.shape[1]
    same = segments[:, :, None] == segments[:, None, :]
    causal = np.tril(np.ones((length, length), bool))
    real = (segments > 0)[:, None, :]
    return (same & causal & real | np.eye(length, dtype=bool))[:, None]


def targets(rows: dict[str, np.ndarray], ahead: int) -> tuple[np.ndarray, np.ndarray]:
    """(token `ahead` places on, whether it is of the same document) of every place."""
    pad = ((0, 0), (0, ahead))
    ids = np.pad(rows["ids"], pad)[:, ahead:]
    segments = np.pad(rows["segments"], pad)[:, ahead:]
    return ids, (segments == rows["segments"]) & (rows["segments"] > 0)
