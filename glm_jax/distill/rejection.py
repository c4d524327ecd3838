"""Rejection sampling: which answers of an expert are good enough to teach (report, section 3.1; spec section 7).

The filters stand in the report's order: broken, cut or too short answers and repetition; then the verified answer;
for tools, protocol and terminal state, which the environment's reward contains.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from glm_jax.data.dialogues import Dialogue
from glm_jax.rl.advantages import Group
from glm_jax.rl.collect import share
from glm_jax.rl.rollout import TOO_LONG, well_formed
from glm_jax.rl.sample import Sample

ACCEPTED = "accepted"


@dataclass
class Accepted:
    """What is left of an expert's answers, and what became of the others."""

    samples: list[Sample] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    asked: int = 0  # prompts

    def record(self) -> dict[str, Any]:
        """Counts, JSON-ready."""
        answers = sum(self.reasons.values())
        return {
            "asked": self.asked, "answers": answers, "accepted": len(self.samples),
            "reasons": dict(self.reasons.most_common()),
        }  # fmt: skip


def verdict(sample: Sample, min_tokens: int) -> str:
    """`ACCEPTED`, or the first filter that an answer fails."""
    if sample.reason == TOO_LONG:
        return "cut off"
    if not well_formed(sample):
        return "broken format"
    if sample.drawn < min_tokens:
        return "too short"
    if sample.reward < 1:
        return sample.reason if sample.reason != "solved" else "wrong"
    return ACCEPTED


def filtered(groups: Sequence[Group], keep: int, min_tokens: int) -> Accepted:
    """At most `keep` accepted answers of each group, no two of them alike."""
    found = Accepted(asked=len(groups))
    for group in groups:
        seen: set[tuple[int, ...]] = set()
        for sample in group:
            reason = verdict(sample, min_tokens)
            if reason == ACCEPTED and tuple(sample.ids) in seen:
                reason = "duplicate"
            elif reason == ACCEPTED and len(seen) >= keep:
                reason = "enough of this prompt"
            elif reason == ACCEPTED:
                seen.add(tuple(sample.ids))
                found.samples.append(sample)
            found.reasons[reason] += 1
    return found


def dialogues(samples: Sequence[Sample], direct_share: float) -> Iterator[Dialogue]:
    """Accepted answers as dialogues: as they were sampled, or, for an even share, told again without reasoning."""
    for number, sample in enumerate(samples):
        yield retold(sample) if share(direct_share, number) else as_sampled(sample)


def as_sampled(sample: Sample) -> Dialogue:
    """The answer in its own tokens, its closing role token included."""
    messages = (*sample.task.messages, *sample.turns)
    return Dialogue(messages, sample.task.tools, sample.thinking, tuple(sample.ids), tuple(sample.sampled))


def retold(sample: Sample) -> Dialogue:
    """The same answer in direct mode: without its thoughts."""
    turns = [{k: v for k, v in turn.items() if k != "reasoning_content"} for turn in sample.turns]
    return Dialogue((*sample.task.messages, *turns), sample.task.tools, enable_thinking=False)
