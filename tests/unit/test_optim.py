import dataclasses
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import recipes
from glm_jax import model, optim
from glm_jax.config import ConfigError, Optim, Stage, replace
from glm_jax.spec import Spec, leaves

TRILLION = 10**12
SPECS = {
    "embed_VD": Spec("", "V", "D", "embedding"),
    "q_DNH": Spec("", "D", "NH", "matrix"),
    "router_DE": Spec("", "D", "E", "router"),
    "head_DV": Spec("", "D", "V", "head"),
    "bias_NH": Spec("", "", "NH", "bias"),
    "norm_D": Spec("", "", "D", "norm"),
}
SIZES = {"V": 24, "D": 8, "N": 2, "H": 4, "E": 6}


def _arrays(seed):
    keys = jax.random.split(jax.random.key(seed), len(SPECS))
    return {
        name: jax.random.normal(key, [SIZES[letter] for letter in spec.dims])
        for key, (name, spec) in zip(keys, SPECS.items(), strict=True)
    }


def _train(tx, params, *, lr, steps=3, descend=True):
    opt, update = tx.init(params), jax.jit(tx.update)
    for i in range(steps):
        change, opt = update(_arrays(i + 1), opt, params)
        params = jax.tree.map(lambda w, d: w - lr * d if descend else w + d, params, change)
    return params


def _glm45():
    return recipes.get("glm45")


# --- optimizer


@pytest.mark.parametrize(
    ("cfg", "muon"),
    [
        (Optim(), {"q_DNH", "router_DE", "head_DV"}),
        (Optim(lm_head="adamw"), {"q_DNH", "router_DE"}),
        (Optim(router="adamw"), {"q_DNH", "head_DV"}),
        (Optim(name="adamw"), set()),
    ],
)
def test_what_muon_does_not_own_follows_optax_adamw(cfg, muon):
    cfg = dataclasses.replace(cfg, ns_dtype="float32", clip_norm=math.inf)
    params, lr = _arrays(0), 1e-2
    ours = _train(optim.optimizer(cfg, SPECS), params, lr=lr)
    mask = {name: spec.kind not in ("norm", "bias") for name, spec in SPECS.items()}
    theirs = _train(optax.adamw(lr, 0.9, 0.95, 1e-8, weight_decay=0.1, mask=mask), params, lr=lr, descend=False)
    for name in SPECS:
        same = np.allclose(ours[name], theirs[name], rtol=1e-6, atol=1e-7)  # one rounding of lr * direction
        assert same == (name not in muon), name


def test_every_matrix_of_the_model_goes_to_muon_and_nothing_else_does():
    owners = {name: optim.owner(Optim(), spec) for name, spec in leaves(model.specs(_glm45().model))}
    adamw = {name for name, owner in owners.items() if owner == "adamw"}
    assert {name for name in adamw if "bias" not in name and "norm" not in name} == {"embed_VD"}
    assert {"head_DV", "moe.ffn.router_DE", "mtp.project_UD", "moe.ffn.shared.gate_DM"} <= set(owners) - adamw


def test_muon_keeps_no_momentum_for_what_it_leaves_alone_and_has_never_heard_of_the_balance_bias():
    specs = model.specs(_glm45().model)
    assert not [name for name, _ in leaves(specs) if "router_bias" in name]
    opt = jax.eval_shape(optim.optimizer(Optim(), SPECS).init, _arrays(0))
    held = {name for name, m in optax.tree.get(opt, "momentum").items() if not isinstance(m, optax.MaskedNode)}
    assert held == {"q_DNH", "router_DE", "head_DV"}


def test_polish_reaches_the_optimizer_and_none_of_it_is_muon_as_published():
    params, grads = _arrays(0), _arrays(1)
    rms = []
    for polish in (0, 2):
        tx = optim.optimizer(Optim(ns_polish=polish, ns_dtype="float32", weight_decay=0.0), SPECS)
        direction, _ = jax.jit(tx.update)(grads, tx.init(params), params)
        rms.append([float(jnp.sqrt(jnp.mean(direction[name] ** 2))) for name in ("q_DNH", "head_DV")])
    assert rms[1] == pytest.approx([0.2, 0.2], rel=0.01)
    assert rms[0] != pytest.approx([0.2, 0.2], rel=0.03)
    with pytest.raises(ConfigError, match="ns_polish=-1 must be at least 0"):
        Optim(ns_polish=-1)
    with pytest.raises(ConfigError, match="set ns_dtype to float16 or float32"):
        Optim(ns_gram=True, ns_dtype="bfloat16")


