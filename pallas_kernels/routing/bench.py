"""Routing, from hidden states to the rows' places, and the places alone against two stable sorts.

Operations are those of the router's product, and of the places one count for each row.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels import routing
from pallas_kernels.bench import Bench, normal, tagged
from pallas_kernels.routing.cases import CASES, Case


def route(
    x_XD: Array, router_DE: Array, bias_E: Array, *, active: int, implementation: str | None = None
) -> tuple[Array, ...]:
    """Weights of the chosen experts, and each (token, choice) pair's place, expert by expert."""
    experts_XA, _, weights_XA = routing.choose_experts(routing.scores(x_XD, router_DE), bias_E, active)
    groups = router_DE.shape[1]
    return weights_XA, *routing.position_map(experts_XA.reshape(-1), groups, implementation=implementation)


def benches(tag: str) -> Iterator[Bench]:
    for name, case, dtype in tagged(CASES, tag):
        yield _route(name, case, dtype)
        yield _position_map(name, case)


def _route(name: str, case: Case, dtype) -> Bench:
    X, D, E, A = case.X, case.D, case.E, case.A
    arguments = (
        jax.ShapeDtypeStruct((X, D), dtype),
        jax.ShapeDtypeStruct((D, E), jnp.float32),
        jax.ShapeDtypeStruct((E,), jnp.float32),
    )
    return Bench(
        operation="route",
        case=name,
        run=partial(route, active=A),
        arguments=arguments,
        operations=2 * X * D * E,
        bytes_moved=sum(z.size * z.dtype.itemsize for z in arguments) + 8 * X * A + 4 * E,
        inputs=partial(_hidden, case, dtype),
        implementations=tuple(routing.IMPLEMENTATIONS),
    )


def _hidden(case: Case, dtype) -> tuple[Array, ...]:
    x_XD, router_DE = normal(jnp.float32, (case.X, case.D), (case.D, case.E))
    return x_XD.astype(dtype), router_DE / case.D**0.5, jnp.zeros(case.E)


def _position_map(name: str, case: Case) -> Bench:
    rows = case.X * case.A
    run = partial(routing.position_map, groups=case.E)
    return Bench(
        operation="position_map",
        case=name,
        run=run,
        arguments=(jax.ShapeDtypeStruct((rows,), jnp.int32),),
        operations=rows,
        bytes_moved=8 * rows + 4 * case.E,
        inputs=partial(_choices, rows, case.E),
        implementations=tuple(routing.IMPLEMENTATIONS),
        peers={"two sorts": partial(run, implementation="reference")},
    )


def _choices(rows: int, experts: int) -> tuple[Array]:
    return (jnp.asarray(np.random.default_rng(0).integers(0, experts, rows), jnp.int32),)
