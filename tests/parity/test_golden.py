"""The model against what transformers computed (`make_golden.py` beside this), where no torch is needed."""

import jax
import make_golden as golden
import numpy as np
import pytest
import random_models as make

from glm_jax import model
from glm_jax.train.step import loss_fn


def kept(seed):
    cfg = make.configuration(seed, mtp_layers=0)
    with np.load(golden.FOLDER / f"glm4_moe_{seed}.npz") as there:
        return cfg, *make.weights(cfg, seed), make.batch(cfg, seed), dict(there)


@pytest.mark.parametrize(
    "seed", [golden.SEEDS[0], *(pytest.param(seed, marks=pytest.mark.slow) for seed in golden.SEEDS[1:])]
)
def test_logits(seed):
    cfg, params, router_bias_LE, rows, there = kept(seed)
    run = jax.jit(
        lambda p, ids, positions, segments: model.forward(
            cfg, p, router_bias_LE, ids, positions_BT=positions, segments_BT=segments
        )
    )
    ours = np.asarray(run(params, **rows)[0])[rows["segments"] > 0]
    np.testing.assert_allclose(ours, there["logits"], rtol=0, atol=2e-5 * there["logits"].std())


@pytest.mark.slow
@pytest.mark.parametrize("seed", golden.SEEDS)
def test_loss_and_gradient(seed):
    cfg, params, router_bias_LE, rows, there = kept(seed)
    batch = make.training_batch(rows, main=True, mtp=False)
    totals = {"weights": batch["weights"].sum(), "mtp_weights": 0.0, "microbatches": 1.0, "sequence_balance": 0.0}
    run = jax.jit(jax.value_and_grad(lambda p: loss_fn(p, cfg, router_bias_LE, batch, 0.0, totals)[0]))
    loss, gradient = run(params)
    np.testing.assert_allclose(loss, there["loss"], rtol=1e-5)
    for (path, ours), theirs in zip(golden.sketch(gradient).items(), there["gradient"], strict=True):
        off = np.sqrt(np.mean((ours - theirs)[1:] ** 2))  # on average the size of the difference
        assert off < 1e-4 * theirs[0], (path, off / theirs[0])
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-4, err_msg=path)
