"""FP8 products against the same rows times weights of the rows' own dtype."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import fp8
from pallas_kernels.bench import Bench, normal, tagged
from pallas_kernels.fp8.cases import CASES, Case
from pallas_kernels.grouped_matmul import gmm


def product(x_XD: Array, value: Array, scale: Array, *sizes: Array, implementation: str | None = None) -> Array:
    door = fp8.grouped_matmul if sizes else fp8.matmul
    return door(x_XD, fp8.Quantized(value, scale), *sizes, implementation=implementation)


def unquantized(x_XD: Array, value: Array, scale: Array, *sizes: Array) -> Array:
    """The same product of weights in x's dtype, two or four times the bytes."""
    w = value.astype(x_XD.dtype)
    return gmm(x_XD, w, *sizes) if sizes else x_XD @ w


def benches(tag: str) -> Iterator[Bench]:
    for name, case, dtype in tagged(CASES, tag):
        yield _bench(name, case, dtype)


def _bench(name: str, case: Case, dtype) -> Bench:
    rows = sum(case.sizes) or case.X
    blocks = -(-case.D // fp8.BLOCK), -(-case.M // fp8.BLOCK)
    groups = (len(case.sizes),) if case.sizes else ()
    like = (
        jax.ShapeDtypeStruct((case.X, case.D), dtype),
        jax.ShapeDtypeStruct((*groups, case.D, case.M), fp8.E4M3),
        jax.ShapeDtypeStruct((*groups, *blocks), jnp.float32),
        *([jax.ShapeDtypeStruct(groups, jnp.int32)] if groups else []),
    )
    return Bench(
        operation="fp8.grouped_matmul" if case.sizes else "fp8.matmul",
        case=name,
        run=product,
        arguments=like,
        operations=2 * rows * case.D * case.M,
        bytes_moved=sum(z.size * z.dtype.itemsize for z in like) + case.X * case.M * jnp.dtype(dtype).itemsize,
        inputs=partial(_inputs, case, dtype),
        implementations=tuple(fp8.IMPLEMENTATIONS),
        peers={"unquantized": unquantized},
    )


def _inputs(case: Case, dtype) -> tuple[Array, ...]:
    shape = (len(case.sizes), case.D, case.M) if case.sizes else (case.D, case.M)
    (x_XD,) = normal(dtype, (case.X, case.D))
    (w,) = normal(jnp.float32, shape, seed=1)
    return x_XD, *fp8.quantize(w), *([jnp.asarray(case.sizes, jnp.int32)] if case.sizes else [])
