"""Tasks for training and tasks that are held out, split by a hash of what is asked: no seed can bring one to the other."""

import json
from collections.abc import Iterator

from glm_jax.config import ConfigError
from glm_jax.data.document import digest
from glm_jax.envs.task import Environment, Task

HELD_OUT_SHARE = 0.1
MOST_MISSES = 10_000


def held_out(task: Task) -> bool:
    """Whether a task, as the model reads it, belongs to evaluation."""
    asked = json.dumps([task.env, task.messages[-1]["content"]])
    return int(digest(asked)[:8], 16) < HELD_OUT_SHARE * 2**32


def tasks(env: Environment, level: int, *, evaluation: bool, first_seed: int = 0) -> Iterator[Task]:
    """Endless tasks of one level with rising seeds: the held-out ones for `evaluation`, else only the others.

    ConfigError where `MOST_MISSES` seeds in a row give none: an environment with too few different prompts.
    """
    seed, missed = first_seed, 0
    while missed < MOST_MISSES:
        task = env.task(seed, level)
        missed += 1
        if held_out(task) == evaluation:
            missed = 0
            yield task
        seed += 1
    kind = "held-out" if evaluation else "training"
    raise ConfigError(
        f"environment {env.name}, level {level}: no {kind} task among {MOST_MISSES} seeds from {seed - MOST_MISSES} on; "
        "its prompts must differ more"
    )
