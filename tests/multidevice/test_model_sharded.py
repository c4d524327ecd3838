"""The model on eight devices that the CPU pretends to have against one: loss, gradients, text, and what the router may do
at worst. Runs in a process of its own, since a process fixes its devices once."""

import os
from functools import partial

import fake_devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax import mesh, model
from glm_jax.config import Mesh, Model, replace
from glm_jax.parallel import expert
from glm_jax.parallel.context import zigzag
from glm_jax.sample.engine import Sampling, generate
from glm_jax.train import step

CFG = Model(
    V=64, D=16, L=3, dense_layers=1, N=4, K=2, H=8, F=24, M=12, E=8, A=2, max_positions=64, rope_theta=1e4,
    dtype="float32", remat="layer",
)  # fmt: skip
DEEP = replace(CFG, L=10)  # of nine MoE layers the stages have eight
ROWS, LENGTH = 8, 16


@pytest.mark.slow
def test_eight_devices_compute_what_one_does():
    fake_devices.run(__file__)


def packed_batch(rows=ROWS):
    """Random tokens in rows of two documents each, some with padding behind."""
    random = np.random.default_rng(0)
    ids_BT, targets_BT, mtp_targets_BT = random.integers(0, CFG.V, (3, rows, LENGTH)).astype(np.int32)
    split_B1, end_B1 = random.integers(3, 8, (rows, 1)), random.integers(10, LENGTH + 1, (rows, 1))
    at_T = np.arange(LENGTH)
    segments_BT = ((1 + (at_T >= split_B1)) * (at_T < end_B1)).astype(np.int32)
    positions_BT = (at_T - np.where(segments_BT == 2, split_B1, 0)).astype(np.int32)
    weights_BT = (segments_BT > 0).astype(np.float32)
    return {
        "ids": ids_BT, "targets": targets_BT, "mtp_targets": mtp_targets_BT, "positions": positions_BT,
        "segments": segments_BT, "weights": weights_BT, "mtp_weights": weights_BT * (at_T % 3 > 0),
    }  # fmt: skip


def random_model(cfg=CFG):
    noise = np.random.default_rng(1)
    params = jax.tree.map(
        lambda spec: (0.3 * noise.normal(size=spec.shape) + (spec.kind == "norm")).astype(np.float32), model.specs(cfg)
    )
    return params, (0.2 * noise.normal(size=(cfg.router_rows, cfg.E))).astype(np.float32)


@partial(jax.jit, static_argnames="cfg")  # compiled once for a mesh and a dispatch
def loss_and_gradient(params, router_bias_LE, batch, cfg=CFG):
    totals = {name: batch[name].sum() for name in ("weights", "mtp_weights")}
    totals |= {"microbatches": 1.0, "sequence_balance": 0.1}
    return jax.value_and_grad(step.loss_fn, has_aux=True)(params, cfg, router_bias_LE, batch, 0.3, totals)


def check_loss_and_gradient(there, favour_E=(0.0,) * CFG.E, cfg=CFG, rows=ROWS, **changes):
    """`favour_E` is added to the balance bias; `changes` are those of `cfg` on the mesh."""
    params, router_bias_LE = random_model(cfg)
    router_bias_LE += np.array(favour_E, np.float32)
    batch = packed_batch(rows)
    (loss, metrics), gradient = loss_and_gradient(params, router_bias_LE, batch, cfg)
    with jax.set_mesh(there):
        layout = mesh.shardings(there, model.specs(cfg))
        placed = jax.device_put(params, layout), router_bias_LE, mesh.placed(zigzag(batch, dim=1))
        (sharded_loss, sharded_metrics), sharded = loss_and_gradient(*placed, replace(cfg, **changes))
    np.testing.assert_allclose(sharded_loss, loss, rtol=1e-5)
    real = (batch["segments"] > 0).sum()
    np.testing.assert_array_equal(metrics["load_LE"].sum(axis=1), CFG.A * real)  # no choice is dropped
    for one, load_L in zip(favour_E, np.asarray(metrics["load_LE"]).T, strict=True):
        assert one == 0 or (load_L == (real if one > 0 else 0)).all()
    np.testing.assert_array_equal(sharded_metrics["load_LE"], metrics["load_LE"])
    for (path, want), got, where in zip(
        jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(sharded), jax.tree.leaves(layout), strict=True
    ):
        assert got.sharding.is_equivalent_to(where, got.ndim), path  # a gradient lies where its weight does
        error = np.linalg.norm(np.asarray(got) - want) / max(np.linalg.norm(want), 1e-9)
        assert error < 1e-5, (path, error)


def check_extremes(there, dispatch):
    """All tokens at one expert; all tokens at the experts of one device; E/A experts idle. Also where tokens go in chunks."""
    one, few, idle = np.zeros((3, CFG.E))
    one[3], few[:2], idle[:: CFG.A] = 100, 100, -100
    assert (idle < 0).sum() == CFG.E / CFG.A
    for favour_E in (one, few, idle):
        check_loss_and_gradient(there, favour_E, dispatch=dispatch)


def check_text(there):
    params, router_bias_LE = random_model()
    prompts = np.random.default_rng(2).integers(0, CFG.V, (5, 7)).tolist()  # fewer rows than devices
    settings = Sampling(temperature=0.8, top_p=0.9, max_new_tokens=10)
    told = []
    want = generate(CFG, jax.tree.map(jnp.asarray, params), router_bias_LE, prompts, settings=settings)
    with jax.set_mesh(there):
        placed = jax.device_put(params, mesh.shardings(there, model.specs(CFG)))
        got = generate(
            CFG, placed, router_bias_LE, prompts, settings=settings, on_token=lambda *token: told.append(token)
        )
    assert len(told) == 50
    assert [completion.ids for completion in got] == [completion.ids for completion in want]


if __name__ == "__main__":
    eight = mesh.make(Mesh(data=2, fsdp=2, expert=2))
    for mesh_of_eight in (eight, mesh.make(Mesh(fsdp=2, expert=2, context=2)), mesh.make(Mesh(expert=2, context=4))):
        check_loss_and_gradient(mesh_of_eight)
    check_loss_and_gradient(mesh.make(Mesh(fsdp=2, expert=4)), dispatch="ragged")
    check_extremes(mesh.make(Mesh(fsdp=1, expert=8)), "ragged")
    pipelines = [(Mesh(pipeline=2, fsdp=2, expert=2), 2)]  # twice as many parts as stages: what comes back waits
    if "ALL_MESHES" in os.environ:  # as many: it goes on at once
        pipelines += [(Mesh(pipeline=2, fsdp=2, expert=2), 1), (Mesh(pipeline=4, fsdp=2), 2)]
    for sizes, most in pipelines:
        changes = {"pipeline_rounds": 2, "microbatches_per_stage": most}
        check_loss_and_gradient(mesh.make(sizes), cfg=DEEP, rows=16, **changes)
    check_text(eight)
    expert.ROUTED_ROWS["cpu"] = 16  # half of what a device has
    for sizes in (Mesh(data=2, fsdp=1, expert=4), Mesh(fsdp=1, expert=4, context=2)):
        check_extremes(mesh.make(sizes), "gather")
    check_extremes(mesh.make(Mesh(fsdp=1, expert=4, context=2)), "ragged")
