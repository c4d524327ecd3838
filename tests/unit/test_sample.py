"""Drawing tokens and generating rows of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax import model
from glm_jax.config import ConfigError, Model
from glm_jax.sample import engine
from glm_jax.sample.draw import draw, keys, nucleus
from glm_jax.sample.engine import Sampling, generate

CFG = Model(
    V=40, D=16, L=2, dense_layers=1, N=2, K=1, H=8, F=16, M=8, E=4, A=2, max_positions=64, rope_theta=1e4,
    dtype="float32", remat="none",
)  # fmt: skip
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11, 12]]


@pytest.fixture(scope="module")
def weights():
    noise = np.random.default_rng(0)
    params = jax.tree.map(
        lambda spec: jnp.asarray(0.5 * noise.normal(size=spec.shape) + (spec.kind == "norm"), jnp.float32),
        model.specs(CFG),
    )
    return params, jnp.asarray(0.1 * noise.normal(size=(CFG.router_rows, CFG.E)), jnp.float32)


def sorted_nucleus(p_V, top_p):
    order = np.argsort(-p_V, kind="stable")
    count = np.searchsorted(np.cumsum(p_V[order]), top_p) + 1  # the first whose sum reaches top_p is in
    return np.isin(np.arange(p_V.size), order[:count])


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_nucleus_is_the_sorted_cumulative_one(top_p):
    logits_BV = np.random.default_rng(0).normal(size=(16, 200)) * np.linspace(0.1, 8, 16)[:, None]
    p_BV = np.asarray(jax.nn.softmax(jnp.asarray(logits_BV, jnp.float32)))
    keep_BV = np.asarray(jax.jit(nucleus)(p_BV, top_p))
    for p_V, keep_V in zip(p_BV, keep_BV, strict=True):
        np.testing.assert_array_equal(keep_V, sorted_nucleus(p_V, np.float32(top_p)))


def test_nucleus_of_certain_and_of_equal_tokens():
    certain_BV = jnp.eye(5)[:1]
    np.testing.assert_array_equal(nucleus(certain_BV, 0.9), certain_BV > 0)
    assert nucleus(jnp.full((1, 4), 0.25), 0.3).all()  # equals stay in together


def test_draws_follow_the_distribution_and_its_nucleus():
    logits_V = jnp.asarray([2.0, 1.0, 0.0, -1.0, -9.0])
    rows = 20_000

    def shares(temperature, top_p):
        logits_BV = jnp.tile(logits_V, (rows, 1))
        own = keys(jnp.int32(7), jnp.arange(rows), jnp.zeros(rows, jnp.int32))
        ids_B, logprobs_B = jax.jit(draw)(own, logits_BV, temperature, top_p)
        scale = temperature if temperature > 0 else 1.0
        np.testing.assert_allclose(logprobs_B, jax.nn.log_softmax(logits_V / scale)[ids_B], rtol=1e-5)
        return np.bincount(ids_B, minlength=5) / rows

    for temperature in (0.5, 1.0, 2.0):
        p_V = np.asarray(jax.nn.softmax(logits_V / temperature))
        np.testing.assert_allclose(shares(temperature, 1.0), p_V, atol=0.015)  # four standard errors of 20,000 draws
        kept_V = np.where(sorted_nucleus(p_V, 0.8), p_V, 0)
        np.testing.assert_allclose(shares(temperature, 0.8), kept_V / kept_V.sum(), atol=0.015)
    np.testing.assert_array_equal(shares(0.0, 0.8), [1, 0, 0, 0, 0])


def test_greedy_equals_the_whole_forward_token_by_token(weights):
    params, router_bias_LE = weights
    done = generate(CFG, params, router_bias_LE, PROMPTS, settings=Sampling(temperature=0, max_new_tokens=6))
    whole = jax.jit(lambda ids_BT: model.forward(CFG, params, router_bias_LE, ids_BT)[0])
    for prompt, completion in zip(PROMPTS, done, strict=True):
        ids = [*prompt, *completion.ids]
        padded_BT = np.zeros((1, 16), np.int32)  # one shape; what follows a token cannot change it
        padded_BT[0, : len(ids)] = ids
        logp_TV = jax.nn.log_softmax(whole(padded_BT)[0])[len(prompt) - 1 : len(ids) - 1]
        assert completion.ids == logp_TV.argmax(-1).tolist()
        np.testing.assert_allclose(completion.logprobs, logp_TV.max(-1), atol=1e-4)
        assert completion.finish == "length"


def test_stop_tokens_end_rows_one_by_one(weights):
    params, router_bias_LE = weights
    free = generate(CFG, params, router_bias_LE, PROMPTS, settings=Sampling(max_new_tokens=12, seed=3))
    stops = (free[0].ids[4], free[2].ids[1])
    done = generate(CFG, params, router_bias_LE, PROMPTS, settings=Sampling(max_new_tokens=12, seed=3, stop_ids=stops))
    assert {completion.finish for completion in done} >= {"stop"}
    for before, after in zip(free, done, strict=True):
        end = next((i + 1 for i, token in enumerate(before.ids) if token in stops), 12)
        assert after.ids == before.ids[:end]
        assert after.finish == ("stop" if before.ids[end - 1] in stops else "length")
        np.testing.assert_allclose(after.logprobs, before.logprobs[:end], atol=1e-5)


def test_a_row_draws_the_same_in_any_batch_and_streamed(weights):
    params, router_bias_LE = weights
    prepared = engine.prepare(CFG, params)
    settings = Sampling(temperature=0.8, top_p=0.9, max_new_tokens=11, seed=5)
    together = generate(CFG, params, router_bias_LE, PROMPTS, settings=settings)
    alone = generate(CFG, prepared, router_bias_LE, PROMPTS[:1], settings=settings)
    assert alone[0].ids == together[0].ids
    told = [[] for _ in PROMPTS]
    streamed = generate(
        CFG, prepared, router_bias_LE, PROMPTS, settings=settings, on_token=lambda row, token: told[row].append(token)
    )
    assert told == [completion.ids for completion in streamed] == [completion.ids for completion in together]
    other = generate(
        CFG, prepared, router_bias_LE, PROMPTS, settings=Sampling(temperature=0.8, top_p=0.9, max_new_tokens=11, seed=6)
    )
    assert [completion.ids for completion in other] != told


def test_calls_of_like_size_and_other_settings_compile_nothing(weights):
    params, router_bias_LE = weights
    prepared = engine.prepare(CFG, params)
    generate(CFG, prepared, router_bias_LE, PROMPTS, settings=Sampling(max_new_tokens=9))
    before = engine._decode._cache_size(), engine._prefill._cache_size()
    settings = Sampling(temperature=0.3, top_p=0.5, max_new_tokens=14, stop_ids=(3,), seed=9)
    generate(CFG, prepared, router_bias_LE, [[1] * 9, [2], [3]], settings=settings)
    assert (engine._decode._cache_size(), engine._prefill._cache_size()) == before


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 40]], {}, "outside the model's 0..39"),
        ([[1] * 60], {}, "max_positions=64"),
        ([[1]], {"temperature": -0.1}, "temperature=-0.1"),
        ([[1]], {"top_p": 0.0}, "top_p=0.0"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_mistakes_are_explained(weights, prompts, changes, message):
    with pytest.raises(ConfigError, match=message):
        generate(CFG, *weights, prompts, settings=Sampling(**{"max_new_tokens": 8, **changes}))


def test_no_prompts_no_completions(weights):
    assert generate(CFG, *weights, [], settings=Sampling()) == []
