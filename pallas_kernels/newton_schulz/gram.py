"""The same polynomial from x x^T alone, for matrices much longer than wide: x is multiplied twice in a few steps, not twice a step.

All factors are polynomials of one symmetric matrix, so they commute: r <- p(r) r p(r) follows x x^T through a step p, m <- p(r) m
collects what x is multiplied by in the end. Rounding of r piles up, so x x^T is taken anew after 2 steps and then every 3. Products
are XLA's. Singular values over four decades come out 15 % off in bfloat16, where the plain form is 6 to 10 % off; in float16 2 %.
"""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.newton_schulz.xla import product

FIRST, THEN = 2, 3  # steps before x x^T is taken anew


def newton_schulz(x_BPQ: Array, quintics: tuple[tuple[float, float, float], ...]) -> Array:
    for part in parts(len(quintics)):
        x_BPQ = _several(x_BPQ, quintics[part])
    return x_BPQ


def parts(steps: int) -> list[slice]:
    """The steps between one x x^T and the next."""
    starts = [0, *range(FIRST, steps, THEN)]
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], steps], strict=True)]


def _several(x_BPQ: Array, quintics: tuple[tuple[float, float, float], ...]) -> Array:
    r_BPP = product("...pq,...rq->...pr", x_BPQ, x_BPQ).astype(x_BPQ.dtype)
    m_BPP = jnp.eye(x_BPQ.shape[-2], dtype=x_BPQ.dtype)
    for step, (a, b, c) in enumerate(quintics):
        z_BPP = (b * r_BPP.astype(jnp.float32) + c * product("...pr,...rq->...pq", r_BPP, r_BPP)).astype(x_BPQ.dtype)
        m_BPP = z_BPP + a * m_BPP if step == 0 else _plus(a, m_BPP, z_BPP)
        if step < len(quintics) - 1:
            r_BPP = _plus(a, _plus(a, r_BPP, z_BPP), z_BPP)
    return product("...pr,...rq->...pq", m_BPP, x_BPQ).astype(x_BPQ.dtype)


def _plus(a: float, y_BPP: Array, z_BPP: Array) -> Array:
    """(a + z) y."""
    return (a * y_BPP.astype(jnp.float32) + product("...pr,...rq->...pq", z_BPP, y_BPP)).astype(y_BPP.dtype)
