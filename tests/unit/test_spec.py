"""Declarations of weights: the report's parameter counts, shapes, initial values, and mistakes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import recipes
from glm_jax import model, spec
from glm_jax.config import ConfigError, Model

# Exact arithmetic from the report's hyper-parameters (spec 1.2).
COUNTS = {
    "glm45": {
        "attention": 136_329_472, "expert": 23_592_960, "moe": 3_935_625_632, "dense": 325_083_392,
        "body": 351_245_931_424, "embedding": 775_946_240, "mtp_extras": 52_444_160, "active": 32.08,
    },
    "air": {
        "attention": 109_066_240, "expert": 17_301_504, "moe": 2_341_492_864, "dense": 243_554_304,
        "body": 105_610_733_184, "embedding": 620_756_992, "mtp_extras": 33_566_720, "active": 12.18,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_of_the_report(name):
    cfg, want = recipes.get(name).model, COUNTS[name]
    specs = model.specs(cfg)
    moe_layer = spec.count(specs.moe) // cfg.moe_layers
    expert = sum(getattr(specs.moe.ffn, w).count for w in ("gate_EDM", "up_EDM", "down_EMD")) // cfg.moe_layers // cfg.E
    assert spec.count(specs.moe.attention) // cfg.moe_layers == want["attention"]
    assert expert == want["expert"]
    assert moe_layer + cfg.E == want["moe"]  # with the router's bias, which is no parameter here
    assert spec.count(specs.dense) // cfg.dense_layers == want["dense"]
    assert spec.count(specs.dense) + spec.count(specs.moe) + cfg.moe_layers * cfg.E == want["body"]
    assert specs.embed_VD.count == specs.head_DV.count == want["embedding"]
    assert spec.count(specs.mtp) - spec.count(specs.mtp.block) == want["mtp_extras"]
    body = want["body"] + cfg.D
    active = body - cfg.moe_layers * (cfg.E - cfg.A) * expert
    assert active / 1e9 == pytest.approx(want["active"], abs=0.005)
    with_mtp = body + want["moe"] + want["mtp_extras"]
    assert with_mtp / 1e9 == pytest.approx({"glm45": 355.234, "air": 107.986}[name], abs=5e-4)


def test_tiny_is_as_small_as_it_says():
    assert 1.5e6 < spec.count(model.specs(recipes.get("tiny").model)) < 3.5e6


CFG = Model(V=48, D=16, L=3, dense_layers=1, N=4, K=2, H=8, F=20, M=12, E=6, A=2, shared_experts=2, dtype="float32")
init = jax.jit(model.init, static_argnums=0)  # compiled as one


def test_arrays_have_the_declared_shapes_and_first_values():
    specs = model.specs(CFG)
    params, router_bias_LE = init(CFG, jax.random.key(0))
    assert jax.tree.map(lambda w: w.shape, params) == jax.tree.map(lambda s: s.shape, specs)
    assert specs.moe.ffn.shared.gate_DM.shape == (2, 16, 24)  # shared experts side by side: M times their number
    assert specs.moe.attention.q_DNH.dims == "LDNH"
    assert router_bias_LE.shape == (3, 6) and router_bias_LE.dtype == jnp.float32  # two MoE layers and the MTP layer
    for (name, declared), w in zip(spec.leaves(specs), jax.tree.leaves(params), strict=True):
        if declared.kind in ("norm", "bias"):
            assert (w == (declared.kind == "norm")).all(), name
        else:
            assert np.std(w) == pytest.approx(CFG.init_std, rel=0.5), name


def test_a_weight_starts_the_same_whatever_else_is_there():
    whole, _ = init(CFG, jax.random.key(0))
    less, _ = init(Model(**{**vars(CFG), "qk_norm": False, "mtp_layers": 0}), jax.random.key(0))
    np.testing.assert_array_equal(whole.moe.ffn.gate_EDM, less.moe.ffn.gate_EDM)
    np.testing.assert_array_equal(whole.head_DV, less.head_DV)
    assert less.mtp is None and less.moe.attention.qk_norm is None
    other, _ = init(CFG, jax.random.key(1))
    assert (whole.head_DV != other.head_DV).any()
    assert np.abs(np.corrcoef(whole.moe.ffn.gate_EDM.ravel(), whole.moe.ffn.up_EDM.ravel())[0, 1]) < 0.3


def test_a_declaration_reads_as_batch_in_out():
    declared = spec.weight("E | D -> M").metadata["spec"].resolve(CFG, 5)
    assert (declared.batch, declared.ins, declared.outs) == ("LE", "D", "M")
    assert declared.shape == (5, 6, 16, 12) and declared.count == 5 * 6 * 16 * 12
    assert [name for name, _ in spec.leaves(model.specs(CFG))][:2] == ["embed_VD", "dense.attention_norm_D"]


def test_unknown_letters_are_named():
    with pytest.raises(ValueError, match="'Z'"):
        spec.weight("Z -> M")
    with pytest.raises(ConfigError, match="'T' is not a model size"):
        spec.weight("T -> M").metadata["spec"].resolve(CFG, None)
