"""Groups of answers as microbatches for `train.step`: packed rows with weight, advantage and old log-probability of
every token."""

from collections.abc import Sequence

import numpy as np

from glm_jax.config import GRPO, ConfigError
from glm_jax.data import packing
from glm_jax.data.input import Batch
from glm_jax.rl.advantages import Group, advantages
from glm_jax.rl.sample import Sample


def microbatches(groups: Sequence[Group], settings: GRPO, end: int) -> list[Batch]:
    """Every answer of `groups` once, packed best-fit into microbatches of `microbatch_rows` x `seq_len`.

    Weights are 1 for each drawn token ("token": the mean is over tokens), or 1 / drawn tokens of its answer
    ("sequence": over answers of each one's mean). ConfigError for an answer longer than a row.
    """
    samples = [sample for group in groups for sample in group]
    worth = np.concatenate([advantages([s.reward for s in group], settings.std_normalize) for group in groups])
    longest = max(len(sample.ids) for sample in samples)
    if longest > settings.seq_len:
        raise ConfigError(
            f"an answer of {longest} tokens, prompt included, does not fit grpo.seq_len={settings.seq_len}; raise it, "
            "or lower grpo.max_new_tokens"
        )
    plan = packing.best_fit(np.array([len(sample.ids) for sample in samples]), settings.seq_len)
    count = -(-len(plan) // settings.microbatch_rows)
    rows = _empty((count * settings.microbatch_rows, settings.seq_len), end)
    for row in range(len(plan)):
        at = 0
        for number, (i, _, _) in enumerate(plan.row(row), start=1):
            at = _fill({name: z[row] for name, z in rows.items()}, at, number, samples[i], float(worth[i]), settings)
    shape = (count, settings.microbatch_rows, settings.seq_len)
    stacked = {name: z.reshape(shape) for name, z in rows.items()}
    return [{name: z[c] for name, z in stacked.items()} for c in range(count)]


def _empty(shape: tuple[int, int], end: int) -> Batch:
    whole = {name: np.zeros(shape, np.int32) for name in ("positions", "segments")}
    tokens = {name: np.full(shape, end, np.int32) for name in ("ids", "targets")}
    return tokens | whole | {name: np.zeros(shape, np.float32) for name in ("weights", "advantages", "old_log_probs")}


def _fill(row: Batch, at: int, number: int, sample: Sample, advantage: float, settings: GRPO) -> int:
    """Write an answer into a row from `at` on, as its segment `number`; returns where the next one begins."""
    length = len(sample.ids)
    here, before_last = slice(at, at + length), slice(at, at + length - 1)
    drawn = np.array(sample.sampled, np.float32)
    row["ids"][here] = sample.ids
    row["targets"][before_last] = sample.ids[1:]
    row["positions"][here] = np.arange(length)
    row["segments"][here] = number
    row["weights"][before_last] = drawn[1:] / (1 if settings.aggregate == "token" else drawn.sum())
    row["advantages"][before_last] = advantage * drawn[1:]
    row["old_log_probs"][before_last] = sample.log_probs[1:]
    return at + length
