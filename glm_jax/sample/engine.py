"""Sampling: one forward over the prompts into a cache, then a compiled loop that ends when every row has stopped."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from glm_jax import mesh, model
from glm_jax.config import ConfigError, Model
from glm_jax.sample.draw import draw, keys
from glm_jax.sample.weights import as_declared, prepare

SHARED_TOKENS = 64  # rows that begin with as many tokens alike, or more, keep these once
STREAM_TOKENS = 8  # tokens decoded between two calls of `on_token`
FEWEST_ROWS = 32  # of a batch that is not made smaller when rows end


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
    rows_B: Array  # uids
    alive_B: Array
    token_B: Array
    step: Array
    ids_BO: Array
    logprobs_BO: Array


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
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ConfigError(f"prompt {i} is empty; give it at least one token, such as <|endoftext|>")
        if len(prompt) + settings.max_new_tokens > cfg.max_positions:
            raise ConfigError(
                f"prompt {i} has {len(prompt)} tokens, and max_new_tokens={settings.max_new_tokens} more exceed the "
                f"model's max_positions={cfg.max_positions}; shorten one of them"
            )
    if not prompts:
        return []
    tokens = _bucket(max(map(len, prompts)), 16) + _bucket(settings.max_new_tokens, 16)
    session = Session(cfg, params, router_bias_LE, range(len(prompts)), tokens)
    return [done for done in session.turn(prompts, settings, on_token) if done is not None]


class Session:
    """Rows read and continued in turns over one cache, as a dialogue with tools needs it: what was sampled stays as it
    was sampled, and only what is new is read.

    Row i's draws depend on (seed, uids[i], position) alone. `tokens` is the most that a row may come to hold.
    """

    def __init__(self, cfg: Model, params: model.GLM, router_bias_LE: Array, uids: Sequence[int], tokens: int):
        if not isinstance(params.moe if params.moe is not None else params.dense, tuple):
            params = prepare(cfg, params)
        self._cfg, self._params, self._bias_LE, self._tokens = cfg, params, router_bias_LE, tokens
        self._rows = _batch_rows(len(uids))
        self._uids_B = np.zeros(self._rows, np.int32)
        self._uids_B[: len(uids)] = uids
        self._cache: model.Cache | None = None
        self._held = [0] * len(uids)  # tokens of each row so far
        self._unread: list[list[int]] = [[] for _ in uids]  # a turn's last token, which the model has not read yet

    def turn(
        self, given: Sequence[Sequence[int]], settings: Sampling, on_token: Callable[[int, int], None] | None = None
    ) -> list[Completion | None]:
        """Read the tokens `given` to each row and continue it; a row that is given none rests (None).

        Raises ConfigError for ids outside the vocabulary and for a row that could outgrow the session's `tokens`.
        """
        self._check(given, settings)
        state = self._read(
            [[*before, *ids] if len(ids) else [] for before, ids in zip(self._unread, given, strict=True)], settings
        )
        rules, told = _rules(settings), 0
        chunk = settings.max_new_tokens if on_token is None else STREAM_TOKENS
        while True:
            if on_token is not None:
                told = _tell(state, told, on_token)
            if int(state.step) >= settings.max_new_tokens or not bool(state.alive_B.any()):
                break
            state = self._continue(state, rules, int(state.step) + chunk)
        self._cache = state.cache
        done = _completions(state, len(given), settings)
        for row, completion in enumerate(done):
            if completion is not None:
                self._held[row] += len(given[row]) + len(completion.ids)
                self._unread[row] = completion.ids[-1:]
        return done

    def experts(self) -> list[np.ndarray]:
        """int16 [tokens, L, A] of each row: the experts that every token took which has been read, so not the last one
        drawn, in every MoE layer."""
        if self._cache is None:
            return [np.zeros((0, self._cfg.moe_layers, self._cfg.A), np.int16) for _ in self._held]
        own_BSLA, length_B = np.asarray(self._cache.experts_BSLA), np.asarray(self._cache.length_B)
        shared = self._cache.shared
        shared_SLA = own_BSLA[0, :0] if shared is None else np.asarray(shared.experts_SLA)
        return [
            np.concatenate([shared_SLA, own_BSLA[row]])[: length_B[row]] if self._held[row] else own_BSLA[row, :0]
            for row in range(len(self._held))
        ]

    def _continue(self, state: _State, rules: _Rules, until: int) -> _State:
        """Decode until every row has ended, or step `until`. Once half of the rows have ended, the others go on in a batch of
        half the size (on one device: rows stay where they are)."""
        rows = len(state.alive_B)
        fewest = rows // 2 if rows > FEWEST_ROWS and _shards() == 1 else 0
        state = _decode(self._cfg, self._params, self._bias_LE, state, rules, until, fewest)
        alive_B = np.asarray(state.alive_B)
        if int(state.step) >= min(until, int(rules.max_new)) or not alive_B.any():
            return state
        some = np.argsort(~alive_B, kind="stable")[:fewest]  # ended rows fill it up
        return _put_rows(state, some, self._continue(_take_rows(state, some), rules, until))

    def _read(self, texts: list[list[int]], settings: Sampling) -> _State:
        """Read new tokens and draw every row's first one. In the first turn equal texts are read once, and what all texts
        begin with is kept once for all rows."""
        rows, source_B, begun, common = self._rows, None, None, 0
        alive_B = np.zeros(rows, bool)
        alive_B[: len(texts)] = [len(text) > 0 for text in texts]
        if self._cache is None:
            common = _begin_alike(texts)
            if common:
                ids_UT = np.repeat(np.array([texts[0][:common]], np.int32), _batch_rows(1), axis=0)
                begun = _read_beginning(self._cfg, self._params, self._bias_LE, ids_UT)
                texts = [text[common:] for text in texts]
            distinct = {text: i for i, text in enumerate(dict.fromkeys(map(tuple, texts)))}
            if _batch_rows(len(distinct)) < rows:
                source_B = np.zeros(rows, np.int32)
                source_B[: len(texts)] = [distinct[tuple(text)] for text in texts]
                rows, texts = _batch_rows(len(distinct)), [list(text) for text in distinct]
        lengths_U = np.zeros(rows, np.int32)
        lengths_U[: len(texts)] = [len(text) for text in texts]
        ids_UT = np.zeros((rows, _bucket(int(lengths_U.max()), 16)), np.int32)
        for row, text in enumerate(texts):
            ids_UT[row, : len(text)] = text
        new = _bucket(settings.max_new_tokens, 16)
        by = self._params, self._bias_LE
        what = (ids_UT, lengths_U), (self._uids_B, alive_B, source_B), _rules(settings)
        if self._cache is None:
            return _begin(self._cfg, (new, self._tokens - common), *by, begun, *what)
        return _go_on(self._cfg, new, *by, self._cache, *what)

    def _check(self, given: Sequence[Sequence[int]], settings: Sampling) -> None:
        for row, (ids, held) in enumerate(zip(given, self._held, strict=True)):
            if not len(ids):
                continue
            if not 0 <= min(ids) <= max(ids) < self._cfg.V:
                raise ConfigError(
                    f"prompt {row} has ids {min(ids)}..{max(ids)} outside the model's 0..{self._cfg.V - 1}"
                )
            if held + len(ids) + settings.max_new_tokens > self._tokens:
                raise ConfigError(
                    f"row {row} holds {held} tokens; {len(ids)} more and max_new_tokens={settings.max_new_tokens} exceed "
                    f"the session's {self._tokens}; begin it with more, or end the row"
                )


def traced(
    cfg: Model, what: Literal["prefill", "decode"], rows: int, prompt: int, new: int, in_8_bits: bool = False
) -> jax.stages.Traced:
    """A program of a turn on the mesh that is set, whose devices need not be here: it reads `prompt` tokens of every row, or
    draws `new`, one after another. Sizes as `generate` rounds them up; `in_8_bits` as `prepare` has it."""

    def shaped(make: Callable) -> Any:
        return mesh.concrete(jax.eval_shape(make))

    by = shaped(lambda: (prepare(cfg, model.init(cfg, jax.random.key(0))[0], in_8_bits), model.router_bias(cfg)))
    ints_B, alive_B = shaped(lambda: (jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool)))
    ids_BT, rules, until = shaped(lambda: (jnp.zeros((rows, prompt), jnp.int32), _rules(Sampling()), jnp.int32(0)))
    begin = (new, prompt + new), *by, None, (ids_BT, ints_B), (ints_B, alive_B, None), rules
    if what == "prefill":
        return _begin.trace(cfg, *begin)
    return _decode.trace(cfg, *by, shaped(lambda: _begin(cfg, *begin)), rules, until, until)


@partial(jax.jit, static_argnames=("cfg",))
def _read_beginning(cfg: Model, params: model.GLM, router_bias_LE: Array, ids_BT: Array) -> model.Cache:
    """A full cache of the tokens, all rows the same."""
    ids_BT = mesh.constrain(ids_BT, "BT")
    cache = model.empty_cache(cfg, *ids_BT.shape, stacked=False)
    aux = model.hidden(cfg, as_declared(cfg, params), router_bias_LE, ids_BT, cache=cache)
    assert aux.cache is not None  # one went in
    return aux.cache


@partial(jax.jit, static_argnames=("cfg", "room"))
def _begin(
    cfg: Model, room: tuple[int, int], params: model.GLM, router_bias_LE: Array, begun: model.Cache | None,
    read: tuple[Array, Array], rows: tuple[Array, Array, Array | None], rules: _Rules,
) -> _State:  # fmt: skip
    """`_prefill` into a new cache; room: tokens to be drawn, and the most that a row holds behind those of `begun`."""
    new, capacity = room
    cache = model.empty_cache(cfg, len(read[0]), capacity, stacked=False, begun=begun)
    return _prefill(cfg, new, params, router_bias_LE, cache, read, rows, rules)


def _prefill(
    cfg: Model, new: int, params: model.GLM, router_bias_LE: Array, cache: model.Cache, read: tuple[Array, Array],
    rows: tuple[Array, Array, Array | None], rules: _Rules,
) -> _State:  # fmt: skip
    """Read texts (ids_UT, lengths_U), right-padded, into the cache and draw the first token of every row.

    rows: uids, which are alive, and the text that each one continues (None: a row for each text).
    """
    (ids_UT, lengths_U), (uids_B, alive_B, source_B) = read, rows
    params = as_declared(cfg, params)
    ids_UT, lengths_U = mesh.constrain(ids_UT, "BT"), mesh.constrain(lengths_U, "B")
    segments_UT = (jnp.arange(ids_UT.shape[1]) < lengths_U[:, None]).astype(jnp.int32)
    aux = model.hidden(cfg, params, router_bias_LE, ids_UT, segments_BT=segments_UT, cache=cache)
    assert aux.cache is not None  # one went in

    def last(hidden_UTD: Array, lengths_U: Array) -> Array:
        return jnp.take_along_axis(hidden_UTD, jnp.maximum(lengths_U - 1, 0)[:, None, None], axis=1)

    last_U1D = mesh.per_shard(last, ("BTD", "B"), "BTD")(aux.hidden_BTD, lengths_U)
    begun, logits_BV = aux.cache, model.head(cfg, params, last_U1D)[:, 0]
    if source_B is not None:
        of_rows = (dataclasses.replace(begun, shared=None), logits_BV)
        of_rows, logits_BV = jax.tree.map(lambda z: mesh.rows_of(z, source_B), of_rows)
        begun = dataclasses.replace(of_rows, shared=begun.shared)
    state = _State(
        cache=begun,
        rows_B=mesh.constrain(uids_B, "B"),
        alive_B=mesh.constrain(alive_B, "B"),
        token_B=jnp.zeros_like(begun.length_B),
        step=jnp.int32(0),
        ids_BO=mesh.constrain(jnp.full((len(uids_B), new), -1, jnp.int32), "BO"),
        logprobs_BO=mesh.constrain(jnp.zeros((len(uids_B), new), jnp.float32), "BO"),
    )
    return _emit(state, logits_BV, rules)


_go_on = jax.jit(_prefill, static_argnames=("cfg", "new"), donate_argnames="cache")


@partial(jax.jit, static_argnames=("cfg",), donate_argnames=("state",))
def _decode(
    cfg: Model, params: model.GLM, router_bias_LE: Array, state: _State, rules: _Rules, until: Array, fewest: Array
) -> _State:
    """Token by token until step `until`, the limit, or until no more than `fewest` rows are alive."""

    def unfinished(state: _State) -> Array:
        return (state.step < jnp.minimum(until, rules.max_new)) & (jnp.sum(state.alive_B) > fewest)

    def step(state: _State) -> _State:
        alive_B1 = state.alive_B[:, None].astype(jnp.int32)  # an ended row is padding: it reads and keeps nothing
        p = as_declared(cfg, params)
        aux = model.hidden(cfg, p, router_bias_LE, state.token_B[:, None], segments_BT=alive_B1, cache=state.cache)
        assert aux.cache is not None  # one went in
        return _emit(dataclasses.replace(state, cache=aux.cache), model.head(cfg, p, aux.hidden_BTD)[:, 0], rules)

    return jax.lax.while_loop(unfinished, step, state)


@jax.jit
def _take_rows(state: _State, some: Array) -> _State:
    """A batch of those rows."""
    return _of_rows(lambda z: mesh.rows_of(z, some), state)


@partial(jax.jit, donate_argnames="state")
def _put_rows(state: _State, some: Array, part: _State) -> _State:
    """The batch with those rows, and the step, as they are in `part`."""
    return dataclasses.replace(_of_rows(lambda z, new: mesh.put_rows(z, some, new), state, part), step=part.step)


def _of_rows(fn: Callable[..., Array], state: _State, *others: _State) -> _State:
    """`fn` of every array that has rows."""

    def rows_alone(state: _State) -> _State:
        return dataclasses.replace(state, step=None, cache=dataclasses.replace(state.cache, shared=None))

    done = jax.tree.map(fn, *map(rows_alone, (state, *others)))
    return dataclasses.replace(done, step=state.step, cache=dataclasses.replace(done.cache, shared=state.cache.shared))


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


def _completions(state: _State, rows: int, settings: Sampling) -> list[Completion | None]:
    ids_BO, logprobs_BO = np.asarray(state.ids_BO), np.asarray(state.logprobs_BO)
    done: list[Completion | None] = []
    for row in range(rows):
        count = int(np.sum(ids_BO[row] >= 0))
        ids = ids_BO[row, :count].tolist()
        finish = "stop" if ids and ids[-1] in settings.stop_ids else "length"
        done.append(Completion(ids, logprobs_BO[row, :count].tolist(), finish) if ids else None)
    return done


def _begin_alike(texts: list[list[int]]) -> int:
    """How many tokens all texts begin with, in whole `SHARED_TOKENS`, for few lengths are to be compiled. Each keeps one
    to read, and 0 comes back where a row is alone or rests: one that begins later would begin with the others."""
    if len(texts) < 2 or not all(texts):
        return 0
    first, last = min(texts), max(texts)  # in dictionary order: what these share, all share
    alike = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    alike = min(alike, min(map(len, texts)) - 1)
    return alike - alike % SHARED_TOKENS


def _batch_rows(count: int) -> int:
    """Rows of a batch that holds `count`: a power of two on every device."""
    return _shards() * _bucket(-(-count // _shards()), 1)


def _shards() -> int:
    """Devices that share the rows of a batch."""
    return math.prod(mesh.axis_size(axis) for axis in mesh.BATCH)


def _bucket(size: int, smallest: int) -> int:
    """The next power of two, so that few shapes are ever compiled."""
    return max(smallest, 1 << max(size - 1, 0).bit_length())
