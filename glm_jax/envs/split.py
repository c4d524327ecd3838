"""Tasks for training and tasks that are held out, split by a hash of what is asked: no seed can bring one to the other."""

import hashlib
import json
import warnings
from collections.abc import Iterator

from glm_jax.config import ConfigError
from glm_jax.envs import guard
from glm_jax.envs.task import Environment, Task

HELD_OUT_SHARE = 0.1
MOST_MISSES = 10_000
MOST_FAILURES = 20
TIME_LIMIT = 30.0  # seconds for making a task; the first one may have to read the environment's data


def held_out(task: Task) -> bool:
    """Whether a task, as the model reads it, belongs to evaluation."""
    asked = json.dumps([task.env, task.messages[-1]["content"]])
    return int(hashlib.sha256(asked.encode()).hexdigest()[:8], 16) < HELD_OUT_SHARE * 2**32


def tasks(env: Environment, level: int, *, evaluation: bool, first_seed: int = 0) -> Iterator[Task]:
    """Endless tasks of one level with rising seeds: the held-out ones for `evaluation`, else only the others.

    A seed whose task raises or hangs is left out, with a warning that names it. ConfigError where `MOST_FAILURES` seeds in a
    row do, or `MOST_MISSES` give no task: an environment with too few different prompts.
    """
    seed, missed, failures = first_seed, 0, 0
    while missed < MOST_MISSES:
        try:
            task = guard.call(env.task, seed, level, seconds=TIME_LIMIT)
        except guard.EnvironmentFailure as failure:
            if isinstance(failure.__cause__, ConfigError):  # the question is wrong, not the environment
                raise failure.__cause__ from None
            failures += 1
            what = f"environment {env.name}, level {level}, seed {seed}: {failure.reason}"
            if failures == MOST_FAILURES:
                raise ConfigError(f"{what}; {failures} seeds in a row gave no task: mend its task()") from failure
            warnings.warn(f"{what}; this task is left out", stacklevel=2)
            seed += 1
            continue
        missed, failures = missed + 1, 0
        if held_out(task) == evaluation:
            missed = 0
            yield task
        seed += 1
    kind = "held-out" if evaluation else "training"
    raise ConfigError(
        f"environment {env.name}, level {level}: no {kind} task among {MOST_MISSES} seeds from {seed - MOST_MISSES} on; "
        "its prompts must differ more"
    )
