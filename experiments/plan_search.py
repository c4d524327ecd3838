"""`experiments.plan --search`: the meshes that divide a machine, by arithmetic first, and the compiler for the best few.

A mesh is compiled in a process of its own, so that its memory is its own and a compiler that dies takes nothing with it.
"""

import json
import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm_jax.config import Run

if TYPE_CHECKING:
    from glm_jax.plan.search import Candidate, Found
    from glm_jax.plan.target import Target

TRIES = 3  # meshes compiled at most, for each that is wanted and fits


PlanOne = Callable[[str, Path], Any]  # plans one mesh, as --mesh takes it, and writes the JSON


def search(
    run: Run, machine: "Target", size: tuple[int, int], step: str, best: int, plan_one: PlanOne
) -> dict[str, Any]:
    """Try, rank, tell; returns what the JSON has: the best compiled, all others by arithmetic, and why not the rest.

    size: rows, and tokens of a row. `plan_one` is called in other processes.
    """
    from glm_jax.plan.search import search, told

    found = search(run, machine, *size, step)
    print(
        f"{len(found.candidates)} meshes of {machine.count} devices fit by arithmetic, {len(found.too_large)} do not, "
        f"{len(found.refused)} cannot be laid out",
        flush=True,
    )
    compiled: list[dict[str, Any]] = []
    for number, one in enumerate(found.candidates[: TRIES * best], 1):
        if sum(bool(plan.get("fits")) for plan in compiled) == best:
            break
        name = told(one.work.axes)
        print(f"\n{number}: {name}: {one.gib:.1f} GiB and {one.total:.2f} s by arithmetic", flush=True)
        compiled.append({"mesh_told": name} | _in_a_process(plan_one, name))
    ranked = sorted(compiled, key=rank)
    print("\n" + table(found, ranked))
    return {
        "recipe": run.name, "step": step, "topology": machine.name, "slices": machine.slices,
        "devices": machine.count, "batch": size[0], "seq": size[1], "ranked": ranked,
        "by_arithmetic": [_described(one) for one in found.candidates],
        "too_large_gib": found.too_large, "refused": found.refused,
    }  # fmt: skip


def rank(plan: dict[str, Any]) -> tuple[bool, float]:
    """What fits comes first, then by the least time with nothing overlapped; what did not compile is last."""
    return not plan.get("fits"), sum(plan["roofline_s"].values()) if "roofline_s" in plan else float("inf")


def table(found: "Found", ranked: list[dict[str, Any]]) -> str:
    """The best by arithmetic, those that were compiled with the compiler's figures in front."""
    lines = [
        f"{'':2} {'mesh':<34} {'GiB at the peak':>16} {'compute':>8} {'memory':>8} {'network':>8} {'dcn':>8} s {'MFU bound':>10}"
    ]
    for place, plan in enumerate(ranked, 1):
        if "error" in plan:
            lines.append(f"{place:2} {plan['mesh_told']:<34} {plan['error']}")
            continue
        lines.append(
            _row(
                str(place),
                plan["mesh_told"],
                plan["held_gib"],
                plan["roofline_s"],
                f"{plan['mfu_bound']:.3f}",
                plan["fits"],
            )
        )
    done = {plan["mesh_told"] for plan in ranked}
    others = [one for one in map(_described, found.candidates) if one["mesh_told"] not in done][:5]
    lines += ["   not compiled, by arithmetic:"] if others else []
    lines += [_row("", one["mesh_told"], one["gib"], one["seconds"], "", True) for one in others]
    return "\n".join(lines)


def _row(place: str, name: str, gib: float, seconds: dict[str, float], bound: str, fits: bool) -> str:
    times = " ".join(f"{seconds[key]:8.3f}" for key in ("compute", "memory", "network", "dcn"))
    return f"{place:>2} {name:<34} {gib:16.2f} {times}   {bound:>10}{'' if fits else '  DOES NOT FIT'}"


def _described(one: "Candidate") -> dict[str, Any]:
    from glm_jax.plan.search import told

    return {"mesh_told": told(one.work.axes), "mesh": one.work.axes, "gib": one.gib, "seconds": one.seconds}


def _in_a_process(plan_one: PlanOne, mesh: str) -> dict[str, Any]:
    """The plan for one mesh, or {"error": ...}."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "plan.json"
        process = multiprocessing.get_context("spawn").Process(target=plan_one, args=(mesh, out))
        process.start()
        process.join()
        if out.exists():
            return json.loads(out.read_text())
        return {"error": f"not compiled: its process ended with {process.exitcode}, see above"}
