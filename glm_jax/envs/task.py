"""What an environment is: it makes tasks from seeds, answers the model's turns, and can solve its own tasks.

A task is a pure function of (environment, seed, level). An episode answers parsed assistant turns until it is done;
its reward is 0 or 1, given with the last turn, and the reason says why.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from glm_jax.config import ConfigError

Message = dict[str, Any]  # as text.parse returns it: reasoning_content, content, tool_calls, status


@dataclass(frozen=True)
class Task:
    """A problem as the model sees it (`messages`, `tools`) and what scoring needs (`answer`, never shown)."""

    env: str
    kind: str
    level: int
    seed: int
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None
    max_turns: int  # assistant turns
    answer: Any


@dataclass(frozen=True)
class Turn:
    """The environment's reply: one observation per tool call, or the end with its reward."""

    observations: tuple[str, ...] = ()
    done: bool = False
    reward: float = 0.0
    reason: str = ""


class Episode(ABC):
    """One attempt at a task. `step` takes assistant turns until the returned turn is `done`."""

    def __init__(self, task: Task):
        self.task = task
        self.turns = 0
        self.done = False

    def step(self, message: Message) -> Turn:
        if self.done:
            raise ConfigError(f"this episode ended after turn {self.turns}; start another with start(task)")
        self.turns += 1
        turn = self.reply(message)
        if not turn.done and self.turns >= self.task.max_turns:
            turn = Turn(turn.observations, done=True, reason="turn limit")
        self.done = turn.done
        return turn

    @abstractmethod
    def reply(self, message: Message) -> Turn: ...


class Environment(ABC):
    """A family of tasks with a checkable end."""

    name: ClassVar[str]
    levels: ClassVar[tuple[int, ...]]  # easiest first

    @abstractmethod
    def task(self, seed: int, level: int) -> Task: ...

    @abstractmethod
    def start(self, task: Task) -> Episode: ...

    @abstractmethod
    def solve(self, task: Task, thinking: bool = True) -> list[Message]:
        """The oracle's continuation: assistant turns, and the tool turns between them."""

    def slip(self, task: Task, thinking: bool = True) -> list[Message]:
        """What `solve` gives, with one step wrong and all that follows from it, as people's demonstrations have it.
        It earns nothing: imitation goes no further than its teacher, reinforcement does."""
        raise ConfigError(
            f"environment {self.name} has no slip, the dialogue with a wrong step: set sft.slips to 0, or write one"
        )

    def random(self, seed: int, level: int) -> random.Random:
        """The task's own randomness: the same in every process, different for each environment, level and seed."""
        if level not in self.levels:
            raise ConfigError(f"environment {self.name} has no level {level}; use one of {self.levels}")
        return random.Random(f"{self.name} {level} {seed}")


def said(content: str, reasoning: str, thinking: bool, calls: Sequence[tuple[str, dict[str, Any]]] = ()) -> Message:
    """An assistant turn; in direct mode it has no reasoning."""
    message: Message = {"role": "assistant", "content": content}
    if thinking:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return message


def ended(solved: bool) -> Turn:
    return Turn(done=True, reward=float(solved), reason="solved" if solved else "wrong")


def failed(reason: str) -> Turn:
    return Turn(done=True, reason=reason)
