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
    q_prefixes_BT: Int[Array, "B T"] | None = None,
    scale: float,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Each query's softmax-weighted mean of the values it sees: keys of its own segment at positions not after its own.

    With q_prefixes_BT it also sees the keys of that segment: several continuations of one prompt share its keys and
    values. A prefix has a smaller number than the segments that continue it; without one, name the query's own.
    Segment 0 is padding: never seen, and its queries, like any query that sees no key, come out zero. Query head n
    reads key-value head n // (N / K). Scores and softmax are float32 whatever the inputs; the result has q's dtype.
    Invisible keys and values are multiplied by zero, so they must be finite. Raises ValueError for shapes that do not fit.
    """
    if q_prefixes_BT is None:
        q_prefixes_BT = q_segments_BT
    places = (q_positions_BT, k_positions_BS, q_segments_BT, k_segments_BS, q_prefixes_BT)
    _check(q_BTNH, k_BSKH, v_BSKH, *places)
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention: unknown implementation {implementation!r}; known: {', '.join(IMPLEMENTATIONS)}, or None for the best"
        )
    module = IMPLEMENTATIONS[implementation or "xla"]
    return module.attention(q_BTNH, k_BSKH, v_BSKH, *places, scale)


def _check(q: Array, k: Array, v: Array, *places: Array) -> None:
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
    names = ("q_positions", "k_positions", "q_segments", "k_segments", "q_prefixes")
    for name, z in zip(names, places, strict=True):
        like = q if name.startswith("q") else k
        if z.shape != like.shape[:2] or not jnp.issubdtype(z.dtype, jnp.integer):
            raise ValueError(f"attention: {name} {z.shape} {z.dtype} must be integers of shape {like.shape[:2]}")
