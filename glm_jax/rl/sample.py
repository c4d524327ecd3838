"""One answer to one task, as tokens: what was given, what was sampled, and what it earned."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from glm_jax.envs.task import Task


@dataclass
class Sample:
    """A trajectory in tokens. Every per-token list stays as long as `ids`; sampled tokens are never rendered again."""

    task: Task
    thinking: bool = True
    ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)  # which tokens the model drew
    log_probs: list[float] = field(default_factory=list)  # of drawn tokens, by the model that drew them; else 0
    experts: np.ndarray | None = None  # int16 [tokens, L, A]: those that each token took; -1 where it was not read
    turns: list[dict[str, Any]] = field(default_factory=list)  # the assistant's, parsed, and the tools' between them
    reward: float = 0.0
    reason: str = ""  # "solved", or why not; "" while it goes on

    def give(self, ids: list[int]) -> None:
        """Tokens of the prompt or of the environment."""
        self._append(ids, [0.0] * len(ids), sampled=False)

    def draw(self, ids: list[int], log_probs: list[float]) -> None:
        """Tokens that the model drew."""
        if len(ids) != len(log_probs):
            raise ValueError(f"{len(ids)} tokens with {len(log_probs)} log-probabilities; each token has one")
        self._append(ids, log_probs, sampled=True)

    def took(self, experts: np.ndarray) -> None:
        """The experts of its first tokens, [at most as many, L, A]."""
        unread = np.full((len(self.ids) - len(experts), *experts.shape[1:]), -1, np.int16)
        self.experts = np.concatenate([experts, unread])

    def end(self, reward: float, reason: str) -> None:
        self.reward, self.reason = reward, reason

    @property
    def drawn(self) -> int:
        """Tokens that the model drew."""
        return sum(self.sampled)

    def _append(self, ids: list[int], log_probs: list[float], sampled: bool) -> None:
        if self.reason and ids:
            raise ValueError(f"the sample has ended ({self.reason}); nothing can follow")
        self.ids += ids
        self.log_probs += log_probs
        self.sampled += [sampled] * len(ids)
