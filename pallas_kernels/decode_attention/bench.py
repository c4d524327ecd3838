"""Decode attention against its definition, which copies every row's pages together, and jax's paged attention for TPU.

Bytes are those of the rows' own tokens: what a page holds beyond a row's length costs time and counts for nothing.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.bench import Bench, normal, only_on_tpu, tagged
from pallas_kernels.decode_attention import IMPLEMENTATIONS, decode_attention
from pallas_kernels.decode_attention.cases import CASES, Case


def decode(
    q_BTNH: Array, k_PKZH: Array, v_PKZH: Array, pages_BC: Array, lengths_B: Array, *, implementation: str | None = None
) -> Array:
    at: Any = {"pages_BC": pages_BC, "lengths_B": lengths_B, "implementation": implementation}
    return decode_attention(q_BTNH, k_PKZH, v_PKZH, scale=q_BTNH.shape[-1] ** -0.5, **at)


def paged_attention(q_BTNH: Array, k_PKZH: Array, v_PKZH: Array, pages_BC: Array, lengths_B: Array) -> Array:
    """jax's, which wants pages as [K, P, Z, H]: they are turned here, and count in its memory."""
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    only_on_tpu("paged attention")
    q_BNH, (k_KPZH, v_KPZH) = q_BTNH[:, 0] * q_BTNH.shape[-1] ** -0.5, (z.swapaxes(0, 1) for z in (k_PKZH, v_PKZH))
    return paged_attention(q_BNH, k_KPZH, v_KPZH, lengths_B, pages_BC, pages_per_compute_block=4)[:, None]


def benches(tag: str) -> Iterator[Bench]:
    for name, case, dtype in tagged(CASES, tag):
        yield _bench(name, case, dtype)


def _bench(name: str, case: Case, dtype) -> Bench:
    B, T, N, K, H, C = case.B, case.T, case.N, case.K, case.H, case.C
    pool, tokens = (B * C, K, case.Z, H), sum(case.lengths)
    pairs = N * (T * tokens - B * T * (T - 1) // 2)  # a draft's earlier tokens see fewer
    return Bench(
        operation="decode_attention",
        case=name,
        run=decode,
        arguments=(
            jax.ShapeDtypeStruct((B, T, N, H), dtype),
            *2 * (jax.ShapeDtypeStruct(pool, dtype),),
            jax.ShapeDtypeStruct((B, C), jnp.int32),
            jax.ShapeDtypeStruct((B,), jnp.int32),
        ),
        operations=4 * pairs * H,
        bytes_moved=2 * jnp.dtype(dtype).itemsize * H * (tokens * K + B * T * N) + 4 * B * (C + 1),
        inputs=partial(_inputs, case, pool, dtype),
        implementations=tuple(IMPLEMENTATIONS),
        peers={"definition": partial(decode, implementation="reference")}
        | ({"paged_attention": paged_attention} if T == 1 else {}),
    )


def _inputs(case: Case, pool: tuple[int, ...], dtype) -> tuple[Array, ...]:
    """Pages lie in the pool in no order."""
    pages_BC = np.random.default_rng(0).permutation(case.B * case.C).reshape(case.B, case.C)
    arrays = normal(dtype, (case.B, case.T, case.N, case.H), pool, pool)
    return *arrays, *(jnp.asarray(z, jnp.int32) for z in (pages_BC, case.lengths))
