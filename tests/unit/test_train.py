"""The train step, checkpoints and the log: what must hold however a batch is cut and whenever a run ends."""

import json
import shutil

import jax
import numpy as np
import optax
import pytest

from experiments import recipes
from glm_jax import config, losses, mesh, model
from glm_jax.config import ConfigError
from glm_jax.optim import optimizer
from glm_jax.train import checkpoint, metrics, state
from glm_jax.train.step import Knobs, train_step

CFG = config.Model(
    V=64, D=16, L=2, dense_layers=1, N=2, K=1, H=8, F=16, M=8, E=4, A=2, dtype="float32", max_positions=1024
)
TX = optimizer(config.Optim(name="adamw"), model.specs(CFG))  # Muon has its own tests and compiles for longer


def batch_of(microbatches: int, rows: int) -> dict[str, np.ndarray]:
    text = np.random.default_rng(0).integers(0, CFG.V, (microbatches * rows, 10)).astype(np.int32)
    weights = (np.random.default_rng(1).random((microbatches * rows, 8)) < 0.7).astype(np.float32)
    batch = {"ids": text[:, :8], "targets": text[:, 1:9], "mtp_targets": text[:, 2:], "weights": weights}
    batch |= {"mtp_weights": weights, "segments": np.ones_like(text[:, :8])}
    batch["positions"] = np.broadcast_to(np.arange(8, dtype=np.int32), (microbatches * rows, 8))
    return {name: z.reshape(microbatches, rows, 8).copy() for name, z in batch.items()}


def step(batch: dict[str, np.ndarray], microbatches: int, bias_rate: float = 0.01):
    knobs = Knobs(*np.float32([1e-2, 0.3, bias_rate]), microbatches=np.int32(microbatches))
    return train_step(state.create(CFG, TX, 0), batch, knobs, cfg=CFG, tx=TX, sequence_balance=1e-2)


@pytest.mark.slow
def test_accumulated_microbatches_equal_one_batch():
    """Components are divided by the whole batch's counts, so uneven weights across microbatches do not matter."""
    _, told = step(batch_of(1, 4), 1)
    _, told_cut = step(batch_of(2, 2), 2)
    for name in ("loss", "mtp_loss", "balance_loss", "gradient_norm", "load_LE"):
        np.testing.assert_allclose(told_cut[name], told[name], rtol=1e-5, err_msg=name)  # float32 sums, another order


@pytest.mark.slow
def test_microbatches_behind_the_count_are_never_read():
    real, other = batch_of(2, 2), batch_of(2, 2)
    for batch, fill in ((real, 0), (other, 5)):
        batch["ids"][1] = batch["targets"][1] = fill
        batch["weights"][1] = batch["mtp_weights"][1] = 0
    jax.tree.map(np.testing.assert_array_equal, step(real, 1), step(other, 1))


def test_the_balance_bias_moves_by_counts_alone_and_stops_at_rate_zero():
    moved, told = step(batch_of(2, 2), 2)
    expected = 0.01 * np.sign(told["load_LE"].mean(axis=1, keepdims=True) - told["load_LE"])
    np.testing.assert_allclose(moved.router_bias_LE, expected, atol=1e-8)
    frozen, _ = step(batch_of(2, 2), 2, bias_rate=0.0)
    np.testing.assert_array_equal(frozen.router_bias_LE, 0)


# ---- the same step with a policy: GRPO


def policy_batch(microbatches: int, rows: int) -> dict[str, np.ndarray]:
    """No MTP targets; advantages of both signs, and log-probabilities of another model than the one that is trained."""
    noise, shape = np.random.default_rng(2), (microbatches, rows, 8)
    batch = {name: z for name, z in batch_of(microbatches, rows).items() if not name.startswith("mtp")}
    old = -np.abs(noise.normal(4, 1, microbatches * rows * 8)).astype(np.float32).reshape(shape)
    worth = np.repeat(noise.normal(size=microbatches * rows).astype(np.float32), 8).reshape(shape)
    return batch | {"advantages": worth, "old_log_probs": np.where(batch["weights"], old, 0).astype(np.float32)}


def policy_step(batch: dict[str, np.ndarray], now: state.State | None = None):
    knobs = Knobs(*np.float32([1e-3, 0.0, 0.0]), microbatches=np.int32(len(batch["ids"])))
    return train_step(now or state.create(CFG, TX, 0), batch, knobs, cfg=CFG, tx=TX, policy=losses.Policy())


@pytest.mark.slow
def test_a_policy_step_accumulates_and_measures_over_all_microbatches():
    batch = policy_batch(1, 4)
    moved, told = policy_step(batch)
    _, told_cut = policy_step({name: z.reshape(2, 2, 8) for name, z in batch.items()})
    for name in set(told) - {"load_LE"}:
        np.testing.assert_allclose(told_cut[name], told[name], rtol=1e-5, atol=1e-7, err_msg=name)  # float32 sums
    assert told["sampled_tokens"] == told["tokens"] == batch["weights"].sum()
    far = np.abs(log_probs(batch) - batch["old_log_probs"])[batch["weights"] > 0]
    np.testing.assert_allclose(told["mismatch_max"], far.max(), rtol=1e-5)
    np.testing.assert_allclose(told["mismatch_sum"], far.sum(), rtol=1e-5)
    np.testing.assert_array_equal(moved.router_bias_LE, 0)  # frozen


def log_probs(batch: dict[str, np.ndarray]) -> np.ndarray:
    now = state.create(CFG, TX, 0)
    logits, _ = model.forward(CFG, now.params, now.router_bias_LE, batch["ids"].reshape(-1, 8))
    targets = batch["targets"].reshape(-1, 8, 1)
    return np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), targets, -1)[..., 0].reshape(batch["ids"].shape)


