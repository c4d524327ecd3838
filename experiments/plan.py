"""Plan a step of training, RL or sampling for machines that are not here: its memory, operations and traffic, from the chips' own compiler.

    python -m experiments.plan --recipe glm45 --topology v5p:8x8x8 --mesh fsdp=64,expert=8 --batch 512 --seq 4096 --out plan.json
    python -m experiments.plan --recipe air --topology h200:1x1x8 --mesh expert=8 --batch 64 --seq 4096
    python -m experiments.plan --recipe glm45 --topology v5p:4x4x8 --mesh fsdp=4,expert=32 --step sample --batch 128 --seq 8192
    python -m experiments.plan --recipe glm45 --topology v5p:8x8x8 --batch 512 --seq 4096 --search --out search.json
    python -m experiments.plan --table

The step is compiled as it would run, on this machine and without the chips: for TPU with the libtpu wheel that jax
pins, for H200 with its CUDA plug-in. What cannot be laid out, or cannot fit by arithmetic, is refused in seconds.
All figures are of one device and one step: GiB of 2^30 bytes, bytes that a device receives, floating-point operations.
The roofline's "network" is the links of a slice, or of a host of GPUs; "dcn" is what joins several, from each of which the bytes
that all its devices want come once.
Temporaries are jax's memory_analysis().temp_size_in_bytes, by which other code bases are measured too. Where arguments are
donated it counts more than is held at once: what is held at the peak is told beside it, and decides whether a plan fits.
`--table` prints the table of all plans in experiments/results.
"""

import ctypes
import dataclasses
import json
import os
import platform
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

from experiments import cli, recipes
from glm_jax.config import ConfigError, Mesh, Run, diff, nearest, replace

RESULTS = Path("experiments/results")
M_ARENA_MAX = -8  # in malloc.h
AXES = [field.name for field in fields(Mesh)]


@dataclass(frozen=True)
class Args:
    """Options of the plan."""

    topology: str = "v5p:8x8x8"
    """A chip and how many along each side of its torus (v5e, v5p, v6e, tpu7x), or h200 and slices x hosts x GPUs: h200:1x4x8 is four
    hosts of eight."""
    mesh: str = ""
    """Devices along each axis (data, fsdp, expert, context, tensor), e.g. fsdp=64,expert=8; what is left goes to fsdp. By
    default the recipe's. A pipeline is not planned, and a search leaves tensor at 1."""
    batch: int = 512
    """Rows of one step, over all devices."""
    seq: int = 4096
    """Tokens of a row."""
    remat: Literal["none", "layer", "offload"] | None = None
    """What a layer keeps for its backward pass: all; what enters it; that in the host's memory. By default the recipe's."""
    slices: int = 1
    """So many of the topology, joined by a slower network; the data axis goes over them. (Of GPUs the topology's first number.)"""
    step: Literal["train", "grpo", "sample"] = "train"
    """What to plan: pre-training's step; RL's update on answers (settings: post.unify.grpo); or sampling, in which each of --batch
    rows reads half of --seq tokens (prefill) and draws the other half (decode, one token after another)."""
    search: bool = False
    """Try every mesh of data, fsdp, context and expert axes that divides the topology, instead of --mesh: by arithmetic, and the best
    with the compiler where it is installed."""
    best: int = 3
    """So many meshes that fit are compiled in a search."""
    out: Path | None = None
    """Write the plan here, as JSON."""
    table: bool = False
    """Plan nothing; print the table of the plans in experiments/results."""


