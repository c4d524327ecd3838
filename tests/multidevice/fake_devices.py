"""A process whose CPU pretends to be several devices: one of its own, since a process fixes its devices once."""

import os
import subprocess
import sys

# A collective holds its thread until all devices have come to it, and XLA starts those that follow a loop of collectives, and
# do not need its result, when the loop has begun. Its pool has as many threads as devices: once they all wait, and one device's
# loop has none to go on with, they wait for good. In a larger pool a thread is left for each loop.
THREADS_PER_DEVICE = 4


def environment(devices: int = 8) -> dict[str, str]:
    """This process's environment, for one with so many devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    fixed = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "NPROC": str(THREADS_PER_DEVICE * devices)}
    return {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} | os.environ | fixed  # as in conftest.py


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Python on `command`, with eight devices, to a good end."""
    done = subprocess.run([sys.executable, *command], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-20_000:]
    return done
