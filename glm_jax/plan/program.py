"""The very programs of a run, laid out over a machine's mesh and compiled for its chips."""

import dataclasses
from collections.abc import Callable
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from glm_jax import mesh, model
from glm_jax.config import Mesh as Sizes
from glm_jax.losses import Policy
from glm_jax.optim import optimizer
from glm_jax.plan import analytic
from glm_jax.plan.analytic import Work
from glm_jax.plan.kernels import operations
from glm_jax.plan.target import Target
from glm_jax.sample import engine
from glm_jax.train import state
from glm_jax.train.step import Knobs, train_step

INTEGERS = ("ids", "targets", "positions", "segments")
WEIGHTS = ("weights",)
MTP = {"mtp_targets": jnp.int32, "mtp_weights": jnp.float32}
RL = {"prefixes": jnp.int32, "advantages": jnp.float32, "old_log_probs": jnp.float32}


@dataclasses.dataclass(frozen=True)
class Compiled:
    argument_bytes: int
    temporary_bytes: int  # jax's temp_size: more than is ever held at once, where arguments are donated
    peak_bytes: int  # held at the peak beside arguments and results that are no arguments
    seconds: float  # to trace and compile
    text: str
    kernels: dict[str, float]  # operations of one call of each kernel by name, of which a GPU's program tells nothing
    result_bytes: int = 0  # that take no argument's place


def compile_step(now: Work, target: Target, tell: Callable[[str], Any]) -> Compiled:
    """Its program. `tell` hears what is being done. RuntimeError with the compiler's message where it gives up."""
    began = perf_counter()
    tell(f"{target.name}: {target.count} devices")
    with jax.set_mesh(mesh.make(Sizes(**now.axes), target.devices)):
        tell(f"tracing {now.step}")
        traced = _sampling(now) if now.step in analytic.SAMPLING else _training(now)
        tell("compiling")
        compiled = traced.lower().compile()
    used, text = compiled.memory_analysis(), compiled.as_text()
    if used is None or text is None:
        raise RuntimeError(f"the compiler for {target.name} tells neither memory nor program")
    results = used.output_size_in_bytes - used.alias_size_in_bytes
    kept = used.argument_size_in_bytes + results
    counted, peak = used.temp_size_in_bytes, used.peak_memory_in_bytes
    held = peak - kept if peak > kept else counted  # not every compiler tells its peak
    made = operations(traced.jaxpr.jaxpr)
    return Compiled(used.argument_size_in_bytes, counted, held, perf_counter() - began, text, made, results)


def _training(now: Work) -> jax.stages.Traced:
    """One microbatch, as pre-training gives it to `train_step`, or RL with the policy that drew it."""
    cfg, grpo = now.run.model, now.run.post.unify.grpo
    tx = optimizer(now.run.optim, model.specs(cfg))
    how: dict[str, Any] = {"sequence_balance": now.run.loss.sequence_balance}
    if now.step == "grpo":
        how = {"policy": Policy((grpo.clip_low, grpo.clip_high), grpo.temperature, grpo.clip_c)}
    return train_step.trace(state.abstract(cfg, tx), _batch(now), _knobs(), cfg=cfg, tx=tx, **how)


def _sampling(now: Work) -> jax.stages.Traced:
    what = "prefill" if now.step == "prefill" else "decode"
    return engine.traced(now.run.model, what, now.rows, now.prompt, now.length - now.prompt)


def _batch(now: Work) -> dict[str, jax.ShapeDtypeStruct]:
    cfg, grpo = now.run.model, now.run.post.unify.grpo
    layout = mesh.batch_sharding(jax.sharding.get_mesh())
    kinds = dict.fromkeys(INTEGERS, jnp.int32) | dict.fromkeys(WEIGHTS, jnp.float32)
    if now.step == "grpo":
        kinds |= RL
    else:
        kinds |= MTP if cfg.mtp_layers else {}

    def shaped(kind: Any, *more: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, now.rows, now.length, *more), kind, sharding=layout)

    batch = {name: shaped(kind) for name, kind in kinds.items()}
    if now.step == "grpo" and grpo.routing_replay:
        batch["experts"] = shaped(jnp.int16, cfg.moe_layers, cfg.A)
    return batch


def _knobs() -> Knobs:
    everywhere = NamedSharding(jax.sharding.get_mesh(), PartitionSpec())
    kinds = {field.name: jnp.float32 for field in dataclasses.fields(Knobs)} | {"microbatches": jnp.int32}
    shapes: dict[str, Any] = {n: jax.ShapeDtypeStruct((), kind, sharding=everywhere) for n, kind in kinds.items()}
    return Knobs(**shapes)
