"""Two processes of one run: what each reads becomes its part of the same global batch, and they train as one process does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import fake_devices
import jax
import numpy as np
import pytest
from sharded_training import check_weights

ROWS, SEQ_LEN, ROOM = 8, 8, 3
ROOT = Path(__file__).parents[2]


def processes(count: int, devices: int, *command: str) -> list[str]:
    """What `count` processes of `devices` fake devices each print, which the environment makes one run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    # a process that finds its program in the cache would wait for one that compiles it, and gloo waits for 30 s
    flags |= {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    several = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)} if count > 1 else {}
    started = []
    for index in range(count):
        environment = (
            fake_devices.environment(devices) | flags | several | ({"JAX_PROCESS_ID": str(index)} if several else {})
        )
        started.append(
            subprocess.Popen(
                [sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    told = [process.communicate(timeout=2000) for process in started]
    assert [process.returncode for process in started] == [0] * count, "\n".join(error for _, error in told)
    return [out for out, _ in told]


@pytest.mark.slow
def test_each_process_gives_the_rows_of_its_devices(tmp_path):
    """And all of them learn of a file that one finds changed."""
    processes(2, 4, __file__, "rows", str(tmp_path))


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """To 1e-6 of the loss, for collectives between processes sum in another order; and twice to the same bits."""
    for name, count in (("one", 1), ("two", 2)):
        processes(count, 8 // count, __file__, "train", str(tmp_path / f"{name}.npz"))
    one, two = (dict(np.load(tmp_path / f"{name}.npz")) for name in ("one", "two"))
    np.testing.assert_allclose(two.pop("losses"), one.pop("losses"), rtol=1e-6)
    np.testing.assert_array_equal(two.pop("loads")[0], one.pop("loads")[0])
    check_weights(two, one, 1e-3, "two processes")


@pytest.mark.slow
def test_a_run_of_two_processes_logs_saves_and_goes_on_as_one(tmp_path):
    """The script itself: one log, one data folder, one result, whatever the number of processes."""
    command = [
        "-m", "experiments.pretrain", "--recipe", "smoke", "--pretrain.0.tokens", "8192", "--mesh.fsdp", "1",
        "--mesh.expert", "2", "--loop.checkpoint_every", "2", "--loop.eval_bytes", "4000",
    ]  # fmt: skip
    logs = {}
    for count in (2, 1):
        processes(count, 2 // count, *command, "--out", str(tmp_path / str(count)))
        command += ["--data_folder", str(tmp_path / "2" / "data")]
        lines = (tmp_path / str(count) / "stage1" / "log.jsonl").read_text().splitlines()
        logs[count] = [json.loads(line) for line in lines]
    for one, two in zip(logs[1], logs[2], strict=True):
        assert (one["kind"], one["step"]) == (two["kind"], two["step"])
        if one["kind"] == "step":
            np.testing.assert_allclose(two["loss"], one["loss"], rtol=1e-4)  # a tie between experts moves a token
        if one["kind"] == "eval":
            assert one["bits_per_byte"] == pytest.approx(two["bits_per_byte"], rel=1e-3)


def check_rows() -> None:
    """The global batch that two processes make of their shares, against the whole as one process has it."""
    from glm_jax import config, mesh
    from glm_jax.config import ConfigError
    from glm_jax.parallel.context import order
    from glm_jax.train.step import stacked

    whole = [np.arange(ROWS * SEQ_LEN).reshape(ROWS, SEQ_LEN) + 1000 * number for number in range(ROOM - 1)]

    def built(here: jax.sharding.Mesh) -> tuple[np.ndarray, tuple[int, int]]:
        """Every shard here of the global batch, the rest zero; and which share this process read."""
        part, count = mesh.process_share(here, ROWS)
        mine = [{"ids": np.split(batch, count)[part]} for batch in whole]
        with jax.set_mesh(here):
            got = stacked(mine, ROOM, rows=ROWS)["ids"]
        assert got.shape == (ROOM, ROWS, SEQ_LEN)
        seen = np.full(got.shape, -1)
        for shard in got.addressable_shards:
            seen[shard.index] = shard.data
        return seen, (part, count)

    def check(sizes: config.Mesh, devices=None) -> tuple[int, int]:
        here = mesh.make(sizes)
        if devices is not None:
            here = jax.sharding.Mesh(devices.reshape(here.devices.shape), mesh.AXES, axis_types=here.axis_types)
        seen, share = built(here)
        in_order = np.stack([*whole, np.zeros_like(whole[0])])[..., order(SEQ_LEN, sizes.context)]
        rows = (seen >= 0).any((0, 2)).nonzero()[0]
        first = len(rows) * share[0]  # a process's rows are its own in the order of its devices
        expected = in_order[:, first : first + len(rows)]
        assert np.array_equal(seen[:, rows], np.where(seen[:, rows] < 0, -1, expected))
        return share

    me = jax.process_index()
    assert check(config.Mesh(data=2, fsdp=4)) == (me, 2)
    assert check(config.Mesh(fsdp=2, context=2, expert=2)) == (me, 2)
    assert check(config.Mesh(context=4, expert=2)) == (0, 1)  # both hold all rows, of each other tokens
    devices = np.array(jax.devices())
    assert check(config.Mesh(data=2, fsdp=4), devices.reshape(2, 2, 2).swapaxes(0, 1)) == (me, 2)  # rows by turns
    mixed = jax.sharding.Mesh(devices[[0, 1, 2, 4, 3, 5, 6, 7]].reshape(1, 1, 2, 2, 2, 1), mesh.AXES)
    with pytest.raises(ConfigError, match="processes hold some of each other's rows"):
        mesh.process_share(mixed, ROWS)


def check_files(folder: Path) -> None:
    """Each process reads its share of the files, and all raise what one finds."""
    from glm_jax.config import ConfigError
    from glm_jax.train import integrity, processes

    paths = [folder / name for name in "abc"]
    texts = {path: path.name * 1000 for path in paths}
    processes.in_turn(lambda: [path.write_text(text) for path, text in texts.items()] if processes.writer() else [])
    noted = integrity.sums(folder, paths)
    integrity.check(folder, noted)

    def full():
        raise OSError("no space left")

    with pytest.raises(
        OSError if processes.writer() else RuntimeError, match=r"no space left|the first process failed"
    ):
        processes.in_turn(full)
    for changed in paths:
        processes.in_turn(lambda path=changed: path.write_text("d" * 1000) if processes.writer() else 0)
        with pytest.raises(ConfigError, match=f"{changed} holds other bytes"):
            integrity.check(folder, noted)
        processes.in_turn(lambda path=changed: path.write_text(texts[path]) if processes.writer() else 0)


def save_training(path: Path) -> None:
    """Losses, counts and weights of the small model's training, done twice to the same bits; one process writes them."""
    from sharded_training import make, start, train, weights

    from glm_jax.config import Mesh

    def trained() -> dict[str, np.ndarray]:
        now, losses, loads = train(start())
        return weights(now) | {"losses": np.array(losses), "loads": loads}

    with jax.set_mesh(make(Mesh(fsdp=2, expert=2, context=2))):
        found, again = trained(), trained()
    jax.tree.map(np.testing.assert_array_equal, again, found)
    if jax.process_index() == 0:
        np.savez(path, **found)


if __name__ == "__main__":
    from experiments import cli

    cli.join_processes()
    if sys.argv[1] == "rows":
        check_rows()
        check_files(Path(sys.argv[2]))
    else:
        save_training(Path(sys.argv[2]))
