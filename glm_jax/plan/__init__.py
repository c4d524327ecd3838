"""What a step of training, of RL or of sampling needs on machines that are not here: by arithmetic in a second, by their
compiler in minutes.

    machine = target("v5p:8x8x8")
    step = check(run, machine, Mesh(fsdp=64, expert=8), rows=512, length=4096)      # ConfigError for what cannot be
    figures = plan(step, machine, tell=print)

Bytes and operations are of one device and one step. The roofline bounds: no step takes less than the largest of its times
for compute, memory and the two networks, and none that overlaps nothing less than their sum. What depends on the router is counted as if
it were balanced: the rows of a grouped product, and those that a ragged all-to-all carries.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from glm_jax import mesh, model
from glm_jax.config import ConfigError, Run, nearest, replace
from glm_jax.config import Mesh as Sizes
from glm_jax.parallel import ragged
from glm_jax.parallel.expert import pieces
from glm_jax.plan import analytic, sampling
from glm_jax.plan.analytic import SAMPLING, Work
from glm_jax.plan.hlo import RAGGED, Collective, Program
from glm_jax.plan.target import GIB, Target, names, target
from glm_jax.spec import count

__all__ = ["GIB", "Program", "Target", "Work", "check", "plan", "target"]

STEPS = ("train", "grpo", "sample")
LARGEST = 8  # arrays that are told
WORKING = 0.1  # of a device's memory, for what layers compute with
THRIFT: tuple[dict[str, str], ...] = (  # what makes a step need less memory, the cheapest first
    {"model.remat": "layer"},
    {"model.remat": "offload"},
    {"optim.momentum_dtype": "bfloat16"},
    {"optim.momentum_dtype": "bfloat16", "model.remat": "offload"},
)
TO_ONE = ("all-to-all", RAGGED)  # collectives whose bytes one device each wants
# parts of the names of kernels whose cost estimate counts every row that there is room for; balanced, a share of them is real
GROUPED = ("gmm", "gate_up", "hidden_grad", "rows_grad")


def check(run: Run, machine: Target, sizes: Sizes, rows: int, length: int, step: str = "train") -> Work:
    """The step, if it can be laid out and its unavoidable memory fits. ConfigError with the rule and the way out.

    step: "train"; "grpo", RL's update with the settings of `run.post.unify.grpo`; or "sample", in which `rows` rows read
    half of `length` tokens and draw the other half.
    """
    work = laid_out(run, machine, sizes, rows, length, step)
    if not _fits(work, machine):
        raise ConfigError(_does_not_fit(work, machine, arithmetic(work).memory(work)))
    return work


def laid_out(run: Run, machine: Target, sizes: Sizes, rows: int, length: int, step: str = "train") -> Work:
    """`check` without memory."""
    if step not in STEPS:
        raise ConfigError(f"step={step!r} is not among those that can be planned; {nearest(step, list(STEPS))}")
    sizes = mesh.fill(sizes, machine.count)
    if sizes.data % machine.slices:
        raise ConfigError(
            f"mesh data={sizes.data} must be a multiple of slices={machine.slices}: data goes over slices; set data={machine.slices}"
        )
    if sizes.pipeline > 1:
        raise ConfigError(
            f"mesh pipeline={sizes.pipeline}: the planner counts neither a pipeline's bubble nor its traffic; plan with pipeline=1"
        )
    if length > run.model.max_positions:
        raise ConfigError(f"seq={length} exceeds max_positions={run.model.max_positions}; use at most that")
    run = replace(run, optim=run.post.unify.grpo.optim) if step == "grpo" else run
    work = dataclasses.replace(analytic.work(run, sizes, rows, length), step=step, prompt=length // 2, gpu=machine.gpu)
    mesh.check(mesh.abstract(sizes), model.specs(run.model), rows, length)
    if step == "sample":
        sampling.check(work)
    return work


def plan(work: Work, machine: Target, tell: Callable[[str], Any]) -> dict[str, Any]:
    """Compile the step and read what it needs.

    Keys: what was planned ("recipe" to "params"); GiB of a device by what they are for (*_gib), "held_gib" at the peak, which
    decides "fits"; "flops", and what arithmetic counts ("flops_analytic"); bytes received and the least ("collectives"); the
    bounds ("roofline_s", "mfu_bound" with all of them overlapped); the "largest" arrays. Of "sample" its "programs" as well,
    and "tokens_per_second_bound" of all devices.
    """
    if work.step != "sample":
        return _program(work, machine, tell)
    programs = {name: _program(dataclasses.replace(work, step=name), machine, tell) for name in SAMPLING}
    return sampling.turn(work, programs)


def arithmetic(work: Work) -> Any:
    """The module that counts for this step: `analytic`, or `sampling`."""
    return sampling if work.step in ("sample", *SAMPLING) else analytic


def network_seconds(work: Work, machine: Target, traffic: dict[str, float]) -> dict[str, float]:
    """For the bytes of each "axis kind" that a device receives: over the fast links of a slice or of a host of GPUs ("network"), and
    over what joins several ("dcn"); permutations, of which little is known, count as near. A ragged all-to-all's bytes take up
    every link that they cross, while of gathered rows each link that they cross leads to a device that wants them."""
    crossed = machine.crossed(work.axes[mesh.EXPERT] * work.axes[mesh.TENSOR])  # tensor's devices lie between
    near = far = 0.0
    for key, size in traffic.items():
        axes, _, kind = key.rpartition(" ")
        share = _from_afar(work, machine, axes.split("+"), kind)
        near += size * (1 - share) * (crossed if kind == RAGGED else 1)
        far += size * share
    return {"network": near / machine.link_bandwidth, "dcn": far / machine.dcn_bandwidth}


def _from_afar(work: Work, machine: Target, axes: list[str], kind: str) -> float:
    """The share of what a device receives along these axes that comes from other slices, or hosts of GPUs, at the least, of the
    device with most: what all devices of one want comes there once, a part to each, and is passed on."""
    along = [d for d, axis in enumerate(work.axes) if axis in axes]
    devices = math.prod(list(work.axes.values())[d] for d in along)
    if devices == 1 or machine.island >= work.devices:
        return 0.0
    island = np.arange(work.devices).reshape(*work.axes.values()) // machine.island
    groups = np.moveaxis(island, along, range(len(along))).reshape(devices, -1).T
    alike = np.unique(groups - groups[:, :1], axis=0)
    together = min(np.unique(group, return_counts=True)[1].min() for group in alike)  # in the smallest part of a group
    return (devices - together) / (1 if kind in TO_ONE else together) / (devices - 1)


def _program(work: Work, machine: Target, tell: Callable[[str], Any]) -> dict[str, Any]:
    from glm_jax.plan.program import compile_step

    compiled, by = compile_step(work, machine, tell), arithmetic(work)
    tell("reading what was compiled")
    program = Program(compiled.text)
    operations = by.operations(work)
    counted = dict(program.flops)
    if machine.gpu:
        counted |= {name: times * compiled.kernels[name] for name, times in program.kernels.items()}
    chunk, room, real = _routed(work, machine)
    flops = sum(n * (real if _grouped(name) else _attended(work, name)) for name, n in counted.items())
    collectives = _collectives(work, program.collectives, _sent(work, chunk))
    seconds = {
        "compute": flops / machine.chip.flops,
        "memory": program.bytes_moved / machine.chip.bandwidth,
    } | network_seconds(work, machine, {key: row["bytes"] for key, row in collectives.items()})
    useful = operations["model"] / machine.chip.flops
    used = compiled.argument_bytes + compiled.result_bytes + compiled.peak_bytes
    return {
        "recipe": work.run.name,
        "step": work.step,
        "topology": machine.name,
        "slices": machine.slices,
        "devices": machine.count,
        "mesh": work.axes,
        "batch": work.rows,
        "seq": work.length,
        "remat": work.run.model.remat,
        "params": count(model.specs(work.run.model)),
        "args_gib": compiled.argument_bytes / GIB,
        "results_gib": compiled.result_bytes / GIB,
        "temp_gib": compiled.temporary_bytes / GIB,
        "peak_temp_gib": compiled.peak_bytes / GIB,
        "held_gib": used / GIB,
        "hbm_gib": machine.chip.memory / GIB,
        "fits": used <= machine.chip.memory,
        "compile_s": compiled.seconds,
        "flops": flops,
        "flops_analytic": sum(operations.values()),
        "flops_by": counted,
        "flops_analytic_by": operations,
        "collectives": collectives,
        "roofline_s": seconds,
        "mfu_bound": useful / max(seconds.values()),
        "mfu_bound_without_overlap": useful / sum(seconds.values()),
        "memory_analytic_gib": {term: size / GIB for term, size in by.memory(work).items()},
        "largest": [
            {
                "gib": shape.bytes / GIB,
                "array": str(shape),
                "by": by,
                "source": source,
                "hint": _hint(work, room, shape.dims),
            }
            for by, shape, source in program.largest(LARGEST)
        ],
    }


def _routed(work: Work, machine: Target) -> tuple[int, int, float]:
    """Tokens of a chunk, for how many of its routed rows there is room, and the share of them that is real, balanced."""
    tokens, choices = max(1, round(work.tokens)), work.run.model.A
    chunks, room = pieces(tokens, choices, work.axes[mesh.EXPERT], "gpu" if machine.gpu else "tpu")
    return tokens // chunks, room, tokens * choices / (chunks * room)


def _sent(work: Work, chunk: int) -> float:
    """The share of the rows that a ragged exchange could carry that it does carry, balanced."""
    of_axis = work.run.model.A, work.run.model.E, work.axes[mesh.EXPERT]
    return ragged.balanced(chunk, *of_axis) / min(ragged.rows(chunk, *of_axis))


def _grouped(kernel: str) -> bool:
    return any(name in kernel for name in GROUPED)


def _attended(work: Work, kernel: str) -> float:
    """The share of what a kernel's cost estimate counts that is real: attention's has all keys that a cache has room for."""
    return work.prompt / work.length if work.step == "prefill" and "attention" in kernel else 1.0


def _collectives(work: Work, found: list[Collective], sent: float) -> dict[str, dict[str, float]]:
    """Bytes of each "axis kind" that a device receives in a step, beside the least; of a ragged exchange the share `sent`."""
    names, sizes = list(work.axes), list(work.axes.values())
    received: dict[str, float] = defaultdict(float)
    for one in found:
        places = [_place(device, sizes) for device in one.devices]
        axes = [name for d, name in enumerate(names) if len({place[d] for place in places}) > 1]
        real = sent if one.kind == RAGGED else 1
        received[f"{'+'.join(axes)} {one.kind}".strip()] += one.bytes * one.times * real
    least = arithmetic(work).traffic(work)
    return {key: {"bytes": received[key], "minimum": least.get(key, 0.0)} for key in sorted({*received, *least})}


def _place(device: int, sizes: list[int]) -> tuple[int, ...]:
    place = []
    for size in reversed(sizes):
        device, one = divmod(device, size)
        place.append(one)
    return tuple(reversed(place))


def _hint(work: Work, room: int, dims: tuple[int, ...]) -> str:
    """What an array of these dimensions is, and what makes it smaller."""
    cfg, tensor = work.run.model, work.axes[mesh.TENSOR]
    row = (work.length // work.axes[mesh.CONTEXT], cfg.D)
    if dims[-2:] == row and len(dims) == 4 and dims[0] in (cfg.moe_layers, cfg.dense_layers):
        return "residuals: what each layer keeps for its backward pass; remat=offload moves them to the host's memory"
    if cfg.V in dims or cfg.V // (work.axes[mesh.EXPERT] * tensor) in dims:
        return "the embedding or the output matrix, its gradient, or a chunk of logits"
    if len(dims) == 2 and dims[0] == room and dims[1] in (cfg.D, cfg.M // tensor):
        return "routed rows of a chunk of tokens: room for somewhat more than a device has on average"
    if work.step in SAMPLING and dims[1::2] == (cfg.K // tensor, cfg.H):
        return "keys or values of a layer in the cache: fewer rows a device or shorter ones make it smaller"
    if len(dims) >= 3 and dims[0] in (cfg.moe_layers, cfg.dense_layers):
        return (
            "a stack of weights, gradients or momentum at its shard: more devices along fsdp or expert make it smaller"
        )
    return ""


def _does_not_fit(work: Work, machine: Target, needed: dict[str, float]) -> str:
    chip = machine.chip.memory
    terms = ", ".join(f"{term} {size / GIB:.1f} GiB" for term, size in needed.items())
    largest = max(needed, key=lambda term: needed[term])
    ways = [way for way in (_smallest(work, machine), _thriftier(work, machine)) if way]
    less = "" if largest.startswith("state") else ", fewer rows or shorter ones"  # rows have no part in the state
    return (
        f"plan cannot fit: {terms} a device, and {machine.kind} has {chip / GIB:.1f}; what overflows is {largest}. "
        + ("; ".join(ways) or f"Use a larger machine{less}")
    )


def _fits(work: Work, machine: Target) -> bool:
    return sum(arithmetic(work).memory(work).values()) <= machine.chip.memory


def _smallest(work: Work, machine: Target) -> str:
    """What would fit by arithmetic: a wider expert axis where that helps, else the smallest topology of the same chip, this one
    with all of `data` given to `fsdp` among them."""
    if work.step == "sample" and (other := sampling.wider(work, machine.chip.memory)):
        return f"A wider expert axis fits by arithmetic: {mesh.told(other.axes)}"
    for name in names(machine.kind):
        other = target(name)
        kept = {axis: work.axes[axis] for axis in (mesh.EXPERT, mesh.CONTEXT, mesh.TENSOR)}
        fsdp, left = divmod(other.count, math.prod(kept.values()))
        if other.count < machine.count or left:
            continue
        try:
            larger = laid_out(work.run, other, Sizes(fsdp=fsdp, **kept), work.rows, work.length, work.step)
        except ConfigError:
            continue
        if _fits(larger, machine):
            return f"The smallest that fits by arithmetic: {name} with {mesh.told(larger.axes)}"
    return ""


def _thriftier(work: Work, machine: Target) -> str:
    """What makes the same batch fit on the same machine, by arithmetic, with a tenth left for what layers compute with."""
    for changes in THRIFT:
        needed = arithmetic(work).memory(dataclasses.replace(work, run=replace(work.run, **changes)))
        if work.step != "sample" and sum(needed.values()) <= (1 - WORKING) * machine.chip.memory:
            own = "post.unify.grpo." if work.step == "grpo" else ""  # RL's optimizer has settings of its own
            named = ((own + field if field.startswith("optim.") else field, value) for field, value in changes.items())
            options = " ".join(f"--{field} {value}" for field, value in named)
            return f"On {machine.name} it fits by arithmetic with {options}"
    return ""
