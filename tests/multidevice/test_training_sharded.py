"""Training on eight fake devices against one: the same losses, step by step, the same expert counts, and the same weights in
the end, whatever the mesh; also from a checkpoint of another mesh. In processes of their own."""

import os
import sys
import tempfile
from pathlib import Path

import fake_devices
import jax
import numpy as np
import pytest
from sharded_training import CFG, STEPS, check_weights, make, meshes, start, train, weights

from glm_jax.config import Mesh, Model, replace

SOME = (Mesh(data=2, fsdp=2, expert=2), Mesh(fsdp=2, expert=2, context=2), Mesh(fsdp=2, expert=2, tensor=2))
PIPELINED = Mesh(pipeline=2, fsdp=1, expert=2, tensor=2)  # two of three MoE layers are shared by the stages
SAVED_ON = Mesh(fsdp=4, expert=2)
TIE = 1e-5  # between scores that rounding may order
RESTORED_ON = (Mesh(fsdp=2, expert=2, context=2), Mesh(fsdp=1))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["meshes", "chunks", "balance", "checkpoints"])
def test_eight_devices_train_as_one(what):
    fake_devices.run(__file__, what)


def trained(sizes: Mesh, bias_rate: float = 0.0, cfg: Model = CFG):
    """(losses, expert counts, weights) of all steps on a mesh."""
    with jax.set_mesh(make(sizes)):
        now, losses, loads = train(start(), bias_rate=bias_rate, cfg=cfg)
        return losses, loads, weights(now)


def check_meshes(sizes_of_meshes, one, cfg: Model = CFG) -> None:
    """float32 sums in another order: losses to 1e-5, weights to 1e-3 of their root mean square."""
    losses, loads, want = one
    for sizes in sizes_of_meshes:
        got_losses, got_loads, got = trained(sizes, cfg=cfg)
        np.testing.assert_allclose(got_losses, losses, rtol=1e-5, err_msg=str(sizes))
        np.testing.assert_array_equal(got_loads[0], loads[0], err_msg=str(sizes))
        error = check_weights(got, want, 1e-3, sizes)
        print(sizes, np.max(np.abs(np.divide(got_losses, losses) - 1)), error, flush=True)
        jax.clear_caches()  # machine code of dozens of meshes is more mappings than a process may have


def check_balance(bias_rate: float = 1e-2) -> None:
    """The bias follows the counts, so they stay equal only if every device counts the tokens of all: until a tie."""
    losses, loads, _ = trained(Mesh(fsdp=1), bias_rate)
    assert (loads[0] != loads[-1]).any()
    for sizes in SOME[:2]:
        got_losses, got, _ = trained(sizes, bias_rate)
        tie = next((step for step in range(STEPS) if (got[step] != loads[step]).any()), STEPS)
        np.testing.assert_allclose(got_losses[:tie], losses[:tie], rtol=1e-5, err_msg=str(sizes))
        assert tie > 0, sizes
        if tie < STEPS:  # a tie: one device chooses the same once its bias is moved by what rounding may move scores by
            with jax.set_mesh(make(Mesh(fsdp=1))):
                now, *_ = train(start(), tie, bias_rate)
                nudged_LE = now.router_bias_LE + TIE * np.sign(got[tie] - loads[tie])
                _, _, nudged = train(now.replace(router_bias_LE=nudged_LE), 1, bias_rate)
            np.testing.assert_array_equal(nudged[0], got[tie], err_msg=f"{sizes}, step {tie}")


def check_checkpoints(folder: Path) -> None:
    """Half of the steps on one mesh, the other half on another, all of the state or the parameters alone being read."""
    from sharded_training import TX

    from glm_jax.train import state
    from glm_jax.train.checkpoint import Checkpoints

    losses, _, want = trained(Mesh(fsdp=1))
    half = STEPS // 2
    checkpoints = Checkpoints(folder)
    with jax.set_mesh(make(SAVED_ON)):
        now, first, _ = train(start(), half)
        checkpoints.save(half, now, {})
        checkpoints.wait()
    for sizes in RESTORED_ON:
        with jax.set_mesh(make(sizes)):
            params, router_bias_LE = checkpoints.restore_params(half, CFG)
            now, _ = checkpoints.restore(half, state.abstract(CFG, TX))
            jax.tree.map(np.testing.assert_array_equal, (params, router_bias_LE), (now.params, now.router_bias_LE))
            assert jax.tree.map(lambda w: w.sharding, params) == jax.tree.map(lambda w: w.sharding, now.params), sizes
            now, second, _ = train(now, STEPS - half)
            np.testing.assert_allclose([*first, *second], losses, rtol=1e-5, err_msg=str(sizes))
            check_weights(weights(now), want, 1e-3, sizes)
    checkpoints.close()


if __name__ == "__main__":
    if sys.argv[1] == "meshes":
        one = trained(Mesh(fsdp=1))
        assert one[0][0] - one[0][-1] > 0.2, one[0]
        some = [Mesh(fsdp=1, context=8), Mesh(data=2, fsdp=1, context=2, tensor=2), PIPELINED]
        every = [sizes for devices in (2, 4, 8) for sizes in meshes(devices)]  # minutes: ALL_MESHES=1 asks for it
        check_meshes(every if "ALL_MESHES" in os.environ else some, one)
    if sys.argv[1] == "chunks":
        from glm_jax.parallel import expert, homes

        one = trained(Mesh(fsdp=1))
        expert.ROUTED_ROWS["cpu"], homes.CHUNK_BYTES = 16, 2**12  # chunks of tokens, and of matrices
        check_meshes(SOME, one)
        check_meshes([Mesh(fsdp=2, expert=4)], one, replace(CFG, dispatch="ragged"))
    if sys.argv[1] == "balance":
        check_balance()
    if sys.argv[1] == "checkpoints":
        with tempfile.TemporaryDirectory() as folder:
            check_checkpoints(Path(folder))
