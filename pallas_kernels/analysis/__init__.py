"""What a kernel costs on a chip that is not here: compiled ahead of time, on a machine without accelerator.

    figures = analysis.tpu(partial(gmm, implementation="tpu"), (x, w, sizes), "v5p")       # jax.ShapeDtypeStructs
    figures.temporary_bytes, figures.bound_seconds, figures.inner_loop.over_ideal(figures.chip)
    figures = analysis.hopper(function, arguments)
    figures.machine_code[0].registers, .spill_bytes, .hgmma

A function is given by name to another process, so it is one of a module that can be imported, or a `functools.partial` of
one; a lambda or a function within a function cannot travel. It is compiled with a mesh in context, so a door that is asked for
no implementation by name takes that chip's kernel. `INSTALL` says what the compilers come with; no driver is needed.
"""

import importlib.util
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from pallas_kernels.analysis.chips import CHIPS, ONE_HOST_HOPPER, TOPOLOGY, Chip, bound_seconds, chip
from pallas_kernels.analysis.compiled import Compiled, Job
from pallas_kernels.analysis.machine_code import MachineCode
from pallas_kernels.analysis.schedule import Loop

__all__ = ["CHIPS", "Chip", "Figures", "Loop", "MachineCode", "bound_seconds", "can_compile", "chip", "hopper", "tpu"]

QUIET = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}

# Of each platform's compiler: the modules that bring it, one of which is enough, and how to get it of jax's own version.
COMPILERS = {"tpu": ("libtpu",), "hopper": ("jax_cuda12_plugin", "jax_cuda13_plugin")}
INSTALL = {
    "tpu": f"pip install 'jax[tpu]=={jax.__version__}'",
    "hopper": f"pip install --no-deps jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__}",
}


@dataclass(frozen=True)
class Figures(Compiled):
    """Of the compiled program, per device; a Pallas call counts by its cost estimate."""

    chip: Chip

    @property
    def bound_seconds(self) -> float | None:
        """The roofline of the compiler's counts; None where it does not count."""
        if self.operations is None or self.bytes_moved is None:
            return None
        return bound_seconds(self.chip, self.operations, self.bytes_moved)

    @property
    def inner_loop(self) -> Loop | None:
        """Of all kernels the innermost loop that multiplies most; None if none multiplies."""
        first = [loops[0] for loops in self.loops.values() if loops]
        return max(first, key=lambda loop: loop.products, default=None)


def can_compile(platform: str) -> bool:
    """Whether this machine has the compiler: platform is "tpu" or "hopper"."""
    return any(importlib.util.find_spec(module) is not None for module in COMPILERS[platform])


def tpu(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    topology: str,
    *,
    axes: dict[str, int] | None = None,
    timeout: float = 600,
) -> Figures:
    """Figures of `function(*arguments)` on one device of a chip ("v5e", "v5p", "v6e", "tpu7x") or topology ("v5p:2x2x2").

    `arguments` are trees of `jax.ShapeDtypeStruct`. `axes` makes a mesh of several devices; an argument is then laid out as the
    `PartitionSpec` of its sharding says. Raises RuntimeError with the compiler's message if the program does not compile, and
    TimeoutError if that takes more than `timeout` seconds.
    """
    facts = chip(topology)
    return _figures(
        Job(function, tuple(arguments), "tpu", TOPOLOGY.get(topology, topology), axes or {"device": 1}), facts, timeout
    )


def hopper(
    function: Callable[..., Any], arguments: Sequence[Any], *, axes: dict[str, int] | None = None, timeout: float = 600
) -> Figures:
    """Figures of `function(*arguments)` on an H200 (sm_90a); otherwise as `tpu`. An `nvdisasm` on the path adds `hgmma`."""
    devices = math.prod((axes or {}).values())
    topology = ONE_HOST_HOPPER if devices == 1 else f"1x1x{devices}"
    return _figures(Job(function, tuple(arguments), "cuda", topology, axes or {"device": 1}), CHIPS["h200"], timeout)


def _figures(job: Job, facts: Chip, timeout: float) -> Figures:
    try:
        sent = pickle.dumps(job)
    except (AttributeError, pickle.PicklingError) as error:
        raise ValueError(
            f"analysis: {job.function} cannot travel to another process ({error}); give a function of an importable module, "
            "or a functools.partial of one"
        ) from None
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pallas_kernels.analysis"],
            input=sent,
            capture_output=True,
            env=os.environ | QUIET | {"PYTHONPATH": paths},
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"analysis: not compiled within {timeout:g} seconds; allow more") from None
    if not done.stdout:
        raise RuntimeError(
            f"analysis: the compiler's process ended with {done.returncode}:\n{done.stderr.decode()[-2000:]}"
        )
    answer = pickle.loads(done.stdout)
    if isinstance(answer, str):
        raise RuntimeError(f"analysis: {answer}")
    return Figures(**vars(answer), chip=facts)
