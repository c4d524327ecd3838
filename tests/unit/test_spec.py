"""Declarations of weights: the report's parameter counts, shapes, initial values, and mistakes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import recipes
from glm_jax import model, spec
from glm_jax.config import ConfigError, Model


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
    with pytest.raises(ValueError, match="'Y'"):
        spec.weight("Y -> M")
    with pytest.raises(ConfigError, match="'T' is not a model size"):
        spec.weight("T -> M").metadata["spec"].resolve(CFG, None)
