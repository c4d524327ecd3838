"""Which meshes a step could be laid out over, the most promising first: by arithmetic alone, in seconds."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from glm_jax import mesh
from glm_jax.config import ConfigError, Run
from glm_jax.config import Mesh as Sizes
from glm_jax.plan import arithmetic, laid_out, network_seconds, sampling
from glm_jax.plan.analytic import SAMPLING, Work
from glm_jax.plan.target import GIB, Target

ALIKE = 0.02  # relative difference of times that arithmetic does not tell apart; the one with less memory comes first


@dataclass(frozen=True)
class Candidate:
    """A mesh that a step fits on, as far as arithmetic knows: GiB that cannot be avoided, and the least seconds."""

    work: Work
    gib: float
    seconds: dict[str, float]

    @property
    def total(self) -> float:
        """With nothing overlapped."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Found:
    candidates: list[Candidate]  # the best first
    refused: dict[str, str]  # mesh -> why it cannot be laid out
    too_large: dict[str, float]  # mesh -> GiB that do not fit


def search(run: Run, machine: Target, rows: int, length: int, step: str) -> Found:
    """Every mesh of data, fsdp, context and expert axes that divides the machine. ConfigError where nothing can be laid out and fits."""
    found = Found([], {}, {})
    for sizes in meshes(machine.count, machine.slices):
        if step == "sample" and sizes.data > machine.slices:
            continue  # the same program as with more of fsdp
        name = told(mesh.sizes_of(sizes))
        try:
            work = laid_out(run, machine, sizes, rows, length, step)
        except ConfigError as error:
            found.refused[name] = str(error)
            continue
        gib = sum(arithmetic(work).memory(work).values()) / GIB
        if gib > machine.chip.memory / GIB:
            found.too_large[name] = gib
        else:
            found.candidates.append(Candidate(work, gib, seconds(work, machine)))
    if not found.candidates:
        least = min(found.too_large.items(), key=lambda one: one[1], default=None)
        why = f"the smallest, {least[0]}, needs {least[1]:.1f} GiB" if least else next(iter(found.refused.values()))
        raise ConfigError(
            f"none of the {len(found.refused) + len(found.too_large)} meshes of {machine.name} can be: {why}; use a larger "
            "machine, or another --batch or --seq"
        )
    found.candidates.sort(key=lambda one: (round(math.log(one.total) / ALIKE), round(one.gib, 2), one.total))
    return found


def seconds(work: Work, machine: Target) -> dict[str, float]:
    """What it takes at the least, by what limits it: of sampling the memory too, from which every token reads what is held."""
    if work.step == "sample":
        parts = [(seconds(replace(work, step=name), machine), times) for name, times in sampling.runs(work).items()]
        return {key: sum(times * one[key] for one, times in parts) for key in parts[0][0]}
    by = arithmetic(work)
    held = sum(by.memory(work).values()) if work.step in SAMPLING else 0.0
    return {
        "compute": sum(by.operations(work).values()) / machine.chip.flops,
        "memory": held / machine.chip.bandwidth,
    } | network_seconds(work, machine, by.traffic(work))


def meshes(devices: int, slices: int = 1) -> Iterator[Sizes]:
    """Every mesh of these axes of so many devices; `data` goes over the slices."""
    for data in _divisors(devices):
        if data % slices == 0:
            for fsdp in _divisors(devices // data):
                for context in _divisors(devices // data // fsdp):
                    yield Sizes(data=data, fsdp=fsdp, context=context, expert=devices // data // fsdp // context)


def told(axes: dict[str, int]) -> str:
    """The axes above 1, as --mesh takes them."""
    return ",".join(f"{axis}={size}" for axis, size in axes.items() if size > 1) or "fsdp=1"


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})