def test_the_published_models_train_with_updates_of_rms_0_2():
    """As their recipes set it, in bfloat16: a square matrix, and a stack of layers whose matrices are 1 to 8."""
    specs = {"w_DF": Spec("", "D", "F", "matrix"), "w_LDF": Spec("L", "D", "F", "matrix")}
    keys = dict(zip(specs, jax.random.split(jax.random.key(1), 2), strict=True))
    grads = {"w_DF": jax.random.normal(keys["w_DF"], (64, 64)), "w_LDF": jax.random.normal(keys["w_LDF"], (2, 64, 512))}
    tx = optim.optimizer(dataclasses.replace(_glm45().optim, weight_decay=0.0), specs)
    update, _ = jax.jit(tx.update)(grads, tx.init(grads), grads)
    for name, d in update.items():
        rms = jnp.sqrt(jnp.mean(jnp.square(d), axis=(-2, -1)))
        np.testing.assert_allclose(rms, 0.2, rtol=0.03, err_msg=name)


def test_the_learning_rate_multiplies_weight_decay_and_norms_and_biases_have_none():
    zeros = jax.tree.map(jnp.zeros_like, _arrays(0))
    for everywhere, name in ((False, "muon"), (True, "adamw")):
        tx = optim.optimizer(Optim(name=name, decay_norms_and_biases=everywhere), SPECS)
        direction, _ = jax.jit(tx.update)(zeros, tx.init(_arrays(0)), _arrays(0))
        for name, spec in SPECS.items():
            rate = 0.1 if everywhere or spec.kind not in ("norm", "bias") else 0.0
            np.testing.assert_allclose(direction[name], rate * _arrays(0)[name], rtol=1e-6)


def test_clipping_is_by_the_norm_of_all_gradients_together():
    grads = _arrays(1)
    moved = []
    for limit in (1.0, math.inf):
        tx = optim.optimizer(Optim(clip_norm=limit), SPECS)
        _, opt = jax.jit(tx.update)(grads, tx.init(grads), grads)
        moved.append(optax.tree.get(opt, "momentum")["q_DNH"])
    np.testing.assert_allclose(moved[0] * optax.tree.norm(grads), moved[1], rtol=1e-5)


def test_momentum_is_float32_for_bfloat16_parameters():
    tx = optim.optimizer(Optim(), SPECS)
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), _arrays(0))
    direction, opt = jax.jit(tx.update)(half, jax.jit(tx.init)(half), half)
    assert optax.tree.get(opt, "momentum")["q_DNH"].dtype == jnp.float32
    assert direction["q_DNH"].dtype == jnp.float32


def test_momentum_kept_in_bfloat16_is_rounded_once_a_step():
    params, grads = _arrays(0), _arrays(1)
    kept = {}
    for dtype in ("float32", "bfloat16"):
        tx = optim.optimizer(Optim(momentum_dtype=dtype, clip_norm=math.inf), SPECS)
        opt, update = tx.init(params), jax.jit(tx.update)
        for _ in range(2):
            _, opt = update(grads, opt, params)
        kept[dtype] = optax.tree.get(opt, "momentum")["q_DNH"]
        assert kept[dtype].dtype == dtype
    np.testing.assert_allclose(kept["bfloat16"].astype(jnp.float32), kept["float32"], rtol=2**-7)
    assert np.any(kept["bfloat16"].astype(jnp.float32) != kept["float32"])


def test_muon_takes_an_optax_schedule_and_returns_updates_to_add():
    cfg = Optim(ns_dtype="float32")
    directions, full = optim.optimizer(cfg, SPECS), optim.muon(optax.constant_schedule(0.5), SPECS, cfg)
    params, grads = _arrays(0), _arrays(1)
    d, _ = jax.jit(directions.update)(grads, directions.init(params), params)
    u, _ = jax.jit(full.update)(grads, full.init(params), params)
    for name in SPECS:
        np.testing.assert_allclose(u[name], -0.5 * d[name], rtol=1e-6, atol=1e-8)


# --- schedule


