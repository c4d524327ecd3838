"""Muon's homes: every matrix is whole on one device while it is orthogonalised, and each device is home to as many.

A weight's shards are a list of matrices, each with some of its rows here. One all-to-all brings a share of the list whole to
each device, another takes the results back. All weights whose matrices have one shape share a list; where a list leaves homes
idle, smaller matrices move in, padded with zeros, which Newton-Schulz keeps: a program is compiled once for each list.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from glm_jax import mesh
from glm_jax.spec import Spec

CHUNK_BYTES = 2**28  # of whole matrices that a device holds at once


@dataclass(frozen=True)
class Stack:
    """A weight as a list of matrices: positions in its array of what counts them, of their rows and of their columns."""

    spec: Spec
    batch: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def split(self) -> int | None:
        """The dimension of the matrices that lies split over several devices between steps."""
        layout = mesh.at_rest(self.spec)
        over = [
            d for d in (*self.rows, *self.columns) if math.prod(map(mesh.axis_size, mesh.axes_of((layout[d],)))) > 1
        ]
        return over[0] if over else None

    @property
    def axes(self) -> tuple[str, ...]:
        """Those above 1 that it is split over."""
        assert self.split is not None
        return _several(mesh.at_rest(self.spec)[self.split])

    @property
    def order(self) -> tuple[int, ...]:
        """Of the dimensions: the list's, the split one, the rest. The matrix is then whole, or whole and transposed."""
        side, other = (self.rows, self.columns) if self.split in self.rows else (self.columns, self.rows)
        if len(side) > 1:
            raise ValueError(
                f"{self.spec.dims}: the letters of a matrix's side lie together on one device; {self.spec.dims[self.split or 0]} "
                "is split and not alone on its side"
            )
        return (*self.batch, *side, *other)


def each_matrix(fn: Callable[[Array], Array], stacks: Sequence[Stack], arrays: Sequence[Array]) -> list[Array]:
    """`fn`, of matrices [..., P, Q], on every matrix of every array; each result lies as its array does.

    `fn` of a matrix transposed must be its result transposed. A head's matrix is left to `over_columns`.
    """
    done: dict[int, Array] = {}
    for members in share([_kind(i, *one) for i, one in enumerate(zip(stacks, arrays, strict=True))]):
        some = [stacks[i] for i in members]
        if some[0].split is None:
            results = [_here(fn, some[0], arrays[members[0]])]
        else:
            layouts = tuple(mesh.at_rest(stack.spec) for stack in some)
            at_home = jax.shard_map(lambda *xs, s=some: _at_home(fn, s, xs), in_specs=layouts, out_specs=layouts)
            results = at_home(*(arrays[i] for i in members))
        done |= dict(zip(members, results, strict=True))
    return [done[i] for i in range(len(arrays))]


def over_columns(fn: Callable[[Array, Callable[[Array], Array]], Array], stack: Stack, x: Array) -> Array:
    """`fn(x, total)` of one matrix that stays split along its columns; `total` sums over its shards."""
    layout = mesh.at_rest(stack.spec)
    if stack.split is None or not mesh.active():
        return fn(x, lambda z: z)
    return jax.shard_map(lambda x: fn(x, lambda z: jax.lax.psum(z, stack.axes)), in_specs=layout, out_specs=layout)(x)


@dataclass(frozen=True)
class Kind:
    """A weight's matrices as lists see them: which may share one, over how many homes, how many, and how large."""

    group: Hashable
    homes: int
    number: int
    entries: int


def share(kinds: Sequence[Kind]) -> list[list[int]]:
    """Which kinds share a list: those of one size, and smaller ones for which there are idle homes."""
    lists: list[list[int]] = []
    for i in sorted(range(len(kinds)), key=lambda i: (-kinds[i].entries, i)):
        for members in lists:
            first, number = kinds[members[0]], sum(kinds[j].number for j in members)
            if first.group == kinds[i].group and (
                first.entries == kinds[i].entries or kinds[i].number <= -number % first.homes
            ):
                members.append(i)
                break
        else:
            lists.append([i])
    return lists


