"""Newton-Schulz: Muon's five steps. Operations are counted with each symmetric product computed once: the least there is."""

from collections.abc import Iterator
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.bench import Bench, normal, tagged
from pallas_kernels.newton_schulz import IMPLEMENTATIONS, newton_schulz
from pallas_kernels.newton_schulz.cases import CASES, Case

PUBLISHED = (3.4445, -4.7750, 2.0315)


def benches(tag: str) -> Iterator[Bench]:
    for name, case, dtype in tagged(CASES, tag):
        yield _bench(name, case, dtype)


def _bench(name: str, case: Case, dtype) -> Bench:
    shape = (*case.batch, case.P, case.Q)
    P, Q = sorted((case.P, case.Q))
    return Bench(
        operation="newton_schulz",
        case=name,
        run=partial(newton_schulz, quintics=(PUBLISHED,) * case.steps),
        arguments=(jax.ShapeDtypeStruct(shape, dtype),),
        operations=case.steps * prod(case.batch) * (3 * P * P * Q + P**3),
        bytes_moved=2 * jnp.dtype(dtype).itemsize * prod(shape),
        inputs=partial(_inputs, shape, dtype),
        implementations=tuple(IMPLEMENTATIONS),
    )


def _inputs(shape: tuple[int, ...], dtype) -> tuple[Array]:
    (x_BPQ,) = normal(jnp.float32, shape)
    return ((x_BPQ / jnp.linalg.norm(x_BPQ, axis=(-2, -1), keepdims=True)).astype(dtype),)
