"""Published checkpoints on eight fake devices. Runs in a process of its own, since a process fixes its devices once."""

import fake_devices
import pytest

SCRIPT = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from glm_jax import config, hf, mesh, model, spec

cfg = config.Model(
    V=48, D=16, L=3, dense_layers=1, N=4, K=2, H=8, F=20, M=12, E=6, A=2, dtype="float32", remat="none", max_positions=64
)
params, bias_LE = model.init(cfg, jax.random.key(0))
bias_LE = bias_LE + jnp.arange(cfg.E)
out = Path(sys.argv[1])
hf.save(out / "one", cfg, params, bias_LE)
run = jax.jit(lambda p, b: model.forward(cfg, p, b, jnp.arange(64).reshape(8, 8) % cfg.V)[0])
for number, sizes in enumerate(((2, 2, 2), (1, 8, 1), (8, 1, 1))):
    there = mesh.make(config.Mesh(*sizes))
    cfg_there, sharded, sharded_bias_LE = hf.load(out / "one", dtype="float32", mesh=there)
    wanted = mesh.shardings(there, model.specs(cfg))
    jax.tree.map(lambda a, b, layout: (np.testing.assert_array_equal(a, b), a.sharding == layout or 1 / 0), sharded, params, wanted)
    with jax.set_mesh(there):
        logits = run(sharded, sharded_bias_LE)
    np.testing.assert_allclose(logits, run(params, bias_LE), atol=1e-5)
    hf.save(out / str(number), cfg_there, sharded, sharded_bias_LE)
    assert (out / str(number) / "model.safetensors").read_bytes() == (out / "one" / "model.safetensors").read_bytes()
try:
    hf.load(out / "one", dtype="float32", mesh=mesh.make(config.Mesh(1, 2, 4)))
except config.ConfigError as error:
    assert "moe.ffn.gate_EDM: E=6 cannot be split over expert axis of 4" in str(error), error
    print("equal")
"""


@pytest.mark.slow
def test_load_to_and_save_from_a_mesh(tmp_path):
    assert fake_devices.run("-c", SCRIPT, str(tmp_path)).stdout.strip() == "equal"
