"""What the report's two models have and cost: spec 1.2 to the unit, and operations by plain arithmetic."""

import pytest

from experiments import recipes
from glm_jax import model, spec
from glm_jax.config import Model
from glm_jax.model import counts

SPEC = {
    "glm45": {
        "attention": 136_329_472, "expert": 23_592_960, "moe_layer": 3_935_625_632, "dense_layer": 325_083_392,
        "body": 351_245_931_424, "embedding": 775_946_240, "mtp_block": 3_935_625_632, "mtp_extras": 52_444_160,
        "kv_bytes": 376_832,
    },
    "air": {
        "attention": 109_066_240, "expert": 17_301_504, "moe_layer": 2_341_492_864, "dense_layer": 243_554_304,
        "body": 105_610_733_184, "embedding": 620_756_992, "mtp_block": 2_341_492_864, "mtp_extras": 33_566_720,
        "kv_bytes": 188_416,
    },
}  # fmt: skip
BILLIONS = {  # without embeddings, with MTP, checkpoint without MTP, with it and its copies, active
    "glm45": (351.246, 355.234, 352.798, 358.338, 32.08),
    "air": (105.611, 107.986, 106.852, 110.469, 12.18),
}


@pytest.mark.parametrize("name", SPEC)
def test_parameters_of_the_report(name):
    cfg, want = recipes.get(name).model, dict(SPEC[name])
    assert counts.kv_bytes_per_token(cfg) == want.pop("kv_bytes")
    found = counts.parameters(cfg)
    assert {row: getattr(found, row) for row in want} == want
    totals = found.without_embeddings, found.with_mtp, found.checkpoint, found.checkpoint_with_mtp
    *totals_wanted, active = BILLIONS[name]
    assert [round(n / 1e9, 3) for n in totals] == totals_wanted
    assert round(counts.active(cfg) / 1e9, 2) == active


SMALL = Model(V=48, D=16, L=3, dense_layers=1, N=4, K=2, H=8, F=20, M=12, E=6, A=2, shared_experts=2)


def test_counts_add_up_to_all_arrays():
    every = spec.count(model.specs(SMALL)) + model.router_bias_spec(SMALL).count
    found = counts.parameters(SMALL)
    assert found.checkpoint + found.mtp == every
    assert found.checkpoint_with_mtp == every + 2 * found.embedding


@pytest.mark.parametrize("changes", [{"dense_layers": 3}, {"dense_layers": 0}, {"mtp_layers": 0}])
def test_models_of_one_kind_of_layer_count_too(changes):
    cfg = Model(**{**vars(SMALL), **changes})
    found = counts.parameters(cfg)
    bias = cfg.router_rows * cfg.E
    assert found.checkpoint + found.mtp == spec.count(model.specs(cfg)) + bias


def test_operations_of_a_token():
    c, T = SMALL, 100
    attention = c.D * c.H * (2 * c.N + 2 * c.K) + 2 * c.N * c.H * (T + 1) / 2  # causal: half the row on average
    experts = 3 * c.D * c.M * (c.A + c.shared_experts) + c.D * c.E
    forward = 2 * (3 * attention + 3 * c.D * c.F + 2 * experts + c.D * c.V)
    assert counts.flops_per_token(c, T) == forward
    assert counts.flops_per_token(c, T, training=True) == 3 * forward
    mtp = 2 * (attention + experts + 2 * c.D * c.D + c.D * c.V)
    assert counts.flops_per_token(c, T, mtp=True) == forward + mtp


@pytest.mark.parametrize("name", ["glm45", "air"])
def test_pretraining_at_4k_has_its_own_rope_base(name):
    whole, short = recipes.get(name), recipes.get(f"{name}_4k")
    assert (whole.model.rope_theta, whole.model.max_positions) == (1e6, 131_072)
    assert (short.model.rope_theta, short.model.max_positions, short.midtrain) == (1e4, 4096, ())
    assert short.pretrain == whole.pretrain and {stage.rope_theta for stage in short.pretrain} == {1e4}
    assert {stage.rope_theta for stage in whole.midtrain} == {1e6}
