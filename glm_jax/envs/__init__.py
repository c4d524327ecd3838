"""Environments whose tasks are made from seeds and whose answers can be checked: reasoning, agent, chat."""

from glm_jax.config import ConfigError, nearest
from glm_jax.envs.agent import Agent
from glm_jax.envs.dialogue import Dialogue
from glm_jax.envs.reasoning import Reasoning
from glm_jax.envs.task import Environment, Episode, Task, Turn

__all__ = ["ENVIRONMENTS", "Environment", "Episode", "Task", "Turn", "get"]

ENVIRONMENTS: dict[str, Environment] = {env.name: env for env in (Reasoning(), Agent(), Dialogue())}


def get(name: str) -> Environment:
    """The environment of that name."""
    if name not in ENVIRONMENTS:
        raise ConfigError(f"no environment {name!r}; {nearest(name, list(ENVIRONMENTS))}")
    return ENVIRONMENTS[name]
