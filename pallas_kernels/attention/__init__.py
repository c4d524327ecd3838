"""Grouped-query attention, causal by positions and confined to segments: packing, caches and padding are data, never a mask array."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.attention import reference, tpu, xla
from pallas_kernels.choose import Later, choose

IMPLEMENTATIONS = {"reference": reference, "xla": xla, "tpu": tpu, "gpu": Later("pallas_kernels.attention.gpu")}


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
    shared_KSH: tuple[Float[Array, "K Z H"], Float[Array, "K Z H"]] | None = None,
    scale: float,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Each query's softmax-weighted mean of the values it sees: keys of its own segment at positions not after its own.

    With q_prefixes_BT it also sees the keys of that segment: several continuations of one prompt share its keys and
    values. A prefix has a smaller number than the segments that continue it; a query without one names its own. (Where no
    query has one, left out is faster on TPU.)
    shared_KSH are keys and values that stand before everything and that every query sees, such as the beginning that all
    rows of a cache have in common: held once, read once. They are the prefix then, so q_prefixes_BT must be left out.
    Segment 0 is padding: never seen, and its queries, like any query that sees no key, come out zero. Query head n
    reads key-value head n // (N / K). Scores and softmax are float32 whatever the inputs; the result has q's dtype.
    A token that is not finite reaches exactly those that see it, in "xla" and "tpu"; elsewhere, and where at most 8 queries
    meet a cache, invisible values are multiplied by zero, so they must be finite. Raises ValueError for shapes that do not fit.
    """
    if shared_KSH is not None and q_prefixes_BT is not None:
        raise ValueError("attention: shared keys are every query's prefix; leave q_prefixes_BT out, or the shared keys")
    places = (q_positions_BT, k_positions_BS, q_segments_BT, k_segments_BS, q_prefixes_BT)
    _check(q_BTNH, k_BSKH, v_BSKH, *places)
    if shared_KSH is not None:
        _check_shared(k_BSKH, *shared_KSH)
    module = choose("attention", IMPLEMENTATIONS, implementation, q_BTNH, k_BSKH, v_BSKH)
    return module.attention(q_BTNH, k_BSKH, v_BSKH, *places, scale, shared_KSH)


def _check_shared(k: Array, shared_k: Array, shared_v: Array) -> None:
    K, H = k.shape[2:]
    for z in (shared_k, shared_v):
        if z.ndim != 3 or z.shape != shared_k.shape or (z.shape[0], z.shape[2]) != (K, H) or z.dtype != k.dtype:
            raise ValueError(
                f"attention: shared keys {shared_k.shape} {shared_k.dtype} and values {shared_v.shape} {shared_v.dtype} do "
                f"not fit; they are [K={K}, any length, H={H}] and {k.dtype}, like the others"
            )


def _check(q: Array, k: Array, v: Array, *places: Array | None) -> None:
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
        if z is not None and (z.shape != like.shape[:2] or not jnp.issubdtype(z.dtype, jnp.integer)):
            raise ValueError(f"attention: {name} {z.shape} {z.dtype} must be integers of shape {like.shape[:2]}")
