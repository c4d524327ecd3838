"""Rollouts: the model answers tasks, the environment replies, until every episode has ended. Token in, token out."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax import Array

from glm_jax import model
from glm_jax.config import Model
from glm_jax.envs import get as environment
from glm_jax.envs import guard
from glm_jax.envs.task import Episode, Task, Turn
from glm_jax.rl.sample import Sample
from glm_jax.sample.engine import Completion, Sampling, Session
from glm_jax.text.chat import observation_tokens, render_tokens, stop_ids
from glm_jax.text.parse import parse_tokens
from glm_jax.text.tokenizer import Tokenizer

TOKENS_MULTIPLE = 128  # of what a session is begun with, so that few shapes are compiled
TIME_LIMIT = 5.0  # seconds for an environment's reply


@dataclass(frozen=True)
class Policy:
    """A model that answers: `params` as `sample.engine.prepare` returns them."""

    cfg: Model
    params: model.GLM
    router_bias_LE: Array
    tokenizer: Tokenizer


def rollout(
    policy: Policy, tasks: Sequence[Task], settings: Sampling, uids: Sequence[int], *, thinking: bool = True
) -> list[Sample]:
    """One answer to each of `tasks` (a task may stand there many times), `settings.max_new_tokens` in a turn at most.

    The draws of answer i depend on (settings.seed, uids[i], position) alone. An environment that raises or hangs ends
    its answer with that reason and reward 0; the others go on.
    """
    tokenizer = policy.tokenizer
    settings = dataclasses.replace(settings, stop_ids=stop_ids(tokenizer))
    samples = [Sample(task, thinking) for task in tasks]
    episodes = [environment(task.env).start(task) for task in tasks]
    given = [render_tokens(tokenizer, list(t.messages), t.tools, thinking).ids for t in tasks]
    tokens = max(len(ids) + _room(t, settings) for ids, t in zip(given, tasks, strict=True))
    tokens = -(-tokens // TOKENS_MULTIPLE) * TOKENS_MULTIPLE
    session = Session(policy.cfg, policy.params, policy.router_bias_LE, uids, tokens)
    while any(given):
        for sample, ids in zip(samples, given, strict=True):
            if ids:
                sample.give(ids)
        completions = session.turn(given, settings)
        given = [
            _reply(tokenizer, sample, episode, completion) if completion else []
            for sample, episode, completion in zip(samples, episodes, completions, strict=True)
        ]
    return samples


def _room(task: Task, settings: Sampling) -> int:
    """Tokens that an answer may take after its prompt; an observation is taken to be no longer than a turn."""
    return (2 * task.max_turns - 1) * settings.max_new_tokens


def _reply(tokenizer: Tokenizer, sample: Sample, episode: Episode, completion: Completion) -> list[int]:
    """Show the environment what was drawn; returns what the model reads next, nothing when the answer has ended."""
    sample.draw(completion.ids, completion.logprobs)
    message = parse_tokens(tokenizer, completion.ids, sample.task.tools)
    sample.turns.append({"role": "assistant", **message})
    if completion.finish == "length":
        sample.end(0.0, "too long")
        return []
    wrong = _format_error(tokenizer, sample, message, completion.ids[-1])
    if wrong:
        sample.end(0.0, wrong)
        return []
    try:
        turn: Turn = guard.call(episode.step, message, seconds=TIME_LIMIT)
    except guard.EnvironmentFailure as failure:
        sample.end(0.0, f"environment {failure.reason}")
        return []
    if turn.done:
        sample.end(turn.reward, turn.reason)
        return []
    sample.turns += [{"role": "tool", "content": text} for text in turn.observations]
    return observation_tokens(tokenizer, turn.observations, sample.thinking)


def _format_error(tokenizer: Tokenizer, sample: Sample, message: dict[str, Any], stop: int) -> str:
    """GLM's format, beyond what the parser sees: a thought exactly in thinking mode, and the stop that fits the turn."""
    if message["status"] != "ok":
        return "malformed"
    if bool(message["reasoning_content"]) != sample.thinking:
        return "no thought" if sample.thinking else "thought in direct mode"
    fits = "<|observation|>" if message["tool_calls"] else "<|user|>"
    return "" if stop == tokenizer.id(fits) else "wrong stop"


def well_formed(sample: Sample) -> bool:
    """Whether every turn kept to the format, right or wrong as the answer may be."""
    return sample.reason not in ("malformed", "no thought", "thought in direct mode", "wrong stop", "too long")