def _kind(i: int, stack: Stack, x: Array) -> Kind:
    if stack.split is None:
        return Kind(i, 1, 1, x.size)
    spread = _several(*(mesh.at_rest(stack.spec)[d] for d in stack.batch))
    homes, copies = (math.prod(map(mesh.axis_size, axes)) for axes in (stack.axes, spread))
    number = math.prod(x.shape[d] for d in stack.batch)
    return Kind((stack.axes, spread, x.shape[stack.split]), homes, number // copies, x.size // number)


def _several(*layout: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The axes above 1 that dimensions lie split over."""
    return tuple(axis for axis in mesh.axes_of(layout) if mesh.axis_size(axis) > 1)


def _here(fn: Callable[[Array], Array], stack: Stack, x: Array) -> Array:
    order = (*stack.batch, *stack.rows, *stack.columns)
    batch = [x.shape[d] for d in stack.batch]
    rows, columns = (math.prod(x.shape[d] for d in side) for side in (stack.rows, stack.columns))
    x_BPQ = mesh.whole(x, stack.batch).transpose(order).reshape(*batch, rows, columns)
    by_layer = stack.spec.batch.startswith("L") and mesh.local_bytes(x_BPQ) > CHUNK_BYTES
    y_BPQ = jax.lax.map(fn, x_BPQ) if by_layer else fn(x_BPQ)
    y = y_BPQ.reshape([x.shape[d] for d in order]).transpose([order.index(d) for d in range(x.ndim)])
    return mesh.rest(y, stack.spec)


def _at_home(fn: Callable[[Array], Array], stacks: list[Stack], shards: Sequence[Array]) -> tuple[Array, ...]:
    lists = [_as_list(stack, x) for stack, x in zip(stacks, shards, strict=True)]
    width = max(one.shape[2] for one in lists)
    joined = jnp.concatenate([jnp.pad(one, ((0, 0), (0, 0), (0, width - one.shape[2]))) for one in lists])
    homes = math.prod(map(mesh.axis_size, stacks[0].axes))
    each = -(-len(joined) // homes)
    bytes_each = joined[0].nbytes * homes
    chunks = -(-each // max(1, CHUNK_BYTES // bytes_each))
    room = homes * -(-each // chunks) * chunks

    def chunk(shard_BPQ: Array) -> Array:
        whole_BPQ = jax.lax.all_to_all(shard_BPQ, stacks[0].axes, split_axis=0, concat_axis=1, tiled=True)
        return jax.lax.all_to_all(fn(whole_BPQ), stacks[0].axes, split_axis=1, concat_axis=0, tiled=True)

    # XLA for CPUs cannot exchange pieces of different layouts: without the barrier it looks through the concatenation
    padded = jax.lax.optimization_barrier(jnp.pad(joined, ((0, room - len(joined)), (0, 0), (0, 0))))
    if chunks == 1:
        back = chunk(padded)
    else:
        back = jax.lax.map(chunk, padded.reshape(chunks, -1, *joined.shape[1:])).reshape(padded.shape)
    results, start = [], 0
    for stack, x, one in zip(stacks, shards, lists, strict=True):
        results.append(_from_list(stack, x.shape, back[start : start + len(one), :, : one.shape[2]]))
        start += len(one)
    return tuple(results)


def _as_list(stack: Stack, x: Array) -> Array:
    """[matrices, rows of the split dimension here, everything else]."""
    z = x.transpose(stack.order)
    number = math.prod(z.shape[: len(stack.batch)])
    return z.reshape(number, z.shape[len(stack.batch)], -1)


def _from_list(stack: Stack, shape: tuple[int, ...], one: Array) -> Array:
    order = stack.order
    return one.reshape([shape[d] for d in order]).transpose([order.index(d) for d in range(len(shape))])