def test_learning_rate_at_the_stage_boundaries_of_the_report():
    run = _glm45()
    assert run.total_tokens == 23_100_000_000_000
    # spec 4.4, to the digits it gives
    assert f"{optim.scheduled(run, 15 * TRILLION).lr:.2e}" == "8.66e-05"
    assert f"{optim.scheduled(run, 22 * TRILLION).lr:.2e}" == "2.63e-05"
    assert optim.scheduled(run, 0).lr == 0.0
    assert optim.scheduled(run, run.schedule.warmup_tokens // 2).lr == pytest.approx(1.25e-4)
    assert optim.scheduled(run, run.schedule.warmup_tokens).lr == pytest.approx(2.5e-4, rel=1e-4)
    assert optim.scheduled(run, run.total_tokens).lr == pytest.approx(2.5e-5)


def test_wsd_is_flat_then_falls_in_a_line():
    run = replace(_glm45(), **{"schedule.kind": "wsd"})
    total = run.total_tokens
    flat = [optim.scheduled(run, t).lr for t in (run.schedule.warmup_tokens, TRILLION, total * 9 // 10)]
    assert flat == pytest.approx([2.5e-4] * 3)
    assert optim.scheduled(run, total * 95 // 100).lr == pytest.approx((2.5e-4 + 2.5e-5) / 2)
    assert optim.scheduled(run, total).lr == pytest.approx(2.5e-5)


def test_weights_switch_and_balancing_freezes_exactly_at_their_token():
    run, at = _glm45(), 15 * TRILLION
    before, after = optim.scheduled(run, at - 1), optim.scheduled(run, at)
    assert (before.mtp_weight, before.bias_rate) == (0.3, 1e-3)
    assert (after.mtp_weight, after.bias_rate) == (0.1, 0.0)
    assert optim.steps(run, "stage1")[-1].mtp_weight == 0.3
    assert optim.steps(run, "stage2")[0].mtp_weight == 0.1


def test_batch_ramps_in_multiples_of_the_microbatch():
    ramp = optim.steps(_glm45(), "stage1")[:20_000:25]
    sizes = [step.tokens for step in ramp]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (2**24, 2**26)
    for step in ramp:
        line = 2**24 + (2**26 - 2**24) * min(step.tokens_before, 500 * 10**9) // (500 * 10**9)
        assert step.tokens % 2**21 == 0
        assert 0 <= line - step.tokens < 2**21


def test_glm45_takes_about_350_500_steps():
    run = _glm45()
    total = sum(len(optim.steps(run, stage)) for stage in run.stages)
    assert total == pytest.approx(350_500, rel=2e-3)  # rounding the ramp down adds a few hundred
    last = optim.steps(run, "long_context")[-1]
    assert last.index == total - 1
    assert run.total_tokens - (last.tokens_before + last.tokens) < run.stages[-1].microbatch_tokens


@pytest.mark.parametrize("name", ["tiny", "smoke", "uneven", "constant"])
def test_the_plan_of_a_stage_is_the_schedule_walked_step_by_step(name):
    run = recipes.get("tiny" if name in ("uneven", "constant") else name)
    if name == "uneven":  # stages that are no multiple of a step, a ramp that ends inside the second, a fine microbatch
        run = replace(
            run, **{"pretrain.0.tokens": 1_000_001, "pretrain.1.microbatch_rows": 2, "midtrain.0.microbatch_rows": 1,
                    "schedule.batch_ramp_tokens": 1_700_000, "schedule.batch_tokens": 4096 * 5}
        )  # fmt: skip
    if name == "constant":
        run = replace(run, **{"schedule.batch_tokens_start": 4096, "schedule.batch_ramp_tokens": 0})
    index = 0
    for stage in run.stages:
        plan, unit = optim.steps(run, stage), stage.microbatch_tokens
        first, walked, s = 0, [], run.schedule
        while first < stage.tokens // unit:
            tokens_before = run.tokens_before(stage.name) + first * unit
            now = optim.scheduled(run, tokens_before)
            ramped = min(1, Fraction(tokens_before, s.batch_ramp_tokens)) if s.batch_ramp_tokens else 1
            batch = s.batch_tokens_start + math.floor((s.batch_tokens - s.batch_tokens_start) * ramped)
            count = min(batch // unit, stage.tokens // unit - first)
            step = optim.Step(index, tokens_before, first, count, count * unit, now.lr, now.mtp_weight, now.bias_rate)
            walked.append(step)
            first, index = first + count, index + 1
        assert list(plan) == walked
        assert (plan[1:3], plan[::-2]) == (walked[1:3], walked[::-2])
        assert (len(plan), plan.first, plan[-1]) == (len(walked), walked[0].index, walked[-1])
        assert list(plan.since(walked[3].index)) == walked[3:]
        assert list(plan.since(index)) == []
        with pytest.raises(IndexError):
            plan[len(plan)]


def test_a_stage_shorter_than_a_microbatch_still_takes_one_step():
    run = replace(recipes.get("tiny"), midtrain=(Stage("short", 100, 1024, 1e6, microbatch_rows=4),))
    assert [step.microbatches for step in optim.steps(run, "short")] == [1]


def test_an_unknown_stage_is_met_with_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean 'midtrain'"):
        optim.steps(recipes.get("tiny"), "midtrian")


# --- balance


def test_balance_moves_each_bias_towards_the_mean_load():
    load_LE = jnp.array([[4, 0, 2, 2], [0, 0, 0, 0], [1, 0, 0, 0]])
    bias_LE = jnp.full((3, 4), 0.5)
    moved = optim.balance(bias_LE, load_LE, 0.1)
    np.testing.assert_allclose(moved, [[0.4, 0.6, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5], [0.4, 0.6, 0.6, 0.6]], rtol=1e-6)
    assert moved.dtype == jnp.float32
    np.testing.assert_array_equal(optim.balance(bias_LE, load_LE, 0.0), bias_LE)
