"""Pipeline parallelism: every stage has a share of the layers, and parts of a microbatch follow each other through the stages.

    tick      0  1  2  3  4
    stage 0   a  b  c  d  -     S = 2 stages, C = 4 parts: C + S - 1 ticks, in S - 1 of which a stage has nothing to do:
    stage 1   -  a  b  c  d     the bubble, (S - 1) / (C + S - 1) of the time, forward and backward

With `model.pipeline_rounds` a stage has several groups of layers, which are not neighbours, and parts go round several times:

    tick      0  1  2  3  4  5  6  7  8
    stage 0   a  b  c  d  A  B  C  D  -     R = 2 rounds, the second in capitals: group r * S + s of the layers is stage s's in
    stage 1   -  a  b  c  d  A  B  C  D     round r. A tick is 1 / R of what it was, the bubble (S - 1) / (R * C + S - 1)

Layers that do not divide among S * R groups, the last up to S * R - 1, run behind the pipeline, on all devices at once.

After a tick each stage's result goes to the next in the ring. From the last it comes to the first, where it waits for the next round,
C - S ticks, or for the end. One shard_map over the pipeline axis alone; a layer inside it finds the other axes as ever. The backward
pass is another, the same ticks from the last to the first: a stage keeps what enters each of its layers in each tick, as remat
"layer" does, and computes a layer again for its gradient. In the bubble it computes on what it has, and nobody reads the result.

Outside, the axis is one more of fsdp: rows are split over it, and the width of weights. So a stage is sent the shards of its layers
before the first tick, in the type that they compute in, and their gradients, summed over the parts in that type, go back after the
last; the rows of a microbatch go to all stages, and from the first stage, where they end, to where they came from. What is gathered of
a layer over fsdp is gathered for each part anew.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

from glm_jax.config import ConfigError, Model
from glm_jax.mesh import AXES, BATCH, PIPELINE, axes_of, axis_size, without

STAGE = P(PIPELINE)
Layer = Callable[[Array, Any, Any], tuple[Array, tuple[Any, Any]]]  # see `through_stages`


def depth(layers: int, rounds: int) -> int:
    """How many of so many layers the stages take: each as many in each round; none without a pipeline axis."""
    stages = axis_size(PIPELINE)
    groups = stages * rounds
    return layers // groups * groups if stages > 1 else 0


def check(mesh: Mesh | AbstractMesh, cfg: Model, rows: int) -> None:
    """Raise ConfigError where the stages of `mesh` cannot share the layers, or a microbatch of `rows` rows, as its devices can."""
    stages, rounds, per_stage = mesh.shape[PIPELINE], cfg.pipeline_rounds, cfg.microbatches_per_stage
    if stages > 1 and cfg.moe_layers < stages:
        raise ConfigError(
            f"{cfg.moe_layers} MoE layers cannot be shared by mesh.pipeline={stages} stages; use at most {cfg.moe_layers}"
        )
    if stages > 1 and cfg.moe_layers < stages * rounds:
        raise ConfigError(
            f"{cfg.moe_layers} MoE layers are not enough for each of mesh.pipeline={stages} stages to have one in each of "
            f"model.pipeline_rounds={rounds} rounds; use at most {cfg.moe_layers // stages} rounds"
        )
    if stages > 1 and cfg.remat == "offload":
        raise ConfigError(
            f"remat=offload: the {stages} stages of mesh.pipeline keep what enters their layers on the device; use remat=layer"
        )
    of_device = rows // math.prod(mesh.shape[axis] for axis in BATCH)
    if stages > 1 and of_device % per_stage:
        raise ConfigError(
            f"a microbatch of B={rows} rows, {of_device} of each device, cannot be split into {per_stage} parts for each stage of "
            f"mesh.pipeline={stages}; set microbatch_rows to a multiple of {rows // of_device * per_stage}, or "
            f"model.microbatches_per_stage to a divisor of {of_device}"
        )


def by_stage(layers: Any, rounds: int) -> Any:
    """Arrays [L, ...], all layers of a stage side by side, those of its first round in front. No device needs another for it while
    L is not split."""
    return jax.tree.map(lambda z: _swapped(z, rounds, axis_size(PIPELINE)), layers)


def by_layer(told: Any, rounds: int) -> Any:
    """Arrays [L, ...] in the order of the layers again, from that of `by_stage`."""
    return jax.tree.map(lambda z: _swapped(z, axis_size(PIPELINE), rounds), told)


def through_stages(
    layer: Layer,
    layers: Any,
    x_BTD: Array,
    of_rows: Any,
    most: int,
    rounds: int,
) -> tuple[Array, Any, Any]:
    """x_BTD after all `layers`, arrays [L, ...] in the order of `by_stage` that lie split over the stages (`mesh.in_stages`); and
    what the layers tell, in the same order.

    layer(x, its arrays, of_rows) is called with a part of the rows and what `of_rows`, [B, ...], has of them. It returns x and a pair
    of trees: arrays to be summed over parts, [L, ...] in the end, and arrays with its rows in front, [L, B, ...] in the end, which
    have no gradient. Rows are split into `most` parts for each stage, or fewer where a device has not so many.
    """
    most_of_device = len(x_BTD) // math.prod(map(axis_size, BATCH))
    schedule = _Schedule(layer, axis_size(PIPELINE), rounds, math.gcd(most, most_of_device))

    @jax.custom_vjp
    def run(layers: Any, x_SBTD: Array, of_rows: Any) -> Any:
        return _on_stages(schedule.forward, layers, x_SBTD, of_rows)[0]

    def forward(layers: Any, x_SBTD: Array, of_rows: Any) -> tuple[Any, Any]:
        results, kept = _on_stages(schedule.forward, layers, x_SBTD, of_rows)
        return results, (layers, of_rows, kept)

    def backward(saved: Any, gradients: tuple[Array, Any, Any]) -> tuple[Any, Array, None]:
        return *_on_stages(schedule.backward, *saved, *gradients[:2]), None

    run.defvjp(forward, backward)
    x_SBTD, sums, rows = run(layers, *jax.tree.map(_of_stages, (x_BTD, of_rows)))
    return _together(x_SBTD), sums, jax.tree.map(lambda z: _together(jnp.moveaxis(z, 0, 1), 1), rows)


@dataclass(frozen=True)
class _Schedule:
    """What one stage does, on arrays with a first dimension of 1 where rows are meant: see `_on_stages`."""

    layer: Layer
    stages: int
    rounds: int
    per_stage: int

    @property
    def parts(self) -> int:
        return self.stages * self.per_stage

    @property
    def items(self) -> int:
        """Those that a stage works on, each a part in a round: all of the first round, all of the next. In a tick it is now - here."""
        return self.rounds * self.parts

    @property
    def ticks(self) -> Array:
        return jnp.arange(self.items + self.stages - 1)

    def forward(self, layers: Any, x_1BTD: Array, of_rows: Any) -> tuple[tuple[Array, Any, Any], Array]:
        """The results, and what entered this stage's layers in each tick."""
        here = jax.lax.axis_index(PIPELINE)
        entering_CBTD, of_rows = jax.tree.map(self._to_all, (x_1BTD, of_rows))

        def tick(carry: tuple[Array, Array], now: Array) -> tuple[tuple[Array, Array], Any]:
            came_BTD, waiting_CBTD = carry  # waiting for the first stage
            waiting_CBTD = self._wait(now - self.stages, came_BTD, waiting_CBTD)
            x_BTD, some = self._part(now - here, (waiting_CBTD, of_rows))

            def step(x_BTD: Array, p: Any) -> tuple[Array, Any]:
                y_BTD, told = self.layer(x_BTD, p, some)
                return y_BTD, (x_BTD, told)

            x_BTD = jnp.where(here == 0, x_BTD, came_BTD)
            x_BTD, kept_and_told = jax.lax.scan(step, x_BTD, self._round(now - here, layers))
            return (self._send(x_BTD, 1), waiting_CBTD), kept_and_told

        start = entering_CBTD[0], entering_CBTD  # the first tick puts the first part where it is
        (last_BTD, x_CBTD), (kept, told) = jax.lax.scan(tick, start, self.ticks)
        own = jax.tree.map(lambda z: jax.lax.dynamic_slice_in_dim(z, here, self.items), told)  # not those of the bubble
        sums, rows = jax.tree.map(self._by_part, own)
        sums = jax.tree.map(lambda z: jnp.sum(z, axis=0), sums)
        rows = jax.tree.map(lambda z: _rows(_exchanged(z, 0, 1), 1)[None], rows)
        return (self._from(0, self._wait(self.items - 1, last_BTD, x_CBTD)), sums, rows), kept[None]

    def backward(self, layers: Any, of_rows: Any, kept: Array, dx_1BTD: Array, dsums: Any) -> tuple[Any, Array]:
        """Gradients of the layers and of what entered the first: the ticks of `forward`, from the last to the first."""
        here = jax.lax.axis_index(PIPELINE)
        entering_CBTD, of_rows = jax.tree.map(self._to_all, (dx_1BTD, of_rows))

        def tick(carry: tuple[Array, Array, Any], at: tuple[Array, Array]) -> tuple[tuple[Array, Array, Any], None]:
            (came_BTD, waiting_CBTD, dlayers), (now, kept_LBTD) = carry, at  # waiting for the last stage
            waiting_CBTD = self._wait(now + 1, came_BTD, waiting_CBTD)
            real = (now >= here) & (now < here + self.items)  # else it was the bubble
            dy_BTD, some = self._part(now - here, (waiting_CBTD, of_rows))
            dy_BTD = jnp.where(here == self.stages - 1, dy_BTD, came_BTD)
            p, dtold, before = self._round(now - here, (layers, dsums, dlayers))
            dy_BTD, dtold = jax.tree.map(lambda z: jnp.where(real, z, 0), (dy_BTD, dtold))

            def step(dy_BTD: Array, of_layer: Any) -> tuple[Array, Any]:
                x_BTD, p, dtold = of_layer

                def differentiable(x_BTD: Array, p: Any) -> tuple[Array, Any]:
                    y_BTD, (sums, _) = self.layer(x_BTD, p, some)
                    return y_BTD, sums

                return jax.vjp(differentiable, x_BTD, p)[1]((dy_BTD, dtold))

            dx_BTD, found = jax.lax.scan(step, dy_BTD, (kept_LBTD, p, dtold), reverse=True)
            dlayers = self._put_round(now - here, jax.tree.map(jnp.add, before, found), dlayers)
            return (self._send(dx_BTD, -1), waiting_CBTD, dlayers), None

        start = entering_CBTD[-1], entering_CBTD, jax.tree.map(jnp.zeros_like, layers)
        (last_BTD, dx_CBTD, dlayers), _ = jax.lax.scan(tick, start, (self.ticks, kept[0]), reverse=True)
        return dlayers, self._from(self.stages - 1, self._wait(0, last_BTD, dx_CBTD))

    def _at(self, item: Array | int) -> tuple[Array, Array]:
        """The round and the part of an item; in the bubble those of the first or the last."""
        return jnp.divmod(jnp.clip(item, 0, self.items - 1), self.parts)

    def _part(self, item: Array, z: Any) -> Any:
        """What arrays [C, ...] have of an item's part."""
        _, part = self._at(item)
        return jax.tree.map(lambda z: jax.lax.dynamic_index_in_dim(z, part, keepdims=False), z)

    def _wait(self, item: Array | int, came_BTD: Array, waiting_CBTD: Array) -> Array:
        """The parts that wait, with an item's that came back. What comes of the bubble is put in the place of the first item (in the
        backward pass of the last), which has left it and is not back yet."""
        _, part = self._at(item)
        return jax.lax.dynamic_update_index_in_dim(waiting_CBTD, came_BTD, part, 0)

    def _round(self, item: Array, z: Any) -> Any:
        """What arrays of a stage's layers, [L, ...], have of those of an item's round."""
        number, _ = self._at(item)
        take = jax.lax.dynamic_slice_in_dim
        return jax.tree.map(lambda z: take(z, number * (len(z) // self.rounds), len(z) // self.rounds), z)

    def _put_round(self, item: Array, some: Any, z: Any) -> Any:
        """`z` with `some` in the place of what `_round` has."""
        number, _ = self._at(item)
        put = jax.lax.dynamic_update_slice_in_dim
        return jax.tree.map(lambda some, z: put(z, some, number * len(some), 0), some, z)

    def _by_part(self, z: Array) -> Array:
        """[C, all of this stage's layers, ...] from [items, layers of a round, ...]."""
        rounds = jnp.swapaxes(z.reshape(self.rounds, self.parts, *z.shape[1:]), 0, 1)
        return rounds.reshape(self.parts, self.rounds * z.shape[1], *z.shape[2:])

    def _send(self, z: Array, by: int) -> Array:
        """To the stage so many further on the ring."""
        return jax.lax.ppermute(z, PIPELINE, [(stage, (stage + by) % self.stages) for stage in range(self.stages)])

    def _to_all(self, z: Array) -> Array:
        """All parts of the microbatch, [C, rows of a part, ...], from each stage's rows, [1, rows of a stage, ...]."""
        layout = jax.typeof(z).sharding.spec
        shape = z.shape[1] // self.per_stage, self.per_stage, *z.shape[2:]
        mine = jax.lax.reshape(z, shape, out_sharding=P(layout[1], None, *layout[2:]))
        return _exchanged(jnp.concatenate([jnp.moveaxis(mine, 1, 0)] * self.stages), 0, 0)

    def _from(self, stage: int, z: Array) -> Array:
        """Each stage's rows, of all parts that one stage has."""
        return _rows(_exchanged(z, 0, 0)[stage * self.per_stage : (stage + 1) * self.per_stage])[None]


def _on_stages(fn: Callable, *args: Any) -> Any:
    """`fn` on each stage of arrays whose first dimension is split over the stages, as its results' are.

    Inside and out the other axes are Explicit, at the border between they are Auto: where they are Explicit there, jax lowers a
    shard_map over some axes to one that gathers its arguments over all others.
    """
    explicit = jax.sharding.get_abstract_mesh()
    automatic = explicit.update_axis_types(dict.fromkeys(AXES, AxisType.Auto))
    inside = jax.tree.map(lambda z: P(None, *jax.typeof(z).sharding.spec[1:]), args)
    outside: list[Any] = []

    def stage(*args: Any) -> Any:
        results = fn(*args)
        outside.append(jax.tree.map(lambda z: P(PIPELINE, *jax.typeof(z).sharding.spec[1:]), results))
        return results

    others = tuple(axis for axis in AXES if axis != PIPELINE)
    enter: Any = jax.sharding.explicit_axes(stage, axes=others, in_sharding=inside)
    with jax.sharding.use_abstract_mesh(automatic):
        args = jax.sharding.reshard(args, P())
        # unchecked: residuals of a shard_map inside one that varies over pipeline would be declared split over it once more
        results = jax.shard_map(enter, in_specs=STAGE, out_specs=STAGE, axis_names={PIPELINE}, check_vma=False)(*args)
    return jax.sharding.reshard(results, outside[0])


def _swapped(z: Array, outer: int, inner: int) -> Array:
    """The groups of `z`, outer x inner of them in a row, as inner x outer."""
    groups = z.reshape(outer, inner, len(z) // (outer * inner), *z.shape[1:])
    return jnp.swapaxes(groups, 0, 1).reshape(z.shape)


def _of_stages(z: Array) -> Array:
    """[S, rows of a stage, ...] from [B, ...]."""
    layout = P(PIPELINE, *without(jax.typeof(z).sharding.spec, PIPELINE))
    return jax.lax.reshape(z, (axis_size(PIPELINE), len(z) // axis_size(PIPELINE), *z.shape[1:]), out_sharding=layout)


def _together(z: Array, d: int = 0) -> Array:
    """[B, ...] from [S, rows of a stage, ...], behind `d` other dimensions."""
    layout = jax.typeof(z).sharding.spec
    joined = P(*layout[:d], (PIPELINE, *axes_of(layout[d + 1 : d + 2])), *layout[d + 2 :])
    return jax.lax.reshape(z, (*z.shape[:d], z.shape[d] * z.shape[d + 1], *z.shape[d + 2 :]), out_sharding=joined)


def _exchanged(z: Array, split: int, concat: int) -> Array:
    """An all-to-all of the stages, each device's shard for itself: not inside a shard_map over the other axes too, jax would
    gather all of `z` for it."""
    layout = jax.typeof(z).sharding.spec
    exchange = partial(jax.lax.all_to_all, axis_name=PIPELINE, split_axis=split, concat_axis=concat, tiled=True)
    return jax.shard_map(exchange, in_specs=layout, out_specs=layout, check_vma=False)(z)


def _rows(z: Array, d: int = 0) -> Array:
    """A stage's rows in their order, behind `d` other dimensions, from its parts in front: as `_to_all` took them apart."""
    z = jnp.moveaxis(z, 0, d + 1)
    layout, shape = jax.typeof(z).sharding.spec, (*z.shape[:d], z.shape[d] * z.shape[d + 1], *z.shape[d + 2 :])
    return jax.lax.reshape(z, shape, out_sharding=P(*layout[: d + 1], *layout[d + 2 :]))