def main(args: Args, run: Run) -> dict[str, Any] | None:
    """Check, compile, tell; returns what plan.json has."""
    if args.table:
        print(table(sorted(RESULTS.glob("plan_*.json"))))
        return None
    run = replace(run, **{"model.remat": args.remat}) if args.remat else run
    if min(args.batch, args.seq, args.best, args.slices) < 1:
        raise ConfigError(
            f"--batch {args.batch}, --seq {args.seq}, --best {args.best} and --slices {args.slices} must be at least 1"
        )
    from glm_jax.plan import arithmetic, check, plan
    from glm_jax.plan.target import GIB, missing, target

    machine = target(args.topology, args.slices)
    sizes = mesh_of(args, run, machine.slices)
    if args.search and args.mesh:
        raise ConfigError(f"--search chooses the mesh; leave --mesh {args.mesh} out, or --search")
    if args.out and not args.out.absolute().parent.is_dir():
        raise ConfigError(f"--out {args.out}: there is no folder {args.out.parent}; make it first")
    if args.out and args.out.is_dir():
        raise ConfigError(f"--out {args.out} is a folder; give a file in it, e.g. {args.out / 'plan.json'}")
    if args.search:
        from experiments.plan_search import search

        how = missing(machine)
        if not how:
            _ready(args, machine)
        plan_one, best = partial(_plan_one, args, run), 0 if how else args.best
        found = search(run, machine, (args.batch, args.seq), args.step, best, plan_one)
        if how:
            print(f"\nby arithmetic alone: the compiler of {args.topology} is not installed: {how}")
        return _written(found, args.out)
    work = check(run, machine, sizes, args.batch, args.seq, args.step)
    needed = ", ".join(f"{term} {size / GIB:.1f}" for term, size in arithmetic(work).memory(work).items())
    _ready(args, machine, f"by arithmetic it fits, GiB a device: {needed} of {machine.chip.memory / GIB:.0f}; but ")
    with progress() as tell:
        found = plan(work, machine, tell)
    found |= {"peak_rss_gb": cli.peak_rss_gb(), "changed": _changed(run, args.step)}
    print(told(found))
    return _written(found, args.out)


def _plan_one(args: Args, run: Run, mesh: str, out: Path) -> None:
    main(dataclasses.replace(args, search=False, mesh=mesh, out=out), run)


def _written(found: dict[str, Any], out: Path | None) -> dict[str, Any]:
    if out:
        out.write_text(json.dumps(found, indent=1) + "\n")
        print(f"wrote {out}")
    return found


def mesh_of(args: Args, run: Run, slices: int = 1) -> Mesh:
    """--mesh as sizes; ConfigError for what is no axis or no number."""
    if not args.mesh:
        return run.mesh if run.mesh.data == -1 else replace(run.mesh, data=max(run.mesh.data, slices))
    sizes: dict[str, int] = {}
    for part in args.mesh.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES:
            raise ConfigError(f"--mesh {args.mesh!r}: no axis {axis!r}; {nearest(axis, AXES)}")
        if (size != "-1" and not re.fullmatch("[1-9][0-9]*", size)) or axis in sizes:
            raise ConfigError(
                f"--mesh {args.mesh!r}: {part.strip()!r} must be {axis}=N once, N at least 1, or -1 for what is left"
            )
        sizes[axis] = int(size)
    return Mesh(**{"data": slices, "fsdp": -1, "expert": 1} | sizes)


def _ready(args: Args, machine: Any, known: str = "") -> None:
    """Set what the machine's compiler reads. ConfigError with what is `known` without it where it is not installed."""
    import jax

    from glm_jax.plan.target import missing
    from pallas_kernels import analysis

    if how := missing(machine):
        raise ConfigError(f"--topology {args.topology}: {known}its compiler is not installed: {how}")
    os.environ |= analysis.QUIET | {"TPU_STDERR_LOG_LEVEL": "3"}
    _few_heaps()
    jax.config.update("jax_enable_compilation_cache", False)  # what is compiled for other machines cannot be read again


