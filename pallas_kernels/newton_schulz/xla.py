"""Three matrix products a step, batched. The symmetric ones are computed whole: XLA has no product of half a matrix."""

import jax
import jax.numpy as jnp
from jax import Array


def newton_schulz(x_BPQ: Array, quintics: tuple[tuple[float, float, float], ...]) -> Array:
    return jax.lax.scan(_step, x_BPQ, jnp.asarray(quintics, jnp.float32))[0]


def _step(x_BPQ: Array, quintic: Array) -> tuple[Array, None]:
    a, b, c = quintic
    dtype = x_BPQ.dtype
    gram_BPP = product("...pq,...rq->...pr", x_BPQ, x_BPQ)
    if dtype != jnp.float32:  # it is used in both types: GPU's compiler multiplies once for each
        gram_BPP = jax.lax.optimization_barrier(gram_BPP)
    low_BPP = gram_BPP.astype(dtype)
    poly_BPP = (b * gram_BPP + c * product("...pr,...rq->...pq", low_BPP, low_BPP)).astype(dtype)
    return (a * x_BPQ.astype(jnp.float32) + product("...pr,...rq->...pq", poly_BPP, x_BPQ)).astype(dtype), None


def product(subscripts: str, x: Array, y: Array) -> Array:
    # float32 means float32 on hardware whose default would round the inputs
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=jnp.float32)
