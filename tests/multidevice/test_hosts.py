"""Two processes of one run, two fake devices each: what each reads becomes its part of the same global batch."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest

ROWS, SEQ_LEN, ROOM = 8, 4, 3


@pytest.mark.slow
def test_each_process_gives_the_rows_of_its_devices():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, address, str(index)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for index in (0, 1)
    ]
    told = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(told)


def check(address: str, index: int) -> None:
    """The global batch that two processes make of their shares, against the whole as one process has it."""
    import jax

    jax.distributed.initialize(address, num_processes=2, process_id=index)
    from glm_jax import config, mesh
    from glm_jax.train.step import stacked

    whole = [np.arange(ROWS * SEQ_LEN).reshape(ROWS, SEQ_LEN) + 1000 * number for number in range(ROOM - 1)]
    here = mesh.make(config.Mesh(data=2, fsdp=2))
    part, count = mesh.process_share(here, ROWS)
    assert (part, count) == (index, 2)
    mine = [{"ids": batch.reshape(count, -1, SEQ_LEN)[part]} for batch in whole]
    with jax.set_mesh(here):
        got = stacked(mine, ROOM, rows=ROWS)["ids"]
    assert got.shape == (ROOM, ROWS, SEQ_LEN)
    expected = np.stack([*whole, np.zeros_like(whole[0])])
    for shard in got.addressable_shards:
        assert np.array_equal(shard.data, expected[shard.index])


if __name__ == "__main__":
    check(sys.argv[1], int(sys.argv[2]))
