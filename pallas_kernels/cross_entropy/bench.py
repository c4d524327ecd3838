"""Cross-entropy and its gradients: operations, bytes, and the materialised form beside it."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.bench import Bench, normal, only_where_it_runs, tagged
from pallas_kernels.cross_entropy import IMPLEMENTATIONS, linear_cross_entropy
from pallas_kernels.cross_entropy.cases import CASES, Case


def value_and_gradients(
    x_XD: Array, w_DV: Array, targets_X: Array, weights_X: Array, *, implementation: str | None = None
):
    """(loss, log-probabilities), and the gradients of the loss in x and w."""
    scored = partial(linear_cross_entropy, implementation=implementation)
    return jax.value_and_grad(scored, argnums=(0, 1), has_aux=True)(x_XD, w_DV, targets_X, weights_X)


def tokamax(x_XD: Array, w_DV: Array, targets_X: Array, weights_X: Array):
    """tokamax's has no weights for tokens: the plain sum."""
    import tokamax  # pyright: ignore[reportMissingImports]

    only_where_it_runs("tokamax")
    del weights_X

    def loss(x_XD, w_DV):
        return tokamax.linear_softmax_cross_entropy_loss(x_XD, targets_X, w_DV, reduction="sum")

    return jax.value_and_grad(loss, argnums=(0, 1))(x_XD, w_DV)


def benches(tag: str) -> Iterator[Bench]:
    for name, case, dtype in tagged(CASES, tag):
        yield _bench(name, case, dtype)


def _bench(name: str, case: Case, dtype) -> Bench:
    X, D, V = case.X, case.D, case.V
    size = jnp.dtype(dtype).itemsize
    return Bench(
        operation="linear_cross_entropy and gradient",
        case=name,
        run=value_and_gradients,
        arguments=(
            jax.ShapeDtypeStruct((X, D), dtype),
            jax.ShapeDtypeStruct((D, V), dtype),
            jax.ShapeDtypeStruct((X,), jnp.int32),
            jax.ShapeDtypeStruct((X,), jnp.float32),
        ),
        operations=3 * 2 * X * D * V,
        bytes_moved=2 * size * (X * D + D * V) + 12 * X,
        inputs=partial(_inputs, case, dtype),
        implementations=tuple(IMPLEMENTATIONS),
        peers={"materialised": partial(value_and_gradients, implementation="reference"), "tokamax": tokamax},
    )


def _inputs(case: Case, dtype) -> tuple[Array, ...]:
    x_XD, w_DV = normal(dtype, (case.X, case.D), (case.D, case.V))
    rng = np.random.default_rng(1)
    targets_X = jnp.asarray(rng.integers(0, case.V, case.X), jnp.int32)
    return x_XD, w_DV / case.D**0.5, targets_X, jnp.ones(case.X, jnp.float32)
