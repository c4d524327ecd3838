"""GRPO's advantages: an answer's reward against its group's (spec section 8)."""

from collections.abc import Sequence

import numpy as np

from glm_jax.rl.sample import Sample

Group = list[Sample]  # answers to one task

STD_EPS = 1e-6


def advantages(rewards: Sequence[float], std_normalize: bool = False) -> np.ndarray:
    """Reward minus the group's mean, float32; with `std_normalize` over the group's standard deviation as well."""
    centred = np.asarray(rewards, np.float64) - np.mean(rewards)
    return (centred / (np.std(rewards) + STD_EPS) if std_normalize else centred).astype(np.float32)


def varies(group: Group) -> bool:
    """Whether a group teaches anything: equal rewards have no advantage."""
    return float(np.std([sample.reward for sample in group])) > STD_EPS
