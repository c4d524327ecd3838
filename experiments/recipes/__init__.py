"""Named runs. A recipe is a function that returns a `Run`; a variant changes fields of another recipe's."""

from collections.abc import Callable

from experiments.recipes.corpora import default, mini
from experiments.recipes.glm45 import air, air_4k, glm45, glm45_4k
from experiments.recipes.tiny import smoke, tiny
from glm_jax.config import ConfigError, Run, nearest

RECIPES: dict[str, Callable[[], Run]] = {
    recipe.__name__: recipe for recipe in (tiny, smoke, mini, default, air, glm45, air_4k, glm45_4k)
}


def get(name: str) -> Run:
    """The run called `name`; a ConfigError offers the nearest name."""
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r}; {nearest(name, list(RECIPES))}")
    return RECIPES[name]()
