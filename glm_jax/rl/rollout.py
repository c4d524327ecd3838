"""Rollouts: the model answers tasks, the environment replies, until every episode has ended. Token in, token out."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jax import Array

from glm_jax import model
from glm_jax.config import Model
from glm_jax.data.prepare import load_tokenizer
from glm_jax.envs import get as environment
from glm_jax.envs import guard
from glm_jax.envs.task import Episode, Task
from glm_jax.rl.sample import Sample
from glm_jax.sample.engine import Completion, Sampling, Session
from glm_jax.sample.weights import prepare
from glm_jax.text.chat import DialogueError, observation_tokens, render_tokens, stop_ids
from glm_jax.text.parse import parse_tokens
from glm_jax.text.tokenizer import Tokenizer
from glm_jax.train import checkpoint

T = TypeVar("T")

# Reasons why an answer ended that are about its format, whatever it says.
TOO_LONG, MALFORMED, WRONG_STOP = "too long", "malformed", "wrong stop"
NO_THOUGHT, THOUGHT = "no thought", "thought in direct mode"
TIME_LIMIT = 5.0  # seconds for an environment's reply


@dataclass(frozen=True)
class Policy:
    """A model that answers: `params` as `sample.engine.prepare` returns them."""

    cfg: Model
    params: model.GLM
    router_bias_LE: Array
    tokenizer: Tokenizer


def load_policy(folder: Path) -> Policy:
    """The last checkpoint of a stage's folder, ready to answer, on the mesh that is set or the default device."""
    run, params, router_bias_LE, data = checkpoint.load_params(folder)
    return Policy(run.model, prepare(run.model, params), router_bias_LE, load_tokenizer(data, run.model.V))


def rollout(
    policy: Policy,
    tasks: Sequence[Task],
    settings: Sampling,
    uids: Sequence[int],
    *,
    tokens: int,
    thinking: bool | Sequence[bool] = True,
) -> list[Sample]:
    """One answer to each of `tasks` (a task may stand there many times), of `settings.max_new_tokens` a turn and, with
    the prompt and all turns, `tokens` at most; an answer without room for its next turn ends as too long.

    The draws of answer i depend on (settings.seed, uids[i], position) alone. An environment that raises or hangs ends
    its answer with that reason and reward 0; the others go on. `thinking`: the mode of all answers, or of each.
    """
    tokenizer = policy.tokenizer
    settings = dataclasses.replace(settings, stop_ids=stop_ids(tokenizer))
    modes = [thinking] * len(tasks) if isinstance(thinking, bool) else thinking
    samples = [Sample(task, mode) for task, mode in zip(tasks, modes, strict=True)]
    episodes = [_guarded(sample, environment(sample.task.env).start, sample.task) for sample in samples]
    given = [
        render_tokens(tokenizer, list(s.task.messages), s.task.tools, s.thinking).ids if episode else []
        for s, episode in zip(samples, episodes, strict=True)
    ]
    session = Session(policy.cfg, policy.params, policy.router_bias_LE, uids, tokens)
    while any(given):
        for row, sample in enumerate(samples):
            if given[row] and len(sample.ids) + len(given[row]) + settings.max_new_tokens > tokens:
                sample.end(0.0, TOO_LONG)
                given[row] = []
            sample.give(given[row])
        completions = session.turn(given, settings)
        given = [
            _reply(tokenizer, sample, episode, completion) if completion and episode else []
            for sample, episode, completion in zip(samples, episodes, completions, strict=True)
        ]
    for sample, experts in zip(samples, session.experts(), strict=True):
        sample.took(experts)
    return samples


def _reply(tokenizer: Tokenizer, sample: Sample, episode: Episode, completion: Completion) -> list[int]:
    """Show the environment what was drawn; returns what the model reads next, nothing when the answer has ended."""
    sample.draw(completion.ids, completion.logprobs)
    message = parse_tokens(tokenizer, completion.ids, sample.task.tools)
    sample.turns.append({"role": "assistant", **message})
    if completion.finish == "length":
        sample.end(0.0, TOO_LONG)
        return []
    wrong = _format_error(tokenizer, sample, message, completion.ids[-1])
    if wrong:
        sample.end(0.0, wrong)
        return []
    turn = _guarded(sample, episode.step, message)
    if turn is None:
        return []
    if turn.done:
        sample.end(turn.reward, turn.reason)
        return []
    try:
        reply = observation_tokens(tokenizer, turn.observations, sample.thinking)
    except DialogueError as error:
        sample.end(0.0, f"environment gave no text: {error}")
        return []
    sample.turns += [{"role": "tool", "content": text} for text in turn.observations]
    return reply


def _guarded(sample: Sample, function: Callable[[Any], T], argument: Any) -> T | None:
    """What the environment returns; where it raises or hangs None, and the answer has ended with that reason."""
    try:
        return guard.call(function, argument, seconds=TIME_LIMIT)
    except guard.EnvironmentFailure as failure:
        sample.end(0.0, f"environment {failure.reason}")
        return None


def _format_error(tokenizer: Tokenizer, sample: Sample, message: dict[str, Any], stop: int) -> str:
    """GLM's format, beyond what the parser sees: a thought exactly in thinking mode, and the stop that fits the turn."""
    if message["status"] != "ok":
        return MALFORMED
    if bool(message["reasoning_content"]) != sample.thinking:
        return NO_THOUGHT if sample.thinking else THOUGHT
    fits = "<|observation|>" if message["tool_calls"] else "<|user|>"
    return "" if stop == tokenizer.id(fits) else WRONG_STOP


def well_formed(sample: Sample) -> bool:
    """Whether every turn kept to the format, right or wrong as the answer may be."""
    return sample.reason not in (TOO_LONG, MALFORMED, WRONG_STOP, NO_THOUGHT, THOUGHT)
