"""Attention of a row's newest tokens to its whole cache, which lies in pages: one query token, or a few of a draft.

Letters of this folder: P pages in the pool, Z tokens in a page, C pages that a row may have.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.choose import choose
from pallas_kernels.decode_attention import reference, tpu, xla

IMPLEMENTATIONS = {"reference": reference, "xla": xla, "tpu": tpu}


def decode_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_PKZH: Float[Array, "P K Z H"],
    v_PKZH: Float[Array, "P K Z H"],
    *,
    pages_BC: Int[Array, "B C"],
    lengths_B: Int[Array, " B"],
    scale: float,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Each query's softmax-weighted mean of the values of its row's tokens up to itself; not differentiable.

    Row b has lengths_B[b] tokens, at most C * Z, of which its T queries are the last; token s lies in slot s % Z of page
    pages_BC[b, s // Z]. Rows may share pages, as samples of one prompt do. What stands in a page beyond a row's length, NaN
    included, and in the table beyond its last page reaches nothing. A query before the row's first token (a row with
    fewer than T tokens, or none) comes out zero. Query head n reads key-value head n // (N / K). Scores and softmax are
    float32 whatever the inputs; the result has q's dtype.

    A cache without pages is the case P = B, Z = its capacity, pages_BC = arange(B)[:, None]: `glm_jax`'s, whose layers are
    [B, K, S, H] with a length for each row, could call it so as it stands, where its rows share no beginning.
    Raises ValueError for shapes that do not fit.
    """
    _check(q_BTNH, k_PKZH, v_PKZH, pages_BC, lengths_B)
    pages_BC, lengths_B = pages_BC.astype(jnp.int32), lengths_B.astype(jnp.int32)
    module = choose("decode_attention", IMPLEMENTATIONS, implementation, q_BTNH, k_PKZH, pages_BC)
    return module.decode_attention(q_BTNH, k_PKZH, v_PKZH, pages_BC, lengths_B, scale)


def _check(q: Array, k: Array, v: Array, pages: Array, lengths: Array) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[1]:
        raise ValueError(
            f"decode_attention: q {q.shape}, k {k.shape}, v {v.shape} do not fit; they are [B,T,N,H] and twice [P,K,Z,H], N a multiple of K"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"decode_attention: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; cast them to one dtype, nothing is promoted here"
        )
    for name, z, shape in (("pages", pages, f"[B={len(q)}, any]"), ("lengths", lengths, f"[B={len(q)}]")):
        fits = z.ndim == shape.count(",") + 1 and z.shape[0] == len(q)
        if not fits or not jnp.issubdtype(z.dtype, jnp.integer):
            raise ValueError(f"decode_attention: {name} {z.shape} {z.dtype} must be integers of shape {shape}")
