"""Learning rate, batch size and loss weights as functions of tokens seen, and the steps that follow from them.

Host side and exact: token counts are Python integers, and a step is a pure function of (run, stage, number), so a
resumed run looks its place up instead of replaying. Formulas: report, section 2.4; spec sections 2, 3, 4.1, 4.4.
"""

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from glm_jax.config import Run, Schedule, Stage


@dataclass(frozen=True)
class Scheduled:
    """What the schedule says of a step, besides its size: read at the number of tokens seen *before* it."""

    lr: float
    mtp_weight: float
    bias_rate: float


@dataclass(frozen=True)
class Step:
    """One optimizer step: its place in the run and in its stage's stream of microbatches, and what is scheduled."""

    index: int  # over all stages, from 0
    tokens_before: int  # since the start of pre-training
    first_microbatch: int  # of this stage's stream
    microbatches: int
    tokens: int
    lr: float
    mtp_weight: float
    bias_rate: float


def scheduled(run: Run, tokens: int) -> Scheduled:
    """The schedule after `tokens` tokens since the start of pre-training."""
    s = run.schedule
    return Scheduled(
        lr=_lr(s, tokens, run.total_tokens),
        mtp_weight=s.mtp_weight_start if tokens < s.mtp_switch_tokens else s.mtp_weight,
        bias_rate=s.bias_rate if tokens < s.bias_freeze_tokens else 0.0,
    )


class Steps(Sequence[Step]):
    """The steps of one stage, computed when asked for: `steps(run, stage)[i]` is the stage's i-th.

    A stage has the whole microbatches that its tokens hold (at least one), and starts where the configuration says
    that the ones before it end; the last step may be smaller. Batch sizes are a handful of constant runs, so that
    the length and any step come from arithmetic: GLM-4.5's 350 thousand cost nothing.
    """

    def __init__(self, run: Run, stage: Stage, first: int):
        self.run, self.stage, self.first = run, stage, first  # first: index over all stages
        self.tokens_before = run.tokens_before(stage.name)
        self.microbatches = max(1, stage.tokens // stage.microbatch_tokens)
        self._runs = list(_constant_runs(run.schedule, stage, self.tokens_before, self.microbatches))

    def __len__(self) -> int:
        step, first, per_step = self._runs[-1]
        return step + -(-(self.microbatches - first) // per_step)

    @overload
    def __getitem__(self, i: int) -> Step: ...

    @overload
    def __getitem__(self, i: slice) -> list[Step]: ...

    def __getitem__(self, i: int | slice) -> Step | list[Step]:
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        i = range(len(self))[i]  # negative from the end; IndexError beyond it
        step, first, per_step = self._runs[bisect.bisect_right(self._runs, i, key=lambda r: r[0]) - 1]
        first += (i - step) * per_step
        count = min(per_step, self.microbatches - first)
        tokens_before = self.tokens_before + first * self.stage.microbatch_tokens
        now = scheduled(self.run, tokens_before)
        return Step(
            self.first + i, tokens_before, first, count, count * self.stage.microbatch_tokens,
            now.lr, now.mtp_weight, now.bias_rate,
        )  # fmt: skip

    def since(self, index: int) -> Iterator[Step]:
        """The steps from the one numbered `index` over all stages: what is left after a resume."""
        return (self[i] for i in range(max(0, index - self.first), len(self)))


def steps(run: Run, stage: Stage | str) -> Steps:
    """The plan of a stage, given by name or as one of `run.stages`; step numbers go on from the earlier stages'."""
    name = run.stage(stage if isinstance(stage, str) else stage.name).name
    first = 0
    for s in run.stages:
        plan = Steps(run, s, first)
        if s.name == name:
            break
        first += len(plan)
    return plan


def _lr(s: Schedule, tokens: int, total: int) -> float:
    """The lower of the warm-up line and the decay. Cosine runs over all tokens of pre- and mid-training."""
    done = min(tokens / total, 1.0)
    wsd = max(0.0, 1 - (1 - done) / s.wsd_decay_fraction)
    fallen = (1 - math.cos(math.pi * done)) / 2 if s.kind == "cosine" else wsd
    decayed = s.peak_lr - (s.peak_lr - s.final_lr) * fallen
    return min(s.peak_lr * tokens / s.warmup_tokens, decayed) if tokens < s.warmup_tokens else decayed


def _microbatches(s: Schedule, stage: Stage, tokens: int) -> int:
    """Microbatches of a step: the batch grows linearly in tokens, rounded down."""
    if tokens >= s.batch_ramp_tokens:
        return s.batch_tokens // stage.microbatch_tokens
    grown = (s.batch_tokens - s.batch_tokens_start) * tokens // s.batch_ramp_tokens
    return (s.batch_tokens_start + grown) // stage.microbatch_tokens


def _constant_runs(s: Schedule, stage: Stage, before: int, microbatches: int) -> Iterator[tuple[int, int, int]]:
    """(first step, first microbatch, microbatches per step) wherever the batch grows; `before` tokens precede the stage."""
    step = first = 0
    unit, growth = stage.microbatch_tokens, s.batch_tokens - s.batch_tokens_start
    while first < microbatches:
        tokens = before + first * unit
        per_step = _microbatches(s, stage, tokens)
        yield step, first, per_step
        if per_step * unit == s.batch_tokens:
            return
        need = (per_step + 1) * unit - s.batch_tokens_start  # growth at which one more microbatch fits
        until = min(-(-need * s.batch_ramp_tokens // growth), s.batch_ramp_tokens)
        count = -(-(until - tokens) // (per_step * unit))
        step, first = step + count, first + count * per_step
