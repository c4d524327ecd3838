"""The very train step of a run, laid out over a machine's mesh and compiled for its chips."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from glm_jax import mesh, model
from glm_jax.config import Mesh as Sizes
from glm_jax.config import Run
from glm_jax.optim import optimizer
from glm_jax.plan.kernels import operations
from glm_jax.plan.target import Target
from glm_jax.train import state
from glm_jax.train.step import Knobs, train_step

INTEGERS = ("ids", "targets", "positions", "segments")
WEIGHTS = ("weights",)
MTP = {"mtp_targets": jnp.int32, "mtp_weights": jnp.float32}


@dataclasses.dataclass(frozen=True)
class Compiled:
    argument_bytes: int
    temporary_bytes: int  # jax's temp_size: more than is ever held at once, where arguments are donated
    peak_bytes: int  # held at the peak beside arguments and results that are no arguments
    seconds: float  # to trace and compile
    text: str
    kernels: Counter[str]  # operations of the traced kernels by name, of which a GPU's program tells nothing


def compile_step(
    run: Run, target: Target, sizes: Sizes, rows: int, length: int, tell: Callable[[str], Any]
) -> Compiled:
    """One microbatch of `rows` of `length` tokens. `tell` hears what is being done. RuntimeError with the compiler's
    message where it gives up."""
    began = perf_counter()
    tell(f"{target.name}: {target.count} devices")
    with jax.set_mesh(mesh.make(sizes, target.devices)):
        tx = optimizer(run.optim, model.specs(run.model))
        tell("tracing the train step")
        traced = train_step.trace(
            state.abstract(run.model, tx), _batch(run, rows, length), _knobs(), cfg=run.model, tx=tx,
            sequence_balance=run.loss.sequence_balance,
        )  # fmt: skip
        tell("compiling")
        compiled = traced.lower().compile()
    used, text = compiled.memory_analysis(), compiled.as_text()
    if used is None or text is None:
        raise RuntimeError(f"the compiler for {target.name} tells neither memory nor program")
    kept = used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
    counted, peak = used.temp_size_in_bytes, used.peak_memory_in_bytes
    held = peak - kept if peak > kept else counted  # not every compiler tells its peak
    return Compiled(
        used.argument_size_in_bytes, counted, held, perf_counter() - began, text, operations(traced.jaxpr.jaxpr)
    )


def _batch(run: Run, rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    layout = mesh.batch_sharding(jax.sharding.get_mesh())
    kinds = dict.fromkeys(INTEGERS, jnp.int32) | dict.fromkeys(WEIGHTS, jnp.float32)
    kinds |= MTP if run.model.mtp_layers else {}
    return {name: jax.ShapeDtypeStruct((1, rows, length), kind, sharding=layout) for name, kind in kinds.items()}


def _knobs() -> Knobs:
    everywhere = NamedSharding(jax.sharding.get_mesh(), PartitionSpec())
    kinds = {field.name: jnp.float32 for field in dataclasses.fields(Knobs)} | {"microbatches": jnp.int32}
    shapes: dict[str, Any] = {n: jax.ShapeDtypeStruct((), kind, sharding=everywhere) for n, kind in kinds.items()}
    return Knobs(**shapes)
