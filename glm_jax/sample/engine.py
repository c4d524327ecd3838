"""Sampling: one forward over the prompts into a cache, then a compiled loop that ends when every row has stopped."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from glm_jax import mesh, model
from glm_jax.config import ConfigError, Model
from glm_jax.sample.draw import draw, keys

STREAM_TOKENS = 8  # tokens decoded between two calls of `on_token`


@dataclass(frozen=True)
class Sampling:
    """How to draw and when to end. Temperature 0 is greedy; top_p 1 keeps every token."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 128
    stop_ids: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self):
        for ok, message in (
            (self.temperature >= 0, f"temperature={self.temperature} must not be negative; 0 is greedy"),
            (0 < self.top_p <= 1, f"top_p={self.top_p} must lie in (0, 1]; 1 keeps every token"),
            (self.max_new_tokens >= 1, f"max_new_tokens={self.max_new_tokens} must be at least 1"),
            (0 <= self.seed < 2**31, f"seed={self.seed} must lie in 0..2^31-1"),
        ):
            if not ok:
                raise ConfigError(message)


@dataclass(frozen=True)
class Completion:
    """New tokens, a stop token included, with their log-probabilities as `draw` defines them."""

    ids: list[int]
    logprobs: list[float]
    finish: Literal["stop", "length"]


@struct.dataclass
class _Rules:
    """`Sampling` as arrays: changing it compiles nothing."""

    temperature: Array
    top_p: Array
    seed: Array
    max_new: Array
    stop_ids: Array


@struct.dataclass
class _State:
    """A batch between two tokens. ids_BO is -1 where a row had already ended."""

    cache: model.Cache
    rows_B: Array
    alive_B: Array
    token_B: Array
    step: Array
    ids_BO: Array
    logprobs_BO: Array


def prepare(cfg: Model, params: model.GLM) -> model.GLM:
    """Parameters as decoding reads them: layer by layer, in the model's dtype, without the MTP layer.

    `generate` does this itself; who calls it often with the same parameters does it once and passes the result.
    """
    return _prepare(cfg, params)


