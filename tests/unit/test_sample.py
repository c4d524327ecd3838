"""Drawing tokens and generating rows of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax import mesh, model
from glm_jax.config import ConfigError, Mesh, Model
from glm_jax.sample import engine
from glm_jax.sample.draw import draw, keys, nucleus
from glm_jax.sample.engine import Sampling, generate
from glm_jax.sample.weights import as_declared, prepare
from pallas_kernels.fp8 import Quantized, dequantize

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


def test_the_programs_that_are_planned_are_those_that_sample(weights):
    """Compiled from shapes alone, they continue distinct prompts as `generate` does."""
    want = generate(CFG, *weights, PROMPTS, settings=Sampling(max_new_tokens=16, seed=3))
    prefill, decode = (engine.traced(CFG, what, 4, 16, 16).lower().compile() for what in ("prefill", "decode"))
    by, rules = (engine.prepare(CFG, weights[0]), weights[1]), engine._rules(Sampling(max_new_tokens=16, seed=3))
    lengths_B, alive_B = np.array([len(ids) for ids in PROMPTS], np.int32), np.ones(4, bool)
    ids_BT = np.array([[*ids, *[0] * (16 - len(ids))] for ids in PROMPTS], np.int32)
    state = prefill(*by, None, (ids_BT, lengths_B), (np.arange(4, dtype=np.int32), alive_B, None), rules)
    state = decode(*by, state, rules, jnp.int32(16), jnp.int32(0))
    np.testing.assert_array_equal(state.ids_BO, [done.ids for done in want])


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
    before = engine._decode._cache_size(), engine._begin._cache_size()
    settings = Sampling(temperature=0.3, top_p=0.5, max_new_tokens=14, stop_ids=(3,), seed=9)
    generate(CFG, prepared, router_bias_LE, [[1] * 9, [2], [3]], settings=settings)
    assert (engine._decode._cache_size(), engine._begin._cache_size()) == before


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


# ---- sessions: rows continued in turns

GREEDY = Sampling(temperature=0, max_new_tokens=6)
DRAWN = Sampling(temperature=1.0, max_new_tokens=6, seed=5)
TURNS = [[[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11, 12]], [[20, 21], [22, 23, 24, 25, 26], [27], [28]]]


def began(weights, uids=range(4), tokens=48):
    return engine.Session(CFG, *weights, uids, tokens)


@pytest.mark.slow
def test_two_turns_equal_the_whole_forward_over_all_that_was_read_and_said(weights):
    session, rows = began(weights), [[] for _ in range(4)]
    logits = jax.jit(lambda ids_BT: model.forward(CFG, *weights, ids_BT)[0])
    for given in TURNS:
        done = session.turn(given, GREEDY)
        for row, ids, completion in zip(rows, given, done, strict=True):
            row += [*ids, *completion.ids]
        padded_BT = np.zeros((4, 32), np.int32)
        for row, ids in enumerate(rows):
            padded_BT[row, : len(ids)] = ids
        logp_BTV = jax.nn.log_softmax(logits(padded_BT))
        for row, (ids, completion) in enumerate(zip(rows, done, strict=True)):
            logp_TV = logp_BTV[row, len(ids) - len(completion.ids) - 1 : len(ids) - 1]
            assert completion.ids == logp_TV.argmax(-1).tolist()
            np.testing.assert_allclose(completion.logprobs, logp_TV.max(-1), atol=1e-4)


def test_turns_draw_what_one_prompt_of_all_their_tokens_draws(weights):
    """Draws hang on (seed, uid, position): a stop token that is read in the next turn counts as any other."""
    free = began(weights).turn(TURNS[0], DRAWN)
    stops = {completion.ids[2] for completion in free}
    stopping = Sampling(temperature=1.0, max_new_tokens=6, seed=5, stop_ids=tuple(stops))
    session = began(weights)
    first = session.turn(TURNS[0], stopping)
    second = session.turn(TURNS[1], DRAWN)
    assert {completion.finish for completion in first} >= {"stop"}
    texts = [[*a, *said.ids, *b] for a, said, b in zip(TURNS[0], first, TURNS[1], strict=True)]
    for completion, again in zip(second, began(weights).turn(texts, DRAWN), strict=True):
        assert completion.ids == again.ids
        np.testing.assert_allclose(completion.logprobs, again.logprobs, atol=1e-5)


@pytest.mark.parametrize("when", [0, 1])
def test_a_row_that_rests_goes_on_as_if_it_had_not(weights, when):
    """In a first turn with rows that begin alike too, which are read once."""
    texts = [[1, 2, 3], [1, 2, 3], [1, 2, 3], [11, 12]]
    turns = [texts, [[20], [21, 22], [23], [24, 25, 26]], [[30], [31], [32], [33, 34]]]
    expected = [[] for _ in range(4)]
    session = began(weights)
    for given in turns:
        for ids, completion in zip(expected, session.turn(given, DRAWN), strict=True):
            ids.append(completion.ids)
    resting, row = began(weights), 3
    said = [[] for _ in range(4)]
    late = iter([given[row] for given in turns])
    for number, given in enumerate([*turns, [[]] * 4]):
        now = [*given[:row], [] if number == when else next(late)]
        done = resting.turn(now, DRAWN)
        assert [completion is None for completion in done] == [not ids for ids in now]
        for ids, completion in zip(said, done, strict=True):
            ids += [completion.ids] if completion else []
    assert said == expected


@pytest.mark.parametrize("settings", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_rows_that_begin_alike_are_read_once_and_draw_what_they_draw_alone(weights, settings):
    texts, uids = [[1, 2, 3], [1, 2, 3], [4, 5], [1, 2, 3]], [9, 2, 7, 5]
    session = began(weights, uids)
    together = session.turn(texts, settings)
    after = session.turn([[20], [21], [22], []], settings)
    for row, (text, uid) in enumerate(zip(texts, uids, strict=True)):
        single = began(weights, [uid])
        (alone,) = single.turn([text], settings)
        assert together[row].ids == alone.ids
        np.testing.assert_allclose(together[row].logprobs, alone.logprobs, atol=1e-5)
        if after[row]:
            (alone,) = single.turn([[20 + row]], settings)
            assert after[row].ids == alone.ids
    if settings.temperature:
        assert len({tuple(together[row].ids) for row in (0, 1, 3)}) == 3  # one text, three uids
    else:
        assert together[0].ids == together[1].ids == together[3].ids


def test_rows_that_go_on_in_a_smaller_batch_draw_as_before_in_this_turn_and_the_next(weights, monkeypatch):
    free = began(weights).turn(TURNS[0], DRAWN)
    lengths = (2, 5, 1, 3)  # three batches: four rows, two, one
    stops = [[done.ids[length - 1]] for done, length in zip(free, lengths, strict=True)]
    stopping = Sampling(temperature=1.0, max_new_tokens=6, seed=5, stop_ids=tuple({stop for (stop,) in stops}))
    kept, made_smaller = [], []
    monkeypatch.setattr(
        engine, "_take_rows", lambda state, some, take=engine._take_rows: made_smaller.append(some) or take(state, some)
    )
    for fewest in (engine.FEWEST_ROWS, 1):
        monkeypatch.setattr(engine, "FEWEST_ROWS", fewest)
        session = began(weights)
        kept.append([*session.turn(TURNS[0], stopping), *session.turn(TURNS[1], stopping)])
        kept[-1] += [experts.tolist() for experts in session.experts()]
    for whole, halved in zip(*kept, strict=True):
        if isinstance(whole, list):
            assert whole == halved
        else:
            assert (whole.ids, whole.finish) == (halved.ids, halved.finish)
            np.testing.assert_allclose(whole.logprobs, halved.logprobs, atol=1e-5)
    assert {len(some) for some in made_smaller} == {1, 2}


def test_draws_depend_on_the_seed(weights):
    other = Sampling(temperature=1.0, max_new_tokens=6, seed=6)
    ids = [[done.ids for done in began(weights).turn(TURNS[0], how)] for how in (DRAWN, other, DRAWN)]
    assert ids[0] == ids[2] != ids[1]


def test_a_row_that_could_outgrow_its_session_is_refused_and_nothing_has_happened(weights):
    session = began(weights)
    first = session.turn(TURNS[0], DRAWN)
    message = r"row 0 holds 9 tokens; 34 more and max_new_tokens=6 exceed the session's 48; begin it with more"
    with pytest.raises(ConfigError, match=message):
        session.turn([[3] * 34, [], [], []], DRAWN)
    with pytest.raises(ConfigError, match=r"prompt 1 has ids 40..40 outside the model's 0..39"):
        session.turn([[], [40], [], []], DRAWN)
    done = session.turn(TURNS[1], DRAWN)
    other = began(weights)
    assert [completion.ids for completion in other.turn(TURNS[0], DRAWN)] == [completion.ids for completion in first]
    assert [completion.ids for completion in other.turn(TURNS[1], DRAWN)] == [completion.ids for completion in done]


@pytest.mark.parametrize("settings", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_what_all_rows_begin_with_is_kept_once_and_changes_no_draw(weights, settings, monkeypatch):
    beginning = [7, 8, 9, 10, 11, 12, 13, 14]
    texts = [[*beginning, 1], [*beginning, 2, 3], [*beginning, 1, 4], [*beginning, 2, 3]]
    further = [[20], [], [5], [21, 22]]

    def turns(least: int):
        monkeypatch.setattr(engine, "SHARED_TOKENS", least)
        session = began(weights)
        done = [session.turn(texts, settings), session.turn(further, settings)]
        return [one for turn in done for one in turn], session

    shared, session = turns(8)
    assert session._cache is not None and session._cache.shared_tokens == 8
    took = session.experts()
    apart, session = turns(9)
    assert session._cache is not None and session._cache.shared_tokens == 0
    for one, other in zip(took, session.experts(), strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(shared, apart, strict=True):
        assert (one is None) == (other is None)
        if one and other:
            assert one.ids == other.ids
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_nothing_is_shared_with_a_row_that_begins_later(weights, monkeypatch):
    monkeypatch.setattr(engine, "SHARED_TOKENS", 4)
    beginning = [7, 8, 9, 10, 11]
    session = began(weights)
    session.turn([[*beginning, 1], [*beginning, 2], [], [*beginning, 3]], GREEDY)
    late = session.turn([[], [], [5, 6], []], GREEDY)[2]
    (alone,) = began(weights, [2]).turn([[5, 6]], GREEDY)
    assert late.ids == alone.ids


def test_a_model_of_dense_layers_alone_is_sampled_on_a_mesh():
    cfg = Model(**{**vars(CFG), "dense_layers": CFG.L, "mtp_layers": 0})
    with jax.set_mesh(mesh.make(Mesh())):
        params, router_bias_LE = jax.jit(model.init, static_argnums=0)(cfg, jax.random.key(0))
        session = engine.Session(cfg, params, router_bias_LE, range(2), 32)
        done = session.turn([[1, 2, 3], [4]], GREEDY)
        assert [len(one.ids) for one in done if one] == [6, 6]
        assert [taken.shape for taken in session.experts()] == [(8, 0, CFG.A), (6, 0, CFG.A)]


def test_in_8_bits_it_draws_what_a_whole_forward_of_the_same_weights_does(weights):
    """A token's rounding is its own, whatever is computed beside it; embedding, output matrix and router keep their bits."""
    params, router_bias_LE = weights
    held = prepare(CFG, params, in_8_bits=True)
    done = generate(CFG, held, router_bias_LE, PROMPTS, settings=Sampling(temperature=0, max_new_tokens=6))
    whole = jax.jit(lambda ids_BT: model.forward(CFG, as_declared(CFG, held), router_bias_LE, ids_BT)[0])
    for prompt, completion in zip(PROMPTS, done, strict=True):
        ids = [*prompt, *completion.ids]
        padded_BT = np.zeros((1, 16), np.int32)
        padded_BT[0, : len(ids)] = ids
        logp_TV = jax.nn.log_softmax(whole(padded_BT)[0])[len(prompt) - 1 : len(ids) - 1]
        np.testing.assert_allclose(completion.logprobs, logp_TV[np.arange(6), completion.ids], atol=1e-4)


