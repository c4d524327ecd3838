"""Training on eight fake devices against one: the same losses, step by step, and the same weights in the end. In a process
of its own."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

STEPS = 10
MESHES = ((2, 2, 2), (1, 2, 4))


@pytest.mark.slow
def test_eight_devices_train_as_one():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, __file__], env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def trained(sizes: tuple[int, int, int]) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses of a few steps of Muon, float32 throughout, no warm-up, two microbatches, and the weights after them."""
    from glm_jax import config, mesh, model, spec
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
    knobs = Knobs(*np.float32([1e-2, 0.3, 0]), microbatches=np.int32(2))
    here = mesh.make(config.Mesh(*sizes), jax.devices()[: int(np.prod(sizes))])
    with jax.set_mesh(here):
        batch = {name: jax.device_put(z, mesh.batch_sharding(here)) for name, z in batch.items()}
        now, seen = state.create(cfg, tx, 0), []
        for _ in range(STEPS):
            now, metrics = train_step(now, batch, knobs, cfg=cfg, tx=tx, sequence_balance=1e-4)
            seen.append(float(metrics["loss"]))
        leaves = jax.tree_util.tree_leaves_with_path(now.params)
        return seen, {spec.path_name(path): np.asarray(w) for path, w in leaves}


if __name__ == "__main__":
    from glm_jax.parallel import expert, homes

    one, weights = trained((1, 1, 1))
    assert one[0] - one[-1] > 0.2, one
    expert.ROUTED_ROWS["cpu"], homes.CHUNK_BYTES = 64, 2**12  # chunks of tokens, and of matrices
    for sizes in MESHES:
        eight, theirs = trained(sizes)
        np.testing.assert_allclose(eight, one, rtol=1e-5, err_msg=str(sizes))  # float32 sums in another order
        for name, w in weights.items():
            error = np.sqrt(np.mean((theirs[name] - w) ** 2)) / np.sqrt(np.mean(w**2) + 1e-12)
            assert error < 1e-3, (sizes, name, error)
