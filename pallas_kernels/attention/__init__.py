"""Grouped-query attention, causal by positions and confined to segments: packing, caches and padding are data, never a mask array."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.attention import reference, xla

IMPLEMENTATIONS = {"reference": reference, "xla": xla}


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    *,
    q_positions_BT: Int[Array, "B T"],
    k_positions_BS: Int[Array, "B S"],
    q_segments_BT: Int[Array, "B T"],
    k_segments_BS: Int[Array, "B S"],
    scale: float,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Each query's softmax-weighted mean of the values it sees: keys of its own segment at positions not after its own.

    Segment 0 is padding: never seen, and its queries, like any query that sees no key, come out zero. Query head n
    reads key-value head n // (N / K). Scores and softmax are float32 whatever the inputs; the result has q's dtype.
    Invisible keys and values are multiplied by zero, so they must be finite. Raises ValueError for shapes that do not fit.
    """
    _check(q_BTNH, k_BSKH, v_BSKH, q_positions_BT, k_positions_BS, q_segments_BT, k_segments_BS)
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention: unknown implementation {implementation!r}; known: {', '.join(IMPLEMENTATIONS)}, or None for the best"
        )
    module = IMPLEMENTATIONS[implementation or "xla"]
    return module.attention(q_BTNH, k_BSKH, v_BSKH, q_positions_BT, k_positions_BS, q_segments_BT, k_segments_BS, scale)


def _check(
    q: Array, k: Array, v: Array, q_positions: Array, k_positions: Array, q_segments: Array, k_segments: Array
) -> None:
    if (
        q.ndim != 4
        or k.ndim != 4
        or k.shape != v.shape
        or q.shape[0] != k.shape[0]
        or q.shape[3] != k.shape[3]
        or q.shape[2] % k.shape[2]
    ):
        raise ValueError(
            f"attention: q {q.shape}, k {k.shape}, v {v.shape} do not fit; they are [B,T,N,H], [B,S,K,H], [B,S,K,H] with N a multiple of K"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"attention: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; cast them to one dtype, nothing is promoted here"
        )
    for name, z, like in (
        ("q_positions", q_positions, q),
        ("q_segments", q_segments, q),
        ("k_positions", k_positions, k),
        ("k_segments", k_segments, k),
    ):
        if z.shape != like.shape[:2] or not jnp.issubdtype(z.dtype, jnp.integer):
            raise ValueError(f"attention: {name} {z.shape} {z.dtype} must be integers of shape {like.shape[:2]}")
