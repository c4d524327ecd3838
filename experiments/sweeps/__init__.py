"""Named sweeps: a baseline recipe, what all runs change in it, and grids of what differs between them. Nothing else."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from experiments import recipes
from glm_jax.config import ConfigError, Run, grid, nearest, replace


@dataclass(frozen=True)
class Sweep:
    """Each grid maps dotted fields to values; all its combinations run, with every seed (`loop.seed`)."""

    baseline: str
    grids: tuple[dict[str, tuple], ...]
    common: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    stages: tuple[str, ...] = ("stage1",)

    def __post_init__(self):
        for axes in self.grids:
            if not isinstance(axes, dict) or not all(isinstance(values, tuple) for values in axes.values()):
                raise ConfigError(
                    f'grids={self.grids!r} must be a tuple of dictionaries of tuples: ({{"optim.momentum": (0.9, 0.95)}},)'
                )
        seeds, stages = self.seeds, self.stages
        if not isinstance(seeds, tuple) or not seeds or not all(isinstance(seed, int) for seed in seeds):
            raise ConfigError(f"seeds={seeds!r} must be a tuple of integers: (0, 1, 2)")
        names = tuple(stage.name for stage in recipes.get(self.baseline).stages)
        if not stages or stages != names[: len(stages)]:
            raise ConfigError(f"stages={stages!r} must be the first of {self.baseline}'s, in order: {names}")

    def runs(self) -> Iterator[tuple[dict[str, Any], Run]]:
        """(what this run changes in the baseline, the run) for every point and seed."""
        baseline = replace(recipes.get(self.baseline), **self.common)
        for axes in self.grids:
            yield from grid(baseline, **axes, **{"loop.seed": self.seeds})


def known() -> list[str]:
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem != "__init__")


def get(name: str) -> Sweep:
    """The sweep in experiments/sweeps/<name>.py; a ConfigError offers the nearest name."""
    if name not in known():
        raise ConfigError(f"unknown sweep {name!r}; {nearest(name, known())}")
    sweep = getattr(import_module(f"experiments.sweeps.{name}"), "SWEEP", None)
    if not isinstance(sweep, Sweep):
        raise ConfigError(f"experiments/sweeps/{name}.py has no SWEEP; name it so: SWEEP = Sweep(...)")
    return sweep
