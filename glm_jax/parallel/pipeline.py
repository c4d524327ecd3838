"""Pipeline parallelism: every stage has a share of the layers, and parts of a microbatch follow each other through the stages.

    tick      0  1  2  3  4
    stage 0   a  b  c  d  -     S = 2 stages, C = 4 parts: S + C - 1 ticks, in S - 1 of which a stage has nothing to do:
    stage 1   -  a  b  c  d     the bubble, (S - 1) / (S + C - 1) of the time, forward and backward

After a tick each stage's result goes to the next in the ring. One shard_map over the pipeline axis alone: a layer inside it finds
the other axes as ever. jax makes the backward pass of it, the same ticks from last to first; for it a stage keeps what enters
each of its layers in each tick. In the bubble it computes on what it has, and nobody reads the result.

Outside, the axis is one more of fsdp: rows are split over it, and the width of weights. So a stage is sent the shards of its layers
before the first tick, in the type that they compute in, and its gradients, summed over the parts in that type, go back after the
last; the rows of a microbatch go to the stages, and from the last stage to where they came from.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from glm_jax import mesh
from glm_jax.config import ConfigError

STAGE = P(mesh.PIPELINE)


def depth(layers: int) -> int:
    """How many of so many layers the stages take: each as many. None without a pipeline axis, or inside a stage."""
    stages = mesh.axis_size(mesh.PIPELINE)
    return layers // stages * stages if stages > 1 else 0


def check(axes: dict[str, int], rows: int, per_stage: int) -> None:
    """Raise ConfigError where a microbatch of `rows` rows cannot be split into `per_stage` parts for each stage."""
    stages = axes[mesh.PIPELINE]
    devices = per_stage
    for axis in mesh.BATCH:
        devices *= axes[axis]
    if stages > 1 and rows % devices:
        raise ConfigError(
            f"a microbatch of B={rows} rows cannot be split into {per_stage} parts for each of mesh.pipeline={stages} stages, over "
            f"{devices // per_stage // stages} devices each (data x fsdp x expert); set microbatch_rows to a multiple of {devices}, "
            f"or model.microbatches_per_stage to a divisor of {max(1, rows * per_stage // devices)}"
        )


def through_stages(
    layer: Callable[[Array, Any, Any], tuple[Array, tuple[Any, Any]]],
    layers: Any,
    x_BTD: Array,
    of_rows: Any,
    per_stage: int,
) -> tuple[Array, Any, Any]:
    """x_BTD after all `layers`, arrays [L, ...] that lie split over the stages; what the layers' parts add up to; and what
    they say of rows.

    layer(x, its arrays, of_rows) is called with some of the rows and what `of_rows` has of them, [B, ...]. It returns x and a pair:
    arrays to be summed over parts, [L, ...] in the end, and arrays with a row for each of its own, [L, B, ...].
    """
    stages = mesh.axis_size(mesh.PIPELINE)
    parts = stages * per_stage
    ring = [(stage, (stage + 1) % stages) for stage in range(stages)]

    def stage(layers: Any, x_BTD: Array, of_rows: Any) -> tuple[Array, Any, Any]:
        here = jax.lax.axis_index(mesh.PIPELINE)
        entering = jax.tree.map(partial(_to_all_stages, per_stage), (x_BTD, of_rows))

        def tick(came_BTD: Array, now: Array) -> tuple[Array, Any]:
            part = jnp.clip(now - here, 0, parts - 1)
            x_BTD, some = jax.tree.map(lambda z: jax.lax.dynamic_index_in_dim(z, part, keepdims=False), entering)
            x_BTD = jnp.where(here == 0, x_BTD, came_BTD)
            x_BTD, told = jax.lax.scan(lambda x_BTD, p: layer(x_BTD, p, some), x_BTD, layers)
            return jax.lax.ppermute(x_BTD, mesh.PIPELINE, ring), (x_BTD, told)

        first_BTD = jnp.zeros_like(entering[0][0])
        _, (x_CBTD, told) = jax.lax.scan(tick, first_BTD, jnp.arange(parts + stages - 1))
        sums, rows = jax.tree.map(lambda z: jax.lax.dynamic_slice_in_dim(z, here, parts), told)  # its own ticks
        sums = jax.tree.map(lambda z: jnp.sum(z, axis=0), sums)
        return _from_last_stage(x_CBTD[stages - 1 :]), sums, jax.tree.map(_from_all_stages, rows)

    # unchecked: of what varies over pipeline, residuals of a shard_map inside would be declared split over it once more
    run = jax.shard_map(
        stage, in_specs=STAGE, out_specs=(STAGE, STAGE, P(None, *STAGE)), axis_names={mesh.PIPELINE}, check_vma=False
    )
    return run(layers, x_BTD, of_rows)


def _to_all_stages(per_stage: int, z: Array) -> Array:
    """All parts of the microbatch, [C, rows of a part, ...], from a stage's rows. Sent to each stage singly: an all-gather's
    gradient would be a reduce-scatter, which jax cannot lower where other axes are Explicit."""
    mine = jnp.moveaxis(z.reshape(-1, per_stage, *z.shape[1:]), 1, 0)
    copies = jnp.concatenate([mine] * mesh.axis_size(mesh.PIPELINE))
    return jax.lax.all_to_all(copies, mesh.PIPELINE, split_axis=0, concat_axis=0, tiled=True)


def _from_last_stage(z: Array) -> Array:
    """Of all parts, [C, rows of a part, ...], which the last stage has, this stage's rows."""
    from_each = jax.lax.all_to_all(z, mesh.PIPELINE, split_axis=0, concat_axis=0, tiled=True)
    return _rows(from_each[-(z.shape[0] // mesh.axis_size(mesh.PIPELINE)) :])


def _from_all_stages(z: Array) -> Array:
    """[L, this stage's rows, ...] from [C, this stage's layers, rows of a part, ...]."""
    z = jax.lax.all_to_all(z, mesh.PIPELINE, split_axis=0, concat_axis=1, tiled=True)
    return jax.vmap(_rows, in_axes=1)(z)


def _rows(z: Array) -> Array:
    """A stage's rows in their order: as `_to_all_stages` took them apart."""
    return jnp.moveaxis(z, 0, 1).reshape(-1, *z.shape[2:])
