"""Groups of answers as microbatches for `train.step`: packed rows with weight, advantage and old log-probability of
every token. A prompt stands once in a row, however many answers continue it."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from glm_jax.config import GRPO, ConfigError
from glm_jax.data import packing
from glm_jax.data.input import Batch
from glm_jax.rl.advantages import Group, advantages
from glm_jax.rl.sample import Sample


class Unit(NamedTuple):
    """Answers to one prompt that lie side by side in a row and share its tokens."""

    prompt: list[int]  # without its last token: that one predicts each answer's first, so every answer has its own
    answers: list[tuple[Sample, float]]  # with their advantages

    def tail(self, sample: Sample) -> int:
        return len(sample.ids) - len(self.prompt)

    @property
    def length(self) -> int:
        return len(self.prompt) + sum(self.tail(sample) for sample, _ in self.answers)


def microbatches(groups: Sequence[Group], settings: GRPO, end: int) -> list[Batch]:
    """Every answer of `groups` once, packed best-fit into microbatches of `microbatch_rows` x `seq_len`.

    With `routing_replay` every token has the experts that it took when it was sampled. Weights are 1 for each drawn token
    ("token": the mean is over tokens), or 1 / drawn tokens of its answer ("sequence": over answers of each one's mean).
    ConfigError for an answer longer than a row.
    """
    units = [unit for group in groups for unit in _units(group, settings)]
    plan = packing.best_fit(np.array([unit.length for unit in units]), settings.seq_len)
    count = -(-len(plan) // settings.microbatch_rows)
    rows = _empty((count * settings.microbatch_rows, settings.seq_len), end)
    experts = units[0].answers[0][0].experts
    if settings.routing_replay and experts is not None:
        rows["experts"] = np.full((*rows["ids"].shape, *experts.shape[1:]), -1, np.int16)
    for row in range(len(plan)):
        at, number = 0, 1
        for i, _, _ in plan.row(row):
            at, number = _write({name: z[row] for name, z in rows.items()}, at, number, units[i], settings.aggregate)
    shape = (count, settings.microbatch_rows, settings.seq_len)
    stacked = {name: z.reshape(*shape, *z.shape[2:]) for name, z in rows.items()}
    return [{name: z[c] for name, z in stacked.items()} for c in range(count)]


def _experts(sample: Sample) -> np.ndarray:
    assert sample.experts is not None  # rollout notes them
    return sample.experts


def _units(group: Group, settings: GRPO) -> Iterator[Unit]:
    """The group's answers, as many to a unit as fit a row."""
    longest = max(len(sample.ids) for sample in group)
    if longest > settings.seq_len:
        raise ConfigError(
            f"an answer of {longest} tokens, prompt included, does not fit grpo.seq_len={settings.seq_len}; raise it, "
            "or lower grpo.max_new_tokens"
        )
    worth = advantages([s.reward for s in group], settings.std_normalize)
    answers = [pair for pair in zip(group, worth, strict=True) if pair[0].drawn]  # others count in the mean alone
    first = answers[0][0]
    prompt = first.ids[: first.sampled.index(True) - 1]
    unit = Unit(prompt, [])
    for sample, advantage in answers:
        if unit.answers and unit.length + unit.tail(sample) > settings.seq_len:
            yield unit
            unit = Unit(prompt, [])
        unit.answers.append((sample, float(advantage)))
    yield unit


def _empty(shape: tuple[int, int], end: int) -> Batch:
    whole = {name: np.zeros(shape, np.int32) for name in ("positions", "segments", "prefixes")}
    tokens = {name: np.full(shape, end, np.int32) for name in ("ids", "targets")}
    return tokens | whole | {name: np.zeros(shape, np.float32) for name in ("weights", "advantages", "old_log_probs")}


def _write(row: Batch, at: int, number: int, unit: Unit, aggregate: str) -> tuple[int, int]:
    """Write a unit into a row from token `at` and segment `number` on; returns where the next one begins."""
    begin, prompt = len(unit.prompt), number
    here = slice(at, at + begin)
    row["ids"][here], row["positions"][here] = unit.prompt, np.arange(begin)
    row["segments"][here] = row["prefixes"][here] = prompt
    if "experts" in row:
        row["experts"][here] = _experts(unit.answers[0][0])[:begin]
    at, number = at + begin, number + 1
    for sample, advantage in unit.answers:
        length = unit.tail(sample)
        here, before_last = slice(at, at + length), slice(at, at + length - 1)
        drawn = np.array(sample.sampled[begin + 1 :], np.float32)
        row["ids"][here] = sample.ids[begin:]
        row["targets"][before_last] = sample.ids[begin + 1 :]
        row["positions"][here] = np.arange(begin, begin + length)
        row["segments"][here], row["prefixes"][here] = number, prompt
        row["weights"][before_last] = drawn / (1 if aggregate == "token" else drawn.sum())
        row["advantages"][before_last] = advantage * drawn
        if "experts" in row:
            row["experts"][here] = _experts(sample)[begin:]
        row["old_log_probs"][before_last] = sample.log_probs[begin + 1 :]
        at, number = at + length, number + 1
    return at, number