def test_weights_of_8_bits_are_the_layers_matrices(weights):
    held, plain = (prepare(CFG, weights[0], in_8_bits) for in_8_bits in (True, False))
    plain = as_declared(CFG, plain)

    def kept(path, w):
        name = jax.tree_util.keystr(path)
        matrix = any(part in name for part in ("attention.", "ffn.")) and not any(
            part in name for part in ("norm", "bias", "router")
        )
        assert isinstance(w, Quantized) == matrix, name

    held = as_declared(CFG, held)
    jax.tree_util.tree_map_with_path(kept, held, is_leaf=lambda z: isinstance(z, Quantized))
    (layer, *_), (declared, *_) = held.moe, plain.moe
    for one, w in (
        (layer.ffn.gate_EDM, declared.ffn.gate_EDM),
        (layer.ffn.down_EMD, declared.ffn.down_EMD),
        (as_matrix(layer.attention.q_DNH, CFG.D, -1), declared.attention.q_DNH.reshape(CFG.D, -1)),
        (as_matrix(layer.attention.o_NHD, -1, CFG.D), declared.attention.o_NHD.reshape(-1, CFG.D)),
    ):
        np.testing.assert_allclose(dequantize(one), w, atol=2**-4 * np.abs(w).max())


def as_matrix(w, *shape):
    return Quantized(w.value.reshape(shape), w.scale)


def test_weights_of_8_bits_are_not_split_along_tensor(weights):
    axes = mesh.abstract(Mesh(fsdp=1, tensor=2))
    with jax.sharding.use_abstract_mesh(axes), pytest.raises(ConfigError, match=r"mesh\.tensor=2"):
        prepare(CFG, weights[0], in_8_bits=True)
