"""What sampling needs at the least, by arithmetic, as `analytic` has it for a training step: of "prefill", which reads the
prompts into the cache, and of "decode", one token of every row. Weights are held as they are used, in the model's dtype."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from glm_jax import mesh, model
from glm_jax.config import ConfigError
from glm_jax.model import counts
from glm_jax.plan.analytic import BF16, FLOAT32, Transfer, Work, dispatched, itemsize, received
from glm_jax.spec import Spec, leaves

INT32 = 4


def check(now: Work) -> None:
    """ConfigError for sizes that the sampler would round up, and for a mesh on which it cannot run."""
    if now.axes[mesh.CONTEXT] > 1:
        raise ConfigError(
            f"mesh.context={now.axes[mesh.CONTEXT]} splits rows of tokens, and sampling reads them one by one; give its devices "
            "to expert or fsdp"
        )
    for name, size, unit in (("batch", now.rows, now.parts), ("seq", now.length, 32)):
        part = size // unit
        if size % unit or part & (part - 1):
            near = unit << max(0, math.ceil(math.log2(max(1, size) / unit)))
            raise ConfigError(
                f"{name}={size}: sampling is compiled for {unit} times a power of two, half of a row being prompt; use {near}"
            )


def runs(now: Work) -> dict[str, int]:
    """How often each program runs in a turn: a trip of the loop that draws counts as one."""
    return {"prefill": 1, "decode": now.length - now.prompt}


def turn(now: Work, programs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The plan of a turn from its programs': memory as the larger one's, the rest added up, "decode" as often as it draws."""
    times = runs(now)
    first = programs["prefill"]
    found = first | {"step": now.step, "programs": programs, "fits": all(one["fits"] for one in programs.values())}
    for key in ("args_gib", "results_gib", "temp_gib", "peak_temp_gib", "held_gib"):
        found[key] = max(one[key] for one in programs.values())
    found["compile_s"] = sum(one["compile_s"] for one in programs.values())
    for key in ("flops", "flops_analytic", "flops_by", "flops_analytic_by", "collectives", "roofline_s"):
        found[key] = _sum([(one[key], times[name]) for name, one in programs.items()])
    found["largest"] = sorted((row for one in programs.values() for row in one["largest"]), key=lambda row: -row["gib"])
    useful = {name: one["mfu_bound"] * max(one["roofline_s"].values()) for name, one in programs.items()}
    seconds = sum(times[name] * max(one["roofline_s"].values()) for name, one in programs.items())
    alone = sum(times[name] * sum(one["roofline_s"].values()) for name, one in programs.items())
    work = sum(times[name] * one for name, one in useful.items())
    found |= {"mfu_bound": work / seconds, "mfu_bound_without_overlap": work / alone}
    return found | {"tokens_per_second_bound": now.rows * times["decode"] / seconds}


def _sum(parts: list[tuple[Any, int]]) -> Any:
    """Of numbers, or of dictionaries of them, each so many times."""
    if not isinstance(parts[0][0], dict):
        return sum(times * one for one, times in parts)
    found: dict[str, list] = defaultdict(list)
    for one, times in parts:
        for key, value in one.items():
            found[key].append((value, times))
    return {key: _sum(values) for key, values in found.items()}


def memory(now: Work) -> dict[str, float]:
    """Bytes of what stays on a device while it samples, by term."""
    cfg = now.run.model
    weights = sum(_bytes(now, name, spec) for name, spec in leaves(model.specs(cfg)))
    noted = BF16 * cfg.moe_layers * cfg.A + 2 * INT32  # of each token: its experts, and where it stands
    token = counts.kv_bytes_per_token(cfg, itemsize(now)) / now.axes[mesh.TENSOR] + noted
    return {"weights in use": weights, "cache": now.rows / now.parts * now.length * token}


def wider(now: Work, room: float) -> Work | None:
    """The same over the smallest larger expert axis with which it needs no more than `room` bytes: that axis and tensor alone split
    weights in use."""
    across = now.axes[mesh.FSDP] * now.axes[mesh.EXPERT]
    for expert in range(now.axes[mesh.EXPERT] + 1, across + 1):
        if across % expert == 0 and now.run.model.E % expert == 0:
            other = dataclasses.replace(now, axes=now.axes | {mesh.FSDP: across // expert, mesh.EXPERT: expert})
            if sum(memory(other).values()) <= room:
                return other
    return None


def operations(now: Work) -> dict[str, float]:
    """Matrix products and attention, a prompt's logits at its last token alone."""
    cfg, rows, head = now.run.model, now.rows / now.parts, 2 * now.run.model.D * now.run.model.V
    if now.step == "decode":
        attended = now.prompt + (now.length - now.prompt) / 2  # the mean over a row's draws
        layers = counts.flops_per_token(cfg, round(2 * attended) - 1) - head
    else:
        layers = now.prompt * (counts.flops_per_token(cfg, now.prompt) - head)
    return {"model": rows * (layers / now.axes[mesh.TENSOR] + head)}  # the head is whole on every device


def traffic(now: Work) -> dict[str, float]:
    """Bytes that each device must receive, by "axis kind"."""
    return received(now, _transfers(now))


def _transfers(now: Work) -> Iterator[Transfer]:
    """Of every MoE layer tokens, choices and weights to the experts, sums back; of the embedding ids and rows. Along tensor the sums of
    every layer's two halves, and the embedding's rows."""
    cfg, tokens = now.run.model, now.tokens
    there, back, rows = dispatched(now)
    width, everybodys = cfg.D * itemsize(now), tokens * now.axes[mesh.EXPERT]
    yield (mesh.EXPERT,), there, cfg.moe_layers * rows * (width + cfg.A * (INT32 + FLOAT32))
    yield (mesh.EXPERT,), back, cfg.moe_layers * rows * width
    yield (mesh.EXPERT,), "all-gather", everybodys * INT32
    yield (mesh.EXPERT,), "reduce-scatter", everybodys * width
    yield (mesh.TENSOR,), "all-reduce", 2 * tokens * width * (2 * cfg.L + 1)


def _bytes(now: Work, name: str, spec: Spec) -> float:
    """The head is whole on every device, for each draws from all tokens; the MTP layer is left behind."""
    if name.startswith("mtp"):
        return 0.0
    split = 1 if spec.kind == "head" else now.shards(mesh.in_use(spec))
    return (FLOAT32 if spec.kind in ("router", "norm") else itemsize(now)) * spec.count / split