def _few_heaps() -> None:
    """Of glibc's allocator, which has one for each thread of the compiler, and what is free in one is of no use to another: glm45's
    step takes 6.1 GB with as many as it likes, 5.7 with two."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)


@contextmanager
def progress() -> Iterator[Any]:
    """A function to tell what is being done; seconds since are told every ten."""
    began, doing, done = time.monotonic(), ["starting"], threading.Event()

    def tell(what: str) -> None:
        doing[0] = what
        print(f"{time.monotonic() - began:6.0f} s  {what}", flush=True)

    def tick() -> None:
        while not done.wait(10):
            print(f"{time.monotonic() - began:6.0f} s  {doing[0]} ...", flush=True)

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield tell
    finally:
        done.set()
        thread.join()


def told(plan: dict[str, Any]) -> str:
    """The plan as text."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
    lines = [
        f"{plan['recipe']}, {plan['step']}: {plan['params'] / 1e9:.2f} B parameters, {plan['batch']} x {plan['seq']} tokens, "
        f"{plan['devices']} devices of {plan['topology']} ({mesh})",
        f"memory      arguments {plan['args_gib']:.2f}, temporaries {plan['temp_gib']:.2f}; at the peak {plan['held_gib']:.2f} GiB "
        f"of {plan['hbm_gib']:.1f}: {'fits' if plan['fits'] else 'DOES NOT FIT'}",
        f"operations  {plan['flops']:.4g}, analytic {plan['flops_analytic']:.4g} "
        f"({100 * (plan['flops'] / plan['flops_analytic'] - 1):+.1f} %)",
        "roofline    " + ", ".join(f"{name} {seconds:.3f} s" for name, seconds in plan["roofline_s"].items()),
        f"MFU bound   {plan['mfu_bound']:.3f} with all overlapped, by {_bound_by(plan)}; "
        f"{plan['mfu_bound_without_overlap']:.3f} with nothing",
        f"compiled    in {plan['compile_s']:.0f} s, {plan['peak_rss_gb']:.1f} GB of memory",
    ]
    lines += [f"{name:<12}{_program(one)}" for name, one in plan.get("programs", {}).items()]
    if "tokens_per_second_bound" in plan:
        lines.append(f"sampling    {plan['tokens_per_second_bound']:.0f} tokens/s at most, of all devices")
    lines.append("traffic     GB received, and the least:")
    lines += [
        f"  {key:<36} {row['bytes'] / 1e9:10.3f} {row['minimum'] / 1e9:10.3f}"
        for key, row in plan["collectives"].items()
    ]
    lines.append("largest     arrays that the program makes:")
    lines += [f"  {one['gib']:7.3f} GiB  {one['array']}  {one['hint'] or one['source']}" for one in plan["largest"]]
    return "\n".join(lines)


def _program(plan: dict[str, Any]) -> str:
    times = ", ".join(f"{name} {seconds:.4f}" for name, seconds in plan["roofline_s"].items())
    return f"at the peak {plan['held_gib']:.2f} GiB; {times} s; compiled in {plan['compile_s']:.0f} s"


def _changed(run: Run, step: str) -> dict[str, Any]:
    """Fields that are not as in the run's recipe, but for its mesh, which a plan has of its own, and what its step does not read."""
    unread = ("mesh.", "optim.") if step == "grpo" else ("mesh.",)
    recipe = recipes.RECIPES.get(run.name, lambda: run)()
    return {path: now for path, (_, now) in diff(run, recipe).items() if not path.startswith(unread)}


def _variant(plan: dict[str, Any]) -> str:
    """What of the plan is not usual."""
    changed = [f"{path.rpartition('.')[2]} {value}" for path, value in plan["changed"].items()]
    return "".join(f", {what}" for what in ([] if plan["step"] == "train" else [plan["step"]]) + changed)


def _bound_by(plan: dict[str, Any]) -> str:
    """What takes longest."""
    seconds = plan["roofline_s"]
    return max(seconds, key=lambda name: seconds[name])


def table(paths: list[Path]) -> str:
    """The plans as a table of Markdown."""
    lines = [
        "| recipe | devices | mesh | batch x seq | arguments + temporaries (at the peak) of GiB | operations over analytic "
        "| MFU bound, by |",
        "|---|---|---|---|---|---|---|",
    ]
    for path in paths:
        plan = json.loads(path.read_text())
        mesh = ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
        cells = (
            f"{plan['recipe']}{_variant(plan)}", f"{plan['devices']}: {plan['topology']}", mesh, f"{plan['batch']} x {plan['seq']:,}",
            f"{plan['args_gib']:.2f} + {plan['temp_gib']:.2f} ({plan['peak_temp_gib']:.2f}) of {plan['hbm_gib']:.0f}"
            f"{'' if plan['fits'] else ': does not fit'}",
            f"{plan['flops'] / plan['flops_analytic']:.3f}", f"{plan['mfu_bound']:.2f}, {_bound_by(plan)}",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.main(main)