def test_a_policy_step_makes_good_answers_likelier_and_bad_ones_less():
    batch = policy_batch(1, 4)
    batch["old_log_probs"] = np.where(batch["weights"] > 0, log_probs(batch), 0).astype(np.float32)
    moved, told = policy_step(batch)
    expected = -(batch["weights"] * batch["advantages"]).sum() / batch["weights"].sum()
    np.testing.assert_allclose(told["loss"], expected, rtol=1e-4)  # the ratio is 1
    assert told["clipped_sum"] == 0 and told["mismatch_max"] < 1e-5 and 0 <= told["k3_sum"] < 1e-8
    _, after = policy_step(batch, moved)
    assert after["loss"] < told["loss"] - 1e-3


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """A stage's folder with one checkpoint, and the state in it."""
    folder = tmp_path_factory.mktemp("run") / "stage1"
    run = config.replace(recipes.get("smoke"), model=CFG)
    checkpoint.save_run(folder, run, "stage1", folder.parent / "data")
    saved, _ = step(batch_of(2, 2), 2)
    checkpoints = checkpoint.Checkpoints(folder)
    checkpoints.save(7, saved, {"data": {"microbatch": 3}, "seconds": 1.5})
    checkpoints.close()
    return folder, run, saved


def test_a_checkpoint_comes_back_bit_for_bit_on_a_mesh(stage):
    folder, _, saved = stage
    with jax.set_mesh(mesh.make(config.Mesh(), jax.devices()[:1])):
        restored, meta = checkpoint.Checkpoints(folder).restore(7, state.abstract(CFG, TX))
    jax.tree.map(np.testing.assert_array_equal, restored, saved)
    assert meta == {"data": {"microbatch": 3}, "seconds": 1.5}


def test_a_model_without_experts_has_checkpoints_too(tmp_path):
    """Its balance bias has no rows; orbax saves no empty array."""
    cfg = config.replace(CFG, **{"L": 1, "dense_layers": 1, "mtp_layers": 0})
    saved = state.create(cfg, optax.sgd(1.0), 3)
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(0, saved, {})
    checkpoints.close()
    restored, _ = checkpoint.Checkpoints(tmp_path).restore(0, state.abstract(cfg, optax.sgd(1.0)))
    jax.tree.map(np.testing.assert_array_equal, restored, saved)
    alone = checkpoint.Checkpoints(tmp_path).restore_params(0, cfg)
    jax.tree.map(np.testing.assert_array_equal, alone, (saved.params, saved.router_bias_LE))


def test_parameters_load_from_the_folder_alone(stage):
    folder, run, saved = stage
    for path in (folder, folder.parent):
        found, params, router_bias_LE, data = checkpoint.load_params(path)
        jax.tree.map(np.testing.assert_array_equal, (params, router_bias_LE), (saved.params, saved.router_bias_LE))
        assert found == config.replace(run, **{"model.rope_theta": run.pretrain[0].rope_theta})
        assert data == folder.parent / "data"


def test_a_file_with_a_flipped_byte_is_named_before_it_is_read(stage, tmp_path):
    folder, *_ = stage
    like = state.abstract(CFG, TX)
    shutil.copytree(folder, tmp_path / "copy")
    step_folder = tmp_path / "copy" / "checkpoints" / "7"
    files = [path for item in ("state", "meta") for path in (step_folder / item).rglob("*") if path.is_file()]
    files = [path for path in files if path.name != "commit_success.txt"]  # that it is there says all
    assert len(files) > 5
    checkpoints = checkpoint.Checkpoints(tmp_path / "copy")
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
        with pytest.raises(ConfigError, match=f"{path}|sums.json"):
            checkpoints.restore(7, like)
        if path.name != checkpoint.SUMS_FILE and "state" in path.parts:
            with pytest.raises(ConfigError, match=f"{path} holds other bytes than were written"):
                checkpoint.load_params(tmp_path / "copy")
        path.write_bytes(whole)
    data = next(path for path in files if path.parent.name == "d")
    data.unlink()
    with pytest.raises(ConfigError, match=f"{data} is missing"):
        checkpoints.restore_params(7, CFG)


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        checkpoint.load_params(tmp_path)


def test_a_folder_has_one_writer_at_a_time(tmp_path):
    with (
        checkpoint.sole_writer(tmp_path / "sft"),
        pytest.raises(ConfigError, match=r"another process is training in .*sft; wait"),
        checkpoint.sole_writer(tmp_path / "sft"),
    ):
        pass
    with checkpoint.sole_writer(tmp_path / "sft"):
        pass


def test_a_log_opened_again_drops_what_came_after_the_checkpoint(tmp_path):
    record = {"loss": 1.0, "lr": 0.1, "batch_tokens": 8}
    log = metrics.Log(tmp_path, -1, 80, "stage")
    for number in range(1, 6):
        log.step({"step": number, **record}, 8 * number)
    log.close()
    with open(log.path, "a") as f:
        f.write('{"kind": "step", "st')  # killed inside a line
    assert [r["step"] for r in metrics.read(log.path)] == [1, 2, 3, 4, 5]
    log = metrics.Log(tmp_path, 3, 80, "stage")
    log.step({"step": 4, **record}, 32)
    log.close()
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_fresh_state_has_the_bits_of_a_thorough_compilation():
    thorough = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    plain = jax.jit(state._make, static_argnums=(0, 1), compiler_options=thorough)(CFG, TX, jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, state.create(CFG, TX, 3), plain)
