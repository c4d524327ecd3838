"""The planner of RL's update and of sampling: what they hold, compute and send, by arithmetic, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import recipes
from glm_jax import mesh, model, plan
from glm_jax.config import GRPO, ConfigError, Mesh, replace
from glm_jax.envs.task import Task
from glm_jax.model import counts
from glm_jax.plan import analytic, program, sampling
from glm_jax.plan.target import GIB
from glm_jax.rl.batch import microbatches
from glm_jax.rl.sample import Sample
from glm_jax.spec import leaves

POD = plan.target("v5p:8x8x8")
GLM45 = recipes.get("glm45")
WIDE = Mesh(fsdp=16, expert=32)


def test_grpo_holds_its_own_optimizer_and_leaves_the_mtp_layer_out():
    sizes = Mesh(fsdp=64, expert=8)
    train, grpo = (plan.check(GLM45, POD, sizes, 512, 4096, step) for step in ("train", "grpo"))
    state = [analytic.memory(work)["state (parameters, momentum)"] for work in (train, grpo)]
    assert state[1] == pytest.approx(1.5 * state[0], rel=0.02)  # AdamW's two moments beside the weights, Muon's one
    cfg, tokens = GLM45.model, 4096
    useful = [analytic.operations(work)["model"] for work in (train, grpo)]
    mtp = counts.flops_per_token(cfg, 4096, training=True, mtp=True) - counts.flops_per_token(cfg, 4096, training=True)
    assert useful[0] - useful[1] == pytest.approx(tokens * mtp)
    assert analytic.operations(grpo)["optimizer"] == 0
    without = plan.check(replace(GLM45, **{"model.mtp_layers": 0}), POD, sizes, 512, 4096, "grpo")
    assert analytic.traffic(grpo)["fsdp all-gather"] == pytest.approx(analytic.traffic(without)["fsdp all-gather"])


def test_the_planned_update_takes_what_rl_gives():
    run = recipes.get("smoke")
    settings = GRPO(max_new_tokens=4, max_tokens=16, seq_len=16, microbatch_rows=2)
    group = []
    for reward in (0.0, 1.0):
        sample = Sample(Task("reasoning", "", 1, 0, (), None, 1, None))
        sample.give([1, 2, 3])
        sample.draw([4, 5], [-1.0, -2.0])
        sample.took(np.zeros((4, run.model.moe_layers, run.model.A), np.int16))
        sample.end(reward, "solved" if reward else "wrong")
        group.append(sample)
    given = microbatches([group], settings, end=0)[0]
    with jax.set_mesh(mesh.make(Mesh(), jax.devices()[:1])):
        planned = program._batch(dataclasses.replace(analytic.work(run, Mesh(fsdp=1), 2, 16), step="grpo"))
    assert {name: (z.shape[1:], z.dtype) for name, z in planned.items()} == {
        name: (z.shape, z.dtype) for name, z in given.items()
    }


def test_sampling_holds_weights_in_use_and_the_cache():
    work = plan.check(GLM45, POD, WIDE, 512, 8192, "sample")
    held, cfg = sampling.memory(work), GLM45.model
    specs = [spec for name, spec in leaves(model.specs(cfg)) if not name.startswith("mtp")]
    experts = sum(spec.count for spec in specs if "E" in spec.batch)
    embedding = cfg.V * cfg.D
    others = sum(spec.count for spec in specs) - experts - embedding
    wide = sum(spec.count for spec in specs if spec.kind in ("router", "norm"))  # in float32
    assert held["weights in use"] == 2 * ((experts + embedding) / 32 + others + wide)
    assert held["cache"] == pytest.approx(8192 * 92 * 2 * 8 * 128 * 2, rel=0.01)  # one row of every layer


def test_a_turn_is_a_prefill_and_a_token_after_the_other():
    work = plan.check(GLM45, POD, WIDE, 512, 8192, "sample")
    assert sampling.runs(work) == {"prefill": 1, "decode": 4096}
    by = {name: dataclasses.replace(work, step=name) for name in sampling.runs(work)}
    cfg = GLM45.model
    for name, tokens, logits, attended in (("prefill", 4096, 1, 4097 / 2), ("decode", 1, 1, 4096 + 2048)):
        weights = tokens * counts.active(cfg) + logits * cfg.V * cfg.D
        attention = tokens * attended * 2 * 92 * 96 * 128
        assert sampling.operations(by[name])["model"] == pytest.approx(2 * (weights + attention), rel=1e-3)
        assert by[name].tokens == tokens  # 512 rows over 512 devices
    # the kernel's estimate counts all keys that the cache has room for
    assert [plan._attended(by[name], "attention_forward") for name in ("prefill", "decode")] == [0.5, 1]
    there, back = 89 * (5120 * 2 + 8 * 8), 89 * 5120 * 2
    one, whole = (sampling.traffic(by[name]) for name in ("decode", "prefill"))
    assert one["expert all-gather"] == pytest.approx(31 * (there + 4))  # what 31 other devices' tokens bring
    assert whole["expert all-gather"] == pytest.approx(4096 * 31 * 4)  # ids alone: a token goes to 7.1 of them
    assert whole["expert ragged-all-to-all"] == pytest.approx(4096 * 7.0931 * (there + back), rel=1e-4)


def test_programs_add_up_to_a_turn():
    work = plan.check(GLM45, POD, WIDE, 512, 64, "sample")
    program = {
        "args_gib": 1.0, "results_gib": 0.5, "temp_gib": 2.0, "peak_temp_gib": 1.5, "held_gib": 3.0,
        "fits": True, "compile_s": 10.0, "flops": 4.0,
        "flops_analytic": 4.0, "flops_by": {"xla": 4.0}, "flops_analytic_by": {"model": 4.0}, "mfu_bound": 0.5,
        "collectives": {"expert all-gather": {"bytes": 3.0, "minimum": 3.0}}, "largest": [{"gib": 1.0}],
        "roofline_s": {"compute": 1.0, "memory": 0.0, "network": 0.5},
    }  # fmt: skip
    decode = program | {
        "args_gib": 3.0,
        "held_gib": 4.5,
        "collectives": {},
        "mfu_bound": 0.1,
        "largest": [{"gib": 2.0}],
    }
    found = sampling.turn(work, {"prefill": program, "decode": decode | {"fits": False}})
    assert (found["args_gib"], found["temp_gib"], found["held_gib"]) == (3.0, 2.0, 4.5)
    assert (found["fits"], found["compile_s"]) == (False, 20.0)
    assert found["flops"] == 4 + 32 * 4
    assert found["collectives"] == {"expert all-gather": {"bytes": 3.0, "minimum": 3.0}}
    assert found["roofline_s"] == {"compute": 33.0, "memory": 0.0, "network": 16.5}
    assert found["mfu_bound"] == pytest.approx((0.5 + 32 * 0.1) / 33)
    assert found["tokens_per_second_bound"] == pytest.approx(512 * 32 / 33)
    assert [row["gib"] for row in found["largest"]] == [2.0, 1.0]


@pytest.mark.parametrize(
    ("sizes", "rows", "length", "told"),
    [
        (Mesh(fsdp=8, expert=32, context=2), 512, 8192, "mesh.context=2 splits rows of tokens"),
        (WIDE, 1536, 8192, "batch=1536: sampling is compiled for 512 times a power of two"),
        (WIDE, 512, 6000, "seq=6000: sampling is compiled for 32 times a power of two, half of a row being prompt; use 8192"),
        (Mesh(fsdp=64, expert=8), 512, 8192, "A wider expert axis fits by arithmetic: data=1, fsdp=32, context=1, expert=16"),
    ],
)  # fmt: skip
def test_what_cannot_be_sampled_is_refused(sizes, rows, length, told):
    with pytest.raises(ConfigError) as error:
        plan.check(GLM45, POD, sizes, rows, length, "sample")
    assert told in str(error.value)


def test_an_unknown_step_offers_the_nearest():
    with pytest.raises(ConfigError, match=r"step='smaple' is not .*; did you mean 'sample'\? known: train, grpo"):
        plan.check(GLM45, POD, WIDE, 512, 8192, "smaple")


def test_a_state_that_grpo_cannot_hold_is_refused_with_the_way_out():
    with pytest.raises(ConfigError, match=r"plan cannot fit.*what overflows is state"):
        plan.check(GLM45, plan.target("v5p:2x4x4"), Mesh(fsdp=4, expert=8), 32, 4096, "grpo")
    assert sum(analytic.memory(plan.check(GLM45, POD, WIDE, 512, 4096, "grpo")).values()) / GIB < 95
