"""Training on eight fake devices against one: the same losses, step by step. In a process of its own."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

STEPS = 5


@pytest.mark.slow
def test_eight_devices_train_as_one():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, __file__], env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def losses(sizes: tuple[int, int, int]) -> list[float]:
    """Losses of a few steps of Muon, float32 throughout, no warm-up, two microbatches, the balance bias moving."""
    from glm_jax import config, mesh, model
    from glm_jax.optim import optimizer
    from glm_jax.train import state
    from glm_jax.train.step import Knobs, train_step

    cfg = config.Model(
        V=64, D=32, L=3, dense_layers=1, N=4, K=2, H=8, F=32, M=16, E=8, A=2, dtype="float32", max_positions=64
    )
    tx = optimizer(config.Optim(ns_dtype="float32"), model.specs(cfg))
    text = np.random.default_rng(0).zipf(1.5, (2, 8, 18)).clip(max=cfg.V - 1).astype(np.int32)
    ids, ones = text[..., :16], np.ones((2, 8, 16), np.float32)
    batch = {"ids": ids, "targets": text[..., 1:17], "mtp_targets": text[..., 2:], "weights": ones, "mtp_weights": ones}
    batch |= {"positions": np.broadcast_to(np.arange(16, dtype=np.int32), ids.shape), "segments": ones.astype(np.int32)}
    knobs = Knobs(*np.float32([1e-2, 0.3, 1e-2]), microbatches=np.int32(2))
    here = mesh.make(config.Mesh(*sizes), jax.devices()[: int(np.prod(sizes))])
    with jax.set_mesh(here):
        batch = {name: jax.device_put(z, mesh.batch_sharding(here)) for name, z in batch.items()}
        now, seen = state.create(cfg, tx, 0), []
        for _ in range(STEPS):
            now, metrics = train_step(now, batch, knobs, cfg=cfg, tx=tx, sequence_balance=1e-4)
            seen.append(float(metrics["loss"]))
    return seen


if __name__ == "__main__":
    one, eight = losses((1, 1, 1)), losses((2, 2, 2))
    np.testing.assert_allclose(eight, one, rtol=1e-5)  # float32 sums in another order
    assert one[0] - one[-1] > 0.2, one
