"""Scores: several answers to each held-out task, and what they say: pass@1 with its standard error, avg@n, pass@k.

A score is the JSON-ready dict that `measure` returns. The unit of its statistics is the task: the answers to one task
are averaged first, so that a standard error tells how far other tasks would have moved the figure.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from glm_jax.config import ConfigError
from glm_jax.rl.collect import sample_all
from glm_jax.rl.curriculum import held_out
from glm_jax.rl.rollout import Policy, well_formed
from glm_jax.rl.sample import Sample
from glm_jax.sample.engine import Sampling

Score = dict[str, Any]

THINKING, DIRECT = "thinking", "direct"  # the two modes
FOLDER = "scores"  # in a run's folder: a file for each checkpoint, domain, level and mode


def measure(
    policy: Policy,
    domain: str,
    level: int,
    *,
    tasks: int,
    answers: int,
    how: Sampling,
    tokens: int,
    thinking: bool,
) -> Score:
    """`answers` to each of the first held-out `tasks` of one domain and level, in one mode, drawn as `how` says; one of
    more than `tokens`, with its prompt, ends as too long.

    `tasks` [{seed, kind, rewards}], `reasons` {how an answer ended: count}; shares of all answers: `wellformed`, `thought`
    (with reasoning in it); `length`: mean number of drawn tokens; `samples`: whole dialogues, one that earned 1 and one
    that did not of every kind of task.
    """
    chosen = held_out(domain, level, tasks)
    repeated = [task for task in chosen for _ in range(answers)]
    samples = sample_all(policy, repeated, how, tokens, thinking=thinking)
    groups = [samples[i : i + answers] for i in range(0, len(samples), answers)]
    return {
        "domain": domain,
        "level": level,
        "mode": mode(thinking),
        "answers": answers,
        "temperature": how.temperature,
        "tasks": [
            {"seed": task.seed, "kind": task.kind, "rewards": [sample.reward for sample in group]}
            for task, group in zip(chosen, groups, strict=True)
        ],
        "reasons": dict(Counter(sample.reason for sample in samples).most_common()),
        "wellformed": float(np.mean([well_formed(sample) for sample in samples])),
        "thought": float(np.mean([any(turn.get("reasoning_content") for turn in s.turns) for s in samples])),
        "length": float(np.mean([sample.drawn for sample in samples])),
        "samples": _shown(samples),
    }


def _shown(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """The first answer of every kind of task that earned a reward, and the first that did not."""
    first: dict[tuple[str, bool], Sample] = {}
    for sample in samples:
        first.setdefault((sample.task.kind, sample.reward > 0), sample)
    return [
        {
            "kind": kind,
            "tools": None if sample.task.tools is None else list(sample.task.tools),
            "messages": [*sample.task.messages, *sample.turns],
            "reward": sample.reward,
            "reason": sample.reason,
        }
        for (kind, _), sample in sorted(first.items(), key=lambda item: (item[0][0], not item[0][1]))
    ]


def pass_at_1(score: Score) -> tuple[float, float]:
    """(mean reward, standard error over tasks). With n answers to each task the mean is also called avg@n."""
    return _mean(list(_by_task(score).values()))


def pass_at_k(score: Score, k: int) -> float:
    """The chance that one of k answers earns a reward, unbiased (Chen et al. 2021): 1 - C(n-c, k) / C(n, k), as the
    product 1 - prod over i = n-c+1..n of (1 - k/i), c of a task's n answers being right; mean over tasks."""
    n = score["answers"]
    if not 1 <= k <= n:
        raise ConfigError(f"pass@{k} of {n} answers to a task: k must lie in 1..{n}; raise post.evaluation.answers")
    right = [sum(reward > 0 for reward in task["rewards"]) for task in score["tasks"]]
    return float(np.mean([1 - math.prod(1 - k / i for i in range(n - c + 1, n + 1)) for c in right]))


def difference(after: Score, before: Score) -> tuple[float, float]:
    """(mean of after - before, its standard error), paired by task. ConfigError where the two have other tasks."""
    later, earlier = _by_task(after), _by_task(before)
    if later.keys() != earlier.keys():
        raise ConfigError(
            f"{name(after)} has {len(later)} tasks and {name(before)} {len(earlier)}, {len(later.keys() & earlier.keys())} "
            "of them the same; scores are compared task by task: measure both with the same domain, level and number "
            "of tasks"
        )
    return _mean([later[task] - earlier[task] for task in later])


def mode(thinking: bool) -> str:
    """What the mode is called in scores."""
    return THINKING if thinking else DIRECT


def name(score: Score) -> str:
    """`<checkpoint>.<domain>.<level>.<mode>`: what its file is called."""
    return ".".join(str(score[part]) for part in ("checkpoint", "domain", "level", "mode") if part in score)


def _by_task(score: Score) -> dict[tuple[str, int, int, str], float]:
    """Task -> mean reward of its answers."""
    about = score["domain"], score["level"]
    return {(*about, task["seed"], task["kind"]): float(np.mean(task["rewards"])) for task in score["tasks"]}


def _mean(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        raise ConfigError(f"{len(values)} task has no standard error; give at least 2: raise post.evaluation.tasks")
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))
