"""Newton-Schulz: an odd polynomial of matrices, iterated, with which Muon drives singular values towards one.

Each step is x <- a x + (b A + c A A) x with A = x x^T, which takes each singular value s to a s + b s^3 + c s^5 and leaves
the singular vectors. A and its polynomial are symmetric: half of each product is the other half (tpu.py computes one). gram.py
iterates on A alone.
Products take x's dtype in and accumulate in float32; the result has x's dtype.
"""

from jax import Array
from jaxtyping import Float

from pallas_kernels.choose import choose
from pallas_kernels.newton_schulz import gram, reference, tpu, xla

IMPLEMENTATIONS = {"reference": reference, "xla": xla, "tpu": tpu, "gram": gram}
Quintic = tuple[float, float, float]


def newton_schulz(
    x_BPQ: Float[Array, "*B P Q"], quintics: tuple[Quintic, ...], *, implementation: str | None = None
) -> Float[Array, "*B P Q"]:
    """One step for each (a, b, c) of `quintics`, on the side of the matrix where x x^T is smaller; differentiable.

    Any number of batch dimensions, one matrix each, which may be sharded over an Explicit mesh; the matrices may not.
    Scale the matrices before: the published coefficients want singular values of at most one. "gram", never chosen by itself,
    has fewer operations on long matrices and wants float16 or float32. Raises ValueError for what is no matrix, or
    coefficients that are no triples.
    """
    if x_BPQ.ndim < 2:
        raise ValueError(f"newton_schulz: x {x_BPQ.shape} must be matrices, [..., P, Q]")
    if any(len(quintic) != 3 for quintic in quintics):
        raise ValueError(f"newton_schulz: quintics {quintics} must be triples (a, b, c), one a step")
    if 0 in x_BPQ.shape or not quintics:
        return x_BPQ
    module = choose("newton_schulz", IMPLEMENTATIONS, implementation, x_BPQ)
    if x_BPQ.shape[-2] <= x_BPQ.shape[-1]:
        return module.newton_schulz(x_BPQ, quintics)
    return module.newton_schulz(x_BPQ.swapaxes(-1, -2), quintics).swapaxes(-1, -2)


def operations(P: int, Q: int, steps: int, gram_alone: bool = False) -> float:
    """Floating-point operations of one matrix, P <= Q, two for each multiply-add; of symmetric products both halves."""
    with_x, squares = 2 * steps, steps
    if gram_alone:
        parts = len(gram.parts(steps))
        with_x, squares = 2 * parts, 4 * steps - 3 * parts
    return 2.0 * (with_x * P**2 * Q + squares * P**3)
