"""The definition: the polynomial of the singular values."""

import jax.numpy as jnp
from jax import Array


def newton_schulz(x_BPQ: Array, quintics: tuple[tuple[float, float, float], ...]) -> Array:
    u_BPP, s_BP, v_BPQ = jnp.linalg.svd(x_BPQ.astype(jnp.float32), full_matrices=False)
    for a, b, c in quintics:
        s_BP = a * s_BP + b * s_BP**3 + c * s_BP**5
    return jnp.einsum("...pr,...r,...rq->...pq", u_BPP, s_BP, v_BPQ, precision="highest").astype(x_BPQ.dtype)
