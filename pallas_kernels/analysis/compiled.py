"""Compile one program for a chip that is not here, and read what its compiler dumps.

libtpu reads its options once, when it is loaded, and Mosaic GPU dumps where the environment says; hence one process a
program (`__main__.py`). A small program leaves hundreds of megabytes of dumps: they lie in a folder that goes with the call.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pallas_kernels.analysis import machine_code, schedule
from pallas_kernels.analysis.chips import chip

H200 = Path(__file__).with_name("h200.textproto")


@dataclass(frozen=True)
class Job:
    function: Callable[..., Any]
    arguments: tuple[Any, ...]  # trees of jax.ShapeDtypeStruct
    platform: str  # "tpu" or "cuda"
    topology: str
    axes: dict[str, int]


@dataclass(frozen=True)
class Compiled:
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    operations: float | None  # None where the compiler does not count (GPU)
    bytes_moved: float | None
    loops: dict[str, tuple[schedule.Loop, ...]]  # per TPU kernel
    machine_code: tuple[machine_code.MachineCode, ...]  # per Hopper kernel


def run(job: Job) -> Compiled:
    with TemporaryDirectory(prefix="pallas-analysis-") as folder:
        dump = Path(folder)
        if job.platform == "tpu":
            os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        else:
            _dump_machine_code(dump)
        compiled = _compile(job)
        memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
        return Compiled(
            argument_bytes=memory.argument_size_in_bytes,
            output_bytes=memory.output_size_in_bytes,
            temporary_bytes=memory.temp_size_in_bytes,
            operations=cost.get("flops"),
            bytes_moved=cost.get("bytes accessed"),
            loops=_loops(dump, job.topology) if job.platform == "tpu" else {},
            machine_code=machine_code.read(dump),
        )


def _dump_machine_code(dump: Path) -> None:
    import jax.experimental.mosaic.gpu  # noqa: F401  importing it sets where it looks for nvdisasm; ours comes after

    os.environ |= {"MOSAIC_GPU_DUMP_TO": str(dump), "MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_PTX": "1"}
    tool = shutil.which("nvdisasm")
    if tool:
        os.environ |= {"MOSAIC_GPU_CUDA_ROOT": str(Path(tool).parent.parent), "MOSAIC_GPU_DUMP_SASS": "1"}


def _compile(job: Job) -> Any:
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    options = {"target_config": H200.read_text()} if job.platform == "cuda" else {}
    name = {"topology": job.topology} if job.platform == "cuda" else {}
    target = topologies.get_topology_desc("" if name else job.topology, platform=job.platform, **name, **options)
    count = int(np.prod(list(job.axes.values())))
    devices = np.array(target.devices[:count]).reshape(tuple(job.axes.values()))
    mesh = Mesh(devices, tuple(job.axes), axis_types=(AxisType.Explicit,) * len(job.axes))

    def place(z: Any) -> Any:
        spec = z.sharding.spec if getattr(z, "sharding", None) is not None else PartitionSpec()
        return jax.ShapeDtypeStruct(z.shape, z.dtype, sharding=NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        return jax.jit(job.function).lower(*jax.tree.map(place, job.arguments)).compile()


def _loops(dump: Path, topology: str) -> dict[str, tuple[schedule.Loop, ...]]:
    """Of every Pallas kernel of the program, by the name of its call."""
    found = {}
    for listing in sorted(dump.glob("*-final_bundles.txt")):
        text = listing.read_text(errors="replace")
        if "schedule-analysis" in listing.name or "custom-call(" not in text.partition("exit bundle")[2]:
            continue  # a summary, or what XLA compiled itself
        name = listing.name.split("-", 1)[1].rsplit("-", 2)[0]
        table = next(dump.glob(f"{listing.name.split('-')[0]}-{name}-*final_hlo-static-per-bundle-utilization.txt"))
        found[name] = schedule.loops(text, table.read_text(), chip(topology))
    return found
