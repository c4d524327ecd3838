"""What one step of RL is trained on: groups of answers that differ in reward, sampled until there are enough."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from glm_jax.config import GRPO
from glm_jax.data.document import unit
from glm_jax.envs.task import Task
from glm_jax.rl.advantages import Group, varies
from glm_jax.rl.curriculum import Problems
from glm_jax.rl.rollout import Policy, rollout
from glm_jax.rl.sample import Sample
from glm_jax.sample.engine import Sampling

MOST_ROWS = 256  # sampled together


@dataclass
class Collected:
    """Every group that was sampled; those whose rewards vary are trained on."""

    groups: list[Group] = field(default_factory=list)
    rounds: int = 0

    @property
    def kept(self) -> list[Group]:
        return [group for group in self.groups if varies(group)]

    @property
    def samples(self) -> list[Sample]:
        return [sample for group in self.groups for sample in group]

    def told(self) -> dict[str, Any]:
        """For the log: mean reward of all answers, how they ended, how many groups taught something."""
        samples = self.samples
        return {
            "reward": sum(s.reward for s in samples) / len(samples),
            "length": sum(s.drawn for s in samples) / len(samples),  # tokens that the model drew
            "sampled_tokens": sum(s.drawn for s in samples),
            "groups": len(self.groups),
            "groups_varying": len(self.kept),
            "rounds": self.rounds,
            "reasons": dict(Counter(s.reason for s in samples).most_common()),
        }


def collect(policy: Policy, problems: Problems, settings: GRPO, seed: int, group_size: int | None = None) -> Collected:
    """Sample groups until `settings.groups` of them vary, in `settings.rounds` rounds at most; all that vary are kept.

    A round samples `oversample` times what is wanted, always the same number of answers, so that nothing recompiles.
    With a larger `group_size` there are as many fewer groups.
    """
    size = group_size or settings.group_size
    wanted = max(1, settings.groups * settings.group_size // size)
    tasks = max(1, settings.tasks * settings.group_size // size)
    found = Collected()
    while found.rounds < settings.rounds and len(found.kept) < wanted:
        groups = sample_groups(policy, problems.take(tasks), size, settings, seed, first_uid=len(found.groups) * size)
        problems.learn(groups)
        found.groups += groups
        found.rounds += 1
    return found


def share(part: float, *keys: object) -> bool:
    """Whether the item that `keys` name belongs to the `part` of all that a hash chooses: no period that levels could share."""
    return unit("share", *keys) < part


def sample_groups(
    policy: Policy, tasks: Sequence[Task], size: int, settings: GRPO, seed: int, *, first_uid: int = 0
) -> list[Group]:
    """`size` answers to each task, drawn as `settings` says; a task is answered in another mode by another seed."""
    repeated = [task for task in tasks for _ in range(size)]
    modes = [share(settings.thinking_share, seed, task.env, task.level, task.seed) for task in repeated]
    how = Sampling(settings.temperature, max_new_tokens=settings.max_new_tokens, seed=seed)
    samples = sample_all(policy, repeated, how, settings.max_tokens, first_uid, thinking=modes)
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def sample_all(
    policy: Policy,
    tasks: Sequence[Task],
    how: Sampling,
    tokens: int,
    first_uid: int = 0,
    *,
    thinking: bool | Sequence[bool] = True,
) -> list[Sample]:
    """One answer to each of `tasks`, of `tokens` at most with its prompt, `MOST_ROWS` at a time."""
    done: list[Sample] = []
    for first in range(0, len(tasks), MOST_ROWS):
        part = tasks[first : first + MOST_ROWS]
        uids = range(first_uid + first, first_uid + first + len(part))
        modes = thinking if isinstance(thinking, bool) else thinking[first : first + MOST_ROWS]
        done += rollout(policy, part, how, uids, tokens=tokens, thinking=modes)
    return done
