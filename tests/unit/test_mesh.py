"""Device meshes: sizes from a configuration, layouts from letters, and errors that say what would fit."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from experiments import recipes
from glm_jax import config, mesh, model
from glm_jax.config import ConfigError, replace
from glm_jax.parallel import pipeline
from glm_jax.spec import leaves

TINY = recipes.get("tiny").model


def abstract(data: int, fsdp: int, expert: int, context: int = 1, pipeline: int = 1, tensor: int = 1) -> AbstractMesh:
    return mesh.abstract(config.Mesh(data, fsdp, expert, context, pipeline, tensor))


def test_one_device_is_a_mesh_of_size_one():
    made = mesh.make(config.Mesh(), jax.devices()[:1])
    assert dict(made.shape) == {"data": 1, "pipeline": 1, "fsdp": 1, "context": 1, "expert": 1, "tensor": 1}
    assert set(made.axis_types) == {AxisType.Explicit}


@pytest.mark.parametrize("sizes", [{"data": 2}, {"fsdp": 3}, {"data": 2, "fsdp": 1, "expert": 2}])
def test_a_mesh_that_does_not_fit_says_what_would(sizes):
    with pytest.raises(ConfigError) as error:
        mesh.make(config.Mesh(**sizes), jax.devices()[:1])
    for name, size in sizes.items():
        assert f"{name}={size}" in str(error.value)
    assert "does not fit 1 devices; make the product 1, or set one size to -1" in str(error.value)


def test_experts_that_cannot_be_split():
    with pytest.raises(
        ConfigError, match=r"E=16 cannot be split over expert axis of 3; use a divisor of 16 for mesh.expert"
    ):
        mesh.check(abstract(1, 1, 3), model.specs(TINY), rows=3, length=256)


def test_width_that_cannot_be_split():
    with pytest.raises(
        ConfigError, match=r"D=128 cannot be split over fsdp axis of 3; use a divisor of 128 for mesh.fsdp"
    ):
        mesh.check(abstract(1, 3, 1), model.specs(TINY), rows=3, length=256)


def test_heads_that_cannot_be_split():
    with pytest.raises(
        ConfigError, match=r"k_DKH: K=2 cannot be split over tensor axis of 4; use a divisor of 2 for mesh.tensor"
    ):
        mesh.check(abstract(1, 1, 1, tensor=4), model.specs(TINY), rows=2, length=256)


def test_rows_that_cannot_be_split():
    with pytest.raises(ConfigError, match=r"B=6 rows cannot be split over 4 devices .* multiple of 4"):
        mesh.check(abstract(2, 2, 1), model.specs(TINY), rows=6, length=256)


def test_rows_of_tokens_that_cannot_be_split():
    with pytest.raises(
        ConfigError, match=r"T=258 tokens cannot be split over a context axis of 4, in 8 equal chunks; use a"
    ):
        mesh.check(abstract(1, 1, 2, 4), model.specs(TINY), rows=2, length=258)
    with pytest.raises(ConfigError, match=r"multiple of 8 tokens, or a divisor of 6 for mesh.context"):
        mesh.check(abstract(1, 1, 2, 4), model.specs(TINY), rows=2, length=12)


def test_rows_that_follow_each_other_through_no_pipeline():
    message = (
        r"B=24 rows, 3 of each device, cannot be split into 4 parts for each stage of mesh.pipeline=2; set microbatch_rows to a "
        r"multiple of 32, or model.microbatches_per_stage to a divisor of 3"
    )
    with pytest.raises(ConfigError, match=message):
        pipeline.check(abstract(1, 2, 2, pipeline=2), TINY, rows=24)
    pipeline.check(abstract(1, 2, 2, pipeline=2), TINY, rows=32)
    pipeline.check(abstract(1, 2, 2, pipeline=2), replace(TINY, microbatches_per_stage=3), rows=24)
    pipeline.check(abstract(1, 2, 2), TINY, rows=24)


def test_stages_without_layers():
    few = replace(TINY, L=4, dense_layers=1)
    with pytest.raises(ConfigError, match=r"3 MoE layers cannot be shared by mesh.pipeline=4 stages; use at most 3"):
        pipeline.check(abstract(1, 1, 1, pipeline=4), few, rows=16)


def test_rounds_without_layers():
    message = (
        r"4 MoE layers are not enough for each of mesh.pipeline=2 stages to have one in each of model.pipeline_rounds=3 rounds; "
        r"use at most 2 rounds"
    )
    with pytest.raises(ConfigError, match=message):
        pipeline.check(abstract(1, 1, 1, pipeline=2), replace(TINY, pipeline_rounds=3), rows=16)
    pipeline.check(abstract(1, 1, 1, pipeline=2), replace(TINY, pipeline_rounds=2), rows=16)
    pipeline.check(abstract(1, 1, 1), replace(TINY, pipeline_rounds=5), rows=16)
    with pytest.raises(ConfigError, match=r"pipeline_rounds=0 must be at least 1"):
        replace(TINY, pipeline_rounds=0)


def test_a_stage_has_its_layers_side_by_side(monkeypatch):
    monkeypatch.setattr(pipeline, "axis_size", lambda _: 2)
    assert pipeline.depth(13, rounds=3) == 12
    layers = jnp.arange(12)[:, None] * jnp.ones(3, jnp.int32)
    staged = pipeline.by_stage(layers, rounds=3)
    assert staged[:, 1].tolist() == [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]
    assert pipeline.by_layer(staged, rounds=3).tolist() == layers.tolist()


def test_sampling_does_not_split_rows_of_tokens():
    with (
        jax.sharding.use_abstract_mesh(abstract(1, 1, 1, 2)),
        pytest.raises(ConfigError, match=r"mesh.context=2 splits"),
    ):
        model.empty_cache(TINY, 2, 8)


def test_what_fits_passes():
    mesh.check(abstract(2, 2, 2), model.specs(TINY), rows=16, length=255)
    mesh.check(abstract(1, 64, 8), model.specs(recipes.get("glm45").model), rows=512, length=4096)
    mesh.check(abstract(1, 8, 8, 8), model.specs(recipes.get("glm45").model), rows=64, length=131_072)


def test_layouts_follow_the_letters():
    specs = model.specs(TINY)
    experts, router = specs.moe.ffn.gate_EDM, specs.moe.ffn.router_DE
    assert experts.dims == "LEDM"
    assert mesh.at_rest(experts) == P(None, "expert", ("fsdp", "context", "pipeline", "tensor"), None)
    # its own layers, no others
    assert mesh.in_stages(experts) == P("pipeline", "expert", ("fsdp", "context", "tensor"), None)
    assert mesh.in_use(experts) == P(None, "expert", None, "tensor")  # the fsdp shards have been gathered
    everything = ("fsdp", "context", "expert", "pipeline", "tensor")
    assert mesh.at_rest(router) == P(None, everything, None)  # its E does not follow the experts'
    assert mesh.at_rest(specs.head_DV) == P(None, ("expert", "tensor", "fsdp", "context", "pipeline"))
    assert mesh.in_use(specs.head_DV) == P(None, ("expert", "tensor"))  # a loss works on a share of the vocabulary
    assert mesh.at_rest(specs.embed_VD) == P(("expert", "tensor", "fsdp", "context", "pipeline"), None)
    assert mesh.in_use(specs.embed_VD) == P(("expert", "tensor"), None)  # and so does the look-up
    queries = model.specs(recipes.get("glm45").model).moe.attention
    assert mesh.at_rest(queries.q_DNH) == P(None, everything, None, None)
    assert mesh.in_use(queries.q_DNH) == P(None, None, "tensor", None)
    assert mesh.activation("BTNH") == P(("pipeline", "data", "fsdp", "expert"), "context", "tensor", None)
    assert mesh.activation("BTD") == P(("pipeline", "data", "fsdp", "expert"), "context", None)


def test_without_a_mesh_nothing_moves():
    x_BT = jnp.ones((2, 3))
    assert not mesh.active()
    assert mesh.axis_size("expert") == 1
    assert mesh.constrain(x_BT, "BT") is x_BT
    assert mesh.out_sharding("BT") is None

    def double(x_BT):
        return 2 * x_BT

    assert mesh.per_shard(double, ("BT",), "BT") is double


def test_every_recipe_fits_its_mesh_on_a_pod():
    for name in recipes.RECIPES:
        run = recipes.get(name)
        sizes = run.mesh.data, 8 if run.mesh.fsdp == -1 else run.mesh.fsdp, run.mesh.expert
        run = replace(run, **{"model.L": min(run.model.L, 8)})
        for stage in run.stages:
            mesh.check(abstract(*sizes), model.specs(run.model), stage.microbatch_rows * 8, stage.seq_len)


def test_copies_of_a_weight_sum_its_gradient_where_it_has_been_scattered():
    """Over data, which may be between slices: of every layer's matrix a device's shard, and never more."""
    cfg = config.Model(V=128, D=32, L=2, dense_layers=1, N=4, K=2, H=8, F=16, M=24, E=4, A=2, mtp_layers=0)
    sizes = config.Mesh(data=2, fsdp=2, expert=2)

    def gradient(params):
        params = jax.tree.map(mesh.rest, params, model.specs(cfg))
        ids_BT = jnp.zeros((8, 16), jnp.int32)
        return jax.grad(lambda p: model.forward(cfg, p, model.router_bias(cfg), ids_BT)[0].sum())(params)

    def local(spec, layout):
        shape = (
            n // math.prod(mesh.sizes_of(sizes)[z] for z in mesh.axes_of((axes,)))
            for n, axes in zip(spec.shape, layout, strict=True)
        )
        return ",".join(map(str, list(shape)[1:]))  # a layer at a time

    params, _ = jax.eval_shape(partial(model.init, cfg), jax.random.key(0))
    with jax.sharding.use_abstract_mesh(mesh.abstract(sizes)):
        text = str(jax.make_jaxpr(gradient)(params))
    summed = set(re.findall(r"\[([\d,]+)\]\S* = (?:unreduced_psum|psum_invariant)\[\s*axes=\('data'", text))
    matrices = [spec for _, spec in leaves(model.specs(cfg)) if spec.kind in ("matrix", "shared", "router")]
    assert {local(spec, mesh.at_rest(spec)) for spec in matrices} <= summed
    assert not {local(spec, mesh.in_use(spec)) for spec in matrices} & summed
