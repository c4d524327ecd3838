"""The model against a slow literal reading of the specification, and what must hold whatever the weights are."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax import model
from glm_jax.config import Model, replace

CFG = Model(
    V=48, D=16, L=3, dense_layers=1, N=4, K=2, H=8, F=20, M=12, E=6, A=2, shared_experts=2,
    max_positions=64, rope_theta=1e4, dtype="float32", remat="none",
)  # fmt: skip
ROWS, LENGTH = 2, 12


@partial(jax.jit, static_argnames="cfg")
def forward(cfg, params, router_bias_LE, ids_BT, **places):
    return model.forward(cfg, params, router_bias_LE, ids_BT, **places)


def random_model(cfg):
    """Random parameters, norms and biases included, and selection biases."""
    noise = np.random.default_rng(0)
    params = jax.tree.map(
        lambda spec: jnp.asarray(0.3 * noise.normal(size=spec.shape) + (spec.kind == "norm"), jnp.float32),
        model.specs(cfg),
    )
    return params, jnp.asarray(0.2 * noise.normal(size=(cfg.router_rows, cfg.E)), jnp.float32)


@pytest.fixture(scope="module")
def weights():
    return random_model(CFG)


@pytest.fixture(scope="module")
def ids_BT():
    return np.random.default_rng(1).integers(0, CFG.V, (ROWS, LENGTH)).astype(np.int32)


# The specification, sections 1.3, 1.5 and 2, token by token and expert by expert, in float64.


def slow_norm(x, scale):
    return x / np.sqrt(np.mean(x * x) + CFG.norm_eps) * scale


def slow_rope(z, position):
    half = CFG.rotary // 2
    out = z.copy()
    for j in range(half):
        angle = position * CFG.rope_theta ** (-2 * j / CFG.rotary)
        out[j] = z[j] * np.cos(angle) - z[j + half] * np.sin(angle)
        out[j + half] = z[j + half] * np.cos(angle) + z[j] * np.sin(angle)
    return out


def slow_attention(p, n_TD):
    def heads(x, w, b, scale):
        z = np.einsum("d,dnh->nh", x, w) + b
        return z if scale is None else np.stack([slow_norm(head, scale) for head in z])

    b, g = p.qkv_bias, p.qk_norm
    q, k = (
        [[slow_rope(head, t) for head in heads(x, *of)] for t, x in enumerate(n_TD)]
        for of in ((p.q_DNH, b.q_NH, g.q_H), (p.k_DKH, b.k_KH, g.k_H))
    )
    v = [heads(x, p.v_DKH, b.v_KH, None) for x in n_TD]
    y_TD = np.zeros_like(n_TD)
    for t in range(len(n_TD)):
        for head in range(CFG.N):
            shared = head // CFG.G
            score = np.array([q[t][head] @ k[s][shared] / np.sqrt(CFG.H) for s in range(t + 1)])
            weight = np.exp(score - score.max()) / np.exp(score - score.max()).sum()
            y_TD[t] += sum(w * v[s][shared] for s, w in enumerate(weight)) @ p.o_NHD[head]
    return y_TD


def slow_mlp(x, gate, up, down):
    z = x @ gate
    return (z / (1 + np.exp(-z)) * (x @ up)) @ down


def slow_experts(p, bias_E, x):
    score_E = 1 / (1 + np.exp(-(x @ p.router_DE)))
    chosen = np.argsort(-(score_E + bias_E))[: CFG.A]
    total = sum(score_E[e] for e in chosen)
    y = slow_mlp(x, p.shared.gate_DM, p.shared.up_DM, p.shared.down_MD)
    for e in chosen:
        y = y + CFG.routed_scale * score_E[e] / total * slow_mlp(x, p.gate_EDM[e], p.up_EDM[e], p.down_EMD[e])
    return y


def slow_layer(p, bias_E, x_TD):
    x_TD = x_TD + slow_attention(p.attention, np.stack([slow_norm(x, p.attention_norm_D) for x in x_TD]))
    n_TD = [slow_norm(x, p.ffn_norm_D) for x in x_TD]
    if bias_E is None:
        return x_TD + np.stack([slow_mlp(n, p.ffn.gate_DF, p.ffn.up_DF, p.ffn.down_FD) for n in n_TD])
    return x_TD + np.stack([slow_experts(p.ffn, bias_E, n) for n in n_TD])


def slow_model(params, router_bias_LE, ids):
    """Logits of the next token, and from the MTP layer of the one after (at every position but the last)."""
    params = jax.tree.map(lambda w: np.asarray(w, np.float64), model.unstack(params))
    biases = [None] * CFG.dense_layers + list(np.asarray(router_bias_LE, np.float64))
    x_TD = params.embed_VD[ids]
    for layer, bias_E in zip((*params.dense, *params.moe), biases[:-1], strict=True):
        x_TD = slow_layer(layer, bias_E, x_TD)
    hidden_TD = np.stack([slow_norm(x, params.norm_D) for x in x_TD])
    p = params.mtp
    u_TD = np.stack([
        np.concatenate([slow_norm(params.embed_VD[following], p.embed_norm_D), slow_norm(h, p.hidden_norm_D)])
        for h, following in zip(hidden_TD[:-1], ids[1:], strict=True)
    ]) @ p.project_UD  # fmt: skip
    g_TD = slow_layer(p.block, biases[-1], u_TD)
    mtp_TD = np.stack([slow_norm(g, p.norm_D) for g in g_TD])
    return hidden_TD @ params.head_DV, mtp_TD @ params.head_DV


def test_equals_the_literal_reading(weights, ids_BT):
    params, router_bias_LE = weights
    next_BT = np.concatenate([ids_BT[:, 1:], np.zeros((ROWS, 1), np.int32)], axis=1)
    logits_BTV, aux = forward(CFG, params, router_bias_LE, ids_BT, next_ids_BT=next_BT)
    mtp_BTV = model.head(CFG, params, aux.mtp_hidden_BTD)
    for row in range(ROWS):
        want_TV, want_mtp_TV = slow_model(params, router_bias_LE, ids_BT[row])
        np.testing.assert_allclose(logits_BTV[row], want_TV, atol=3e-5 * want_TV.std())  # float32 through three layers
        np.testing.assert_allclose(mtp_BTV[row, :-1], want_mtp_TV, atol=3e-5 * want_mtp_TV.std())
    assert aux.load_LE.shape == (CFG.router_rows, CFG.E)
    assert (aux.load_LE.sum(axis=1) == ROWS * LENGTH * CFG.A).all()


def test_experts_that_are_given_are_taken(weights, ids_BT):
    params, router_bias_LE = weights
    logits_BTV, aux = forward(CFG, params, router_bias_LE, ids_BT)
    own_BTLA = np.moveaxis(np.asarray(aux.experts_LBTA), 0, 2)
    assert own_BTLA.shape == (ROWS, LENGTH, CFG.moe_layers, CFG.A)
    other_LE = router_bias_LE + np.arange(CFG.E, dtype=np.float32)  # chooses otherwise
    replayed_BTV, aux = forward(CFG, params, other_LE, ids_BT, experts_BTLA=own_BTLA)
    np.testing.assert_allclose(replayed_BTV, logits_BTV, atol=1e-5)
    np.testing.assert_array_equal(np.moveaxis(np.asarray(aux.experts_LBTA), 0, 2), own_BTLA)
    free_BTV, _ = forward(CFG, params, other_LE, ids_BT)
    assert np.abs(free_BTV - logits_BTV).max() > 1e-3
    unread_BTLA = np.full_like(own_BTLA, -1)
    np.testing.assert_array_equal(forward(CFG, params, other_LE, ids_BT, experts_BTLA=unread_BTLA)[0], free_BTV)


def test_a_later_token_changes_nothing_earlier(weights, ids_BT):
    params, router_bias_LE = weights
    before_BTV, _ = forward(CFG, params, router_bias_LE, ids_BT)
    for at in (1, 7, LENGTH - 1):
        changed_BT = ids_BT.copy()
        changed_BT[0, at] = (changed_BT[0, at] + 1) % CFG.V
        after_BTV, _ = forward(CFG, params, router_bias_LE, changed_BT)
        np.testing.assert_array_equal(before_BTV[0, :at], after_BTV[0, :at])
        np.testing.assert_array_equal(before_BTV[1], after_BTV[1])
        assert (before_BTV[0, at] != after_BTV[0, at]).any()


def test_documents_of_a_row_do_not_see_each_other(weights):
    params, router_bias_LE = weights
    ids_BT = np.random.default_rng(2).integers(0, CFG.V, (1, 16)).astype(np.int32)
    lengths = (5, 7, 3)  # and one slot of padding
    segments_BT = np.repeat([1, 2, 3, 0], [*lengths, 1])[None].astype(np.int32)
    positions_BT = np.concatenate([np.arange(n) for n in (*lengths, 1)])[None].astype(np.int32)
    packed = partial(forward, CFG, params, router_bias_LE, positions_BT=positions_BT, segments_BT=segments_BT)
    before_BTV, aux = packed(ids_BT)
    assert (aux.load_LE.sum(axis=1) == 15 * CFG.A).all()  # padding is counted nowhere
    changed_BT = ids_BT.copy()
    changed_BT[0, [6, 8, 15]] = (changed_BT[0, [6, 8, 15]] + 1) % CFG.V
    after_BTV, _ = packed(changed_BT)
    others = np.r_[:6, 12:15]
    np.testing.assert_array_equal(before_BTV[0, others], after_BTV[0, others])
    assert (before_BTV[0, 7] != after_BTV[0, 7]).any()
    alone_BTV, _ = forward(CFG, params, router_bias_LE, ids_BT[:, 5:12])
    np.testing.assert_allclose(before_BTV[0, 5:12], alone_BTV[0], atol=1e-5)


def test_more_tokens_than_a_cache_takes_are_refused(weights, ids_BT):
    with pytest.raises(ValueError, match="T=12 tokens do not fit a cache of capacity 11; give empty_cache at least 12"):
        model.forward(CFG, *weights, ids_BT[:, :12], cache=model.empty_cache(CFG, ROWS, 11))


@pytest.mark.parametrize("stacked", [True, False])
def test_decoding_over_the_cache_equals_the_whole_forward(weights, ids_BT, stacked):
    params, router_bias_LE = weights
    full_BTV, _ = forward(CFG, params, router_bias_LE, ids_BT)
    params = params if stacked else model.unstack(params)
    lengths = (5, 3)  # right-padded prompts: row 1 has two slots of padding, overwritten later
    segments_BT = (np.arange(5) < np.array(lengths)[:, None]).astype(np.int32)
    cache = model.empty_cache(CFG, ROWS, 16, stacked=stacked)
    logits_BTV, aux = forward(CFG, params, router_bias_LE, ids_BT[:, :5], segments_BT=segments_BT, cache=cache)
    got = [list(logits_BTV[row, : lengths[row]]) for row in range(ROWS)]
    at = np.array(lengths)
    for step in range(7):
        alive_B = np.array([True, step < 4])  # row 1 ends early, and must not disturb the other
        token_BT = np.take_along_axis(ids_BT, at[:, None], axis=1)
        logits_BTV, aux = forward(
            CFG, params, router_bias_LE, token_BT, segments_BT=alive_B[:, None].astype(np.int32), cache=aux.cache
        )
        for row in np.flatnonzero(alive_B):
            got[row].append(logits_BTV[row, 0])
        at += alive_B
    np.testing.assert_array_equal(aux.cache.length_B, [12, 7])
    for row in range(ROWS):
        np.testing.assert_allclose(np.stack(got[row]), full_BTV[row, : len(got[row])], atol=2e-5)


@pytest.mark.slow
def test_remat_and_scan_change_no_gradient(weights, ids_BT):
    params, router_bias_LE = weights

    def gradient(cfg, params):
        def total(params):
            logits_BTV, aux = model.forward(cfg, params, router_bias_LE, ids_BT, next_ids_BT=jnp.roll(ids_BT, -1, 1))
            mtp_BTV = model.head(cfg, params, aux.mtp_hidden_BTD)
            return jnp.mean(logits_BTV**2) + jnp.mean(mtp_BTV**2) + jnp.sum(aux.balance_L)

        return jax.jit(jax.grad(total))(params)

    def assert_close(got, want):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)

    plain = gradient(CFG, params)
    assert all(np.abs(z).max() > 0 for z in jax.tree.leaves(plain))  # every parameter is used
    assert_close(gradient(replace(CFG, remat="layer"), params), plain)
    assert_close(gradient(replace(CFG, remat="offload"), params), plain)
    assert_close(gradient(CFG, model.unstack(params)), model.unstack(plain))


def test_a_model_of_dense_layers_alone_and_one_of_experts_alone(ids_BT):
    for layers in (2, 0):
        cfg = replace(CFG, L=2, dense_layers=layers, mtp_layers=0)
        logits_BTV, aux = forward(cfg, *random_model(cfg), ids_BT)
        assert logits_BTV.shape == (ROWS, LENGTH, cfg.V)
        assert aux.load_LE.shape == (2 - layers, cfg.E) and aux.balance_L.shape == (2 - layers,)


def test_bfloat16_activations_follow_float32(weights, ids_BT):
    params, router_bias_LE = weights
    exact_BTV, _ = forward(CFG, params, router_bias_LE, ids_BT)
    logits_BTV, aux = forward(replace(CFG, dtype="bfloat16"), params, router_bias_LE, ids_BT)
    assert logits_BTV.dtype == jnp.float32 and aux.hidden_BTD.dtype == jnp.bfloat16
    assert aux.load_LE.dtype == aux.balance_L.dtype == jnp.float32
    error_BT = np.abs(logits_BTV - exact_BTV).max(-1) / exact_BTV.std()
    assert np.median(error_BT) < 0.1  # a token whose choice of experts tips may move further


@pytest.mark.slow
def test_the_flax_module_is_the_functions(ids_BT):
    module = model.GLMModule(CFG)
    variables = module.init(jax.random.key(0), ids_BT)
    params, router_bias_LE = variables["params"]["glm"], variables["router"]["bias_LE"]
    logits_BTV, aux = jax.jit(module.apply)(variables, ids_BT)
    want_BTV, want = forward(CFG, params, router_bias_LE, ids_BT)
    np.testing.assert_array_equal(logits_BTV, want_BTV)
    np.testing.assert_array_equal(aux.load_LE, want.load_LE)
