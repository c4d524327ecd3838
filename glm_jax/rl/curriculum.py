"""Which problems the model is given: fresh ones of moderate difficulty, then those it almost never solves (spec section 8).

Stage 1 draws fresh tasks; groups in which every answer earns the same are dropped and replaced, so what is trained on is
moderate by construction. Its tasks with pass@k = 0 are remembered. Stage 2 probes them with more attempts, keeps those
with pass@K > 0, and goes on with these alone, K answers to each.
"""

import itertools
from collections.abc import Sequence
from typing import Any

from glm_jax import envs
from glm_jax.envs import split
from glm_jax.envs.task import Task
from glm_jax.rl.advantages import Group

Key = tuple[str, int, int]  # environment, level, seed: what makes a task


class Problems:
    """Endless training tasks, taking turns between environments and their levels. Resumes from `get_state`."""

    def __init__(self, sources: Sequence[tuple[str, int]], first_seed: int = 0, most_unsolved: int = 0):
        self._sources, self._most_unsolved = list(sources), most_unsolved
        self._turn = 0
        self._next_seed = [first_seed] * len(self._sources)
        self.unsolved: list[Key] = []  # pass@k = 0, latest last
        self.pool: list[Key] = []  # of the second stage
        self._pool_turn = 0

    def take(self, count: int) -> list[Task]:
        """The next `count` tasks: from the pool where there is one, else fresh."""
        if self.pool:
            chosen = [self.pool[(self._pool_turn + i) % len(self.pool)] for i in range(count)]
            self._pool_turn = (self._pool_turn + count) % len(self.pool)
            return [_task(key) for key in chosen]
        return [self._fresh() for _ in range(count)]

    def learn(self, groups: Sequence[Group]) -> None:
        """Remember the tasks that no answer solved."""
        if not self.pool and self._most_unsolved:
            self.unsolved += [_key(group[0].task) for group in groups if not any(s.reward for s in group)]
            self.unsolved = self.unsolved[-self._most_unsolved :]

    def get_state(self) -> dict[str, Any]:
        """JSON-ready; `set_state` takes it. A copy, for a checkpoint is written while the run goes on."""
        return {
            "sources": [list(source) for source in self._sources], "turn": self._turn, "next_seed": [*self._next_seed],
            "unsolved": [*self.unsolved], "pool": [*self.pool], "pool_turn": self._pool_turn,
        }  # fmt: skip

    def set_state(self, state: dict[str, Any]) -> None:
        self._sources = [(name, level) for name, level in state["sources"]]
        self._turn, self._next_seed, self._pool_turn = state["turn"], list(state["next_seed"]), state["pool_turn"]
        self.unsolved, self.pool = ([(n, lv, seed) for n, lv, seed in state[which]] for which in ("unsolved", "pool"))

    def _fresh(self) -> Task:
        which = self._turn % len(self._sources)
        name, level = self._sources[which]
        task = next(split.tasks(envs.get(name), level, evaluation=False, first_seed=self._next_seed[which]))
        self._turn, self._next_seed[which] = self._turn + 1, task.seed + 1
        return task


def held_out(name: str, level: int, count: int) -> list[Task]:
    """The first `count` tasks that are kept for evaluation."""
    return list(itertools.islice(split.tasks(envs.get(name), level, evaluation=True), count))


def hard(unsolved: Sequence[Key], solved_in_probe: Sequence[int]) -> list[Key]:
    """Those of the tasks with pass@k = 0 that the probe's further attempts solved at least once."""
    return [key for key, count in zip(unsolved, solved_in_probe, strict=True) if count > 0]


def probes(unsolved: Sequence[Key]) -> list[Task]:
    """The tasks of `unsolved`, made again from their seeds."""
    return [_task(key) for key in unsolved]


def _task(key: Key) -> Task:
    name, level, seed = key
    return envs.get(name).task(seed, level)


def _key(task: Task) -> Key:
    return task.env, task.level, task.seed