def generate(
    cfg: Model,
    params: model.GLM,
    router_bias_LE: Array,
    prompts: Sequence[Sequence[int]],
    *,
    settings: Sampling,
    on_token: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """Continue every prompt. `on_token(row, id)` is called for each new token, a few tokens late.

    Row i's draws depend on (seed, i, position) alone. Shapes are rounded up to powers of two, so calls of like size
    share one compilation. Raises ConfigError for empty prompts, ids outside the vocabulary, and too many tokens.
    """
    _check(cfg, prompts, settings)
    if not prompts:
        return []
    if not isinstance(params.moe if params.moe is not None else params.dense, tuple):
        params = prepare(cfg, params)
    shards = math.prod(mesh.axis_size(axis) for axis in mesh.AXES)
    rows = shards * _bucket(-(-len(prompts) // shards), 1)
    new = _bucket(settings.max_new_tokens, 16)
    lengths_B = np.zeros(rows, np.int32)
    lengths_B[: len(prompts)] = [len(prompt) for prompt in prompts]
    ids_BT = np.zeros((rows, _bucket(int(lengths_B.max()), 16)), np.int32)
    for row, prompt in enumerate(prompts):
        ids_BT[row, : len(prompt)] = prompt
    rules = _rules(settings)

    state = _prefill(cfg, new, params, router_bias_LE, ids_BT, lengths_B, rules)
    chunk = settings.max_new_tokens if on_token is None else STREAM_TOKENS
    told = 0
    while True:
        if on_token is not None:
            told = _tell(state, told, on_token)
        if int(state.step) >= settings.max_new_tokens or not bool(state.alive_B.any()):
            break
        state = _decode(cfg, params, router_bias_LE, state, rules, state.step + chunk)
    return _completions(state, len(prompts), settings)


@partial(jax.jit, static_argnames=("cfg",))
def _prepare(cfg: Model, params: model.GLM) -> model.GLM:
    return dataclasses.replace(model.unstack(mesh.gather(params, model.specs(cfg), cfg.dtype)), mtp=None)


@partial(jax.jit, static_argnames=("cfg", "new"))
def _prefill(
    cfg: Model, new: int, params: model.GLM, router_bias_LE: Array, ids_BT: Array, lengths_B: Array, rules: _Rules
) -> _State:
    """Read the prompts, right-padded, and draw each row's first token. Rows of length 0 are no rows."""
    rows, width = ids_BT.shape
    ids_BT, lengths_B = mesh.constrain(ids_BT, "BT"), mesh.constrain(lengths_B, "B")
    cache = model.empty_cache(cfg, rows, width + new, stacked=False)
    segments_BT = (jnp.arange(width) < lengths_B[:, None]).astype(jnp.int32)
    aux = model.hidden(cfg, params, router_bias_LE, ids_BT, segments_BT=segments_BT, cache=cache)

    def last(hidden_BTD: Array, lengths_B: Array) -> Array:
        return jnp.take_along_axis(hidden_BTD, jnp.maximum(lengths_B - 1, 0)[:, None, None], axis=1)

    last_B1D = mesh.per_shard(last, ("BTD", "B"), "BTD")(aux.hidden_BTD, lengths_B)
    assert aux.cache is not None  # one went in
    state = _State(
        cache=aux.cache,
        rows_B=mesh.constrain(jnp.arange(rows, dtype=jnp.int32), "B"),
        alive_B=lengths_B > 0,
        token_B=jnp.zeros_like(lengths_B),
        step=jnp.int32(0),
        ids_BO=mesh.constrain(jnp.full((rows, new), -1, jnp.int32), "BO"),
        logprobs_BO=mesh.constrain(jnp.zeros((rows, new), jnp.float32), "BO"),
    )
    return _emit(state, model.head(cfg, params, last_B1D)[:, 0], rules)


@partial(jax.jit, static_argnames=("cfg",), donate_argnames=("state",))
def _decode(cfg: Model, params: model.GLM, router_bias_LE: Array, state: _State, rules: _Rules, until: Array) -> _State:
    """Token by token until step `until`, the limit, or until no row is alive."""

    def unfinished(state: _State) -> Array:
        return (state.step < jnp.minimum(until, rules.max_new)) & jnp.any(state.alive_B)

    def step(state: _State) -> _State:
        alive_B1 = state.alive_B[:, None].astype(jnp.int32)  # an ended row is padding: it reads and keeps nothing
        aux = model.hidden(cfg, params, router_bias_LE, state.token_B[:, None], segments_BT=alive_B1, cache=state.cache)
        assert aux.cache is not None  # one went in
        return _emit(dataclasses.replace(state, cache=aux.cache), model.head(cfg, params, aux.hidden_BTD)[:, 0], rules)

    return jax.lax.while_loop(unfinished, step, state)


def _emit(state: _State, logits_BV: Array, rules: _Rules) -> _State:
    """Draw the next token of every row that is alive; a stop token is kept, and ends its row."""

    def draw_rows(logits_BV: Array, rows_B: Array, positions_B: Array, rules: _Rules) -> tuple[Array, Array]:
        return draw(keys(rules.seed, rows_B, positions_B), logits_BV, rules.temperature, rules.top_p)

    def record(all_BO: Array, new_B: Array, step: Array) -> Array:
        return all_BO.at[:, step].set(new_B)

    draw_rows = mesh.per_shard(draw_rows, ("BV", "B", "B", ""), ("B", "B"))
    record = mesh.per_shard(record, ("BO", "B", ""), "BO")
    token_B, logprob_B = draw_rows(logits_BV, state.rows_B, state.cache.length_B, rules)
    stopped_B = jnp.any(token_B[:, None] == rules.stop_ids[None], axis=1)
    return dataclasses.replace(
        state,
        alive_B=state.alive_B & ~stopped_B,
        token_B=token_B,
        step=state.step + 1,
        ids_BO=record(state.ids_BO, jnp.where(state.alive_B, token_B, -1), state.step),
        logprobs_BO=record(state.logprobs_BO, logprob_B, state.step),
    )


def _rules(settings: Sampling) -> _Rules:
    stop_ids = np.full(_bucket(len(settings.stop_ids), 4), -1, np.int32)
    stop_ids[: len(settings.stop_ids)] = settings.stop_ids
    return _Rules(
        temperature=jnp.float32(settings.temperature),
        top_p=jnp.float32(settings.top_p),
        seed=jnp.int32(settings.seed),
        max_new=jnp.int32(settings.max_new_tokens),
        stop_ids=jnp.asarray(stop_ids),
    )


def _tell(state: _State, told: int, on_token: Callable[[int, int], None]) -> int:
    ids_BO = np.asarray(state.ids_BO[:, : int(state.step)])
    for at in range(told, ids_BO.shape[1]):
        for row in np.flatnonzero(ids_BO[:, at] >= 0):
            on_token(int(row), int(ids_BO[row, at]))
    return ids_BO.shape[1]


def _completions(state: _State, rows: int, settings: Sampling) -> list[Completion]:
    ids_BO, logprobs_BO = np.asarray(state.ids_BO), np.asarray(state.logprobs_BO)
    done = []
    for row in range(rows):
        count = int(np.sum(ids_BO[row] >= 0))
        ids = ids_BO[row, :count].tolist()
        finish = "stop" if ids[-1] in settings.stop_ids else "length"
        done.append(Completion(ids, logprobs_BO[row, :count].tolist(), finish))
    return done


def _check(cfg: Model, prompts: Sequence[Sequence[int]], settings: Sampling) -> None:
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ConfigError(f"prompt {i} is empty; give it at least one token, such as <|endoftext|>")
        if not 0 <= min(prompt) <= max(prompt) < cfg.V:
            raise ConfigError(f"prompt {i} has ids {min(prompt)}..{max(prompt)} outside the model's 0..{cfg.V - 1}")
        if len(prompt) + settings.max_new_tokens > cfg.max_positions:
            raise ConfigError(
                f"prompt {i} has {len(prompt)} tokens, and max_new_tokens={settings.max_new_tokens} more exceed the "
                f"model's max_positions={cfg.max_positions}; shorten one of them"
            )


def _bucket(size: int, smallest: int) -> int:
    """The next power of two, so that few shapes are ever compiled."""
    return max(smallest, 1 << max(size - 1, 0).bit_length())
