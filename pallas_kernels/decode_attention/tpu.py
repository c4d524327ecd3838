"""For TPUs, in Pallas: the page table stands in scalar memory and leads each page, all its heads at once, straight from the pool.

The cache's way from memory is the whole cost, so a page is fetched once for all query heads and draft tokens, the next
one while this one is computed, and none beyond a row's end: there the table's last page is named again, which moves nothing.
"""

from functools import partial

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.xla import heads, rows
from pallas_kernels.results import result_like

F32 = jnp.float32
DEVICES = ("TPU v5", "TPU v6", "TPU7")  # older ones have less fast memory
HEAD_DIMS = (64, 128)
LANES = 128
SUBLANES = 16  # of bfloat16: tokens in a page come in as many
MOST_ROWS = 512  # of scores for each head
MOST_PAGES = 1 << 17  # half a megabyte of the one that scalar memory has
VMEM_BYTES = 32 << 20
UNSEEN = -1e30  # a score that no real one comes near


def refusal(operation: str, q_BTNH: Array, k_PKZH: Array, pages_BC: Array) -> str | None:
    """Why these arrays are not for this module, or None."""
    (_, T, N, H), (_, K, Z, _) = q_BTNH.shape, k_PKZH.shape
    if H not in HEAD_DIMS:
        return f"q {q_BTNH.shape} has head dim {H}, and pages are read for {HEAD_DIMS}"
    if q_BTNH.dtype not in (jnp.bfloat16, F32):
        return f"q {q_BTNH.shape} is {q_BTNH.dtype}, and the matmul units take bfloat16 and float32"
    if Z % SUBLANES:
        return f"k {k_PKZH.shape} has pages of {Z} tokens; they come in multiples of {SUBLANES}"
    if pages_BC.size > MOST_PAGES:
        return (
            f"pages {pages_BC.shape} are more than the {MOST_PAGES} whose table fits scalar memory; take larger pages"
        )
    if T * N // K > MOST_ROWS:
        return f"q {q_BTNH.shape} has {T * N // K} rows for each key-value head, more than {MOST_ROWS}: that is prefill"
    if 8 * k_PKZH.nbytes // k_PKZH.shape[0] > VMEM_BYTES:
        return (
            f"k {k_PKZH.shape} has pages too large for the chip's memory; a cache without pages needs attention's xla"
        )
    return None


def decode_attention(q_BTNH, k_PKZH, v_PKZH, pages_BC, lengths_B, scale) -> Array:
    (B, T, N, H), (P, K, Z, _) = q_BTNH.shape, k_PKZH.shape
    q_BKRH, C = rows(q_BTNH, K), pages_BC.shape[1]
    R = q_BKRH.shape[2]
    used = jnp.clip(-(-lengths_B.max() // Z), 1, C).astype(jnp.int32)

    def queries(b, c, pages, lengths):
        return b, 0, 0, 0

    def page(b, c, pages, lengths):
        last = jnp.maximum(pl.cdiv(lengths[b], Z) - 1, 0)
        return jnp.clip(pages[b * C + jnp.minimum(c, last)], 0, P - 1), 0, 0, 0

    run = pl.pallas_call(
        partial(_kernel, scale=scale, group=N // K, drafts=T),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, used),
            in_specs=[
                pl.BlockSpec((None, K, R, H), queries),
                pl.BlockSpec((None, K, Z, H), page),
                pl.BlockSpec((None, K, Z, H), page),
            ],
            out_specs=pl.BlockSpec((None, K, R, H), queries),
            scratch_shapes=[pltpu.VMEM((K, R, width), F32) for width in (LANES, LANES, H)],
        ),
        out_shape=result_like(q_BKRH, q_BKRH.shape, q_BKRH.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * B * N * T * C * Z * H,
            transcendentals=B * N * T * C * Z,
            bytes_accessed=2 * B * C * (k_PKZH.nbytes // P) + 2 * q_BTNH.nbytes,
        ),
        name="decode_attention",
    )
    table = pages_BC.reshape(-1).astype(jnp.int32), lengths_B.astype(jnp.int32)
    return heads(run(*table, q_BKRH, k_PKZH, v_PKZH), T)


def _kernel(pages, lengths, q_ref, k_ref, v_ref, y_ref, top, total, sums, *, scale, group, drafts):
    """`top`, `total` and `sums` hold each row's largest score, its sum of exponentials, and its weighted values."""
    b, c = pl.program_id(0), pl.program_id(1)
    K, Z, H = k_ref.shape
    length = lengths[b]

    @pl.when(c == 0)
    def _():
        top[...] = jnp.full_like(top, UNSEEN)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    @pl.when(c * Z < length)
    def _():
        rows = q_ref.shape[1]
        query_RZ = length - drafts + lax.broadcasted_iota(jnp.int32, (rows, Z), 0) // group
        see_RZ = c * Z + lax.broadcasted_iota(jnp.int32, (rows, Z), 1) <= query_RZ
        real_ZH = c * Z + lax.broadcasted_iota(jnp.int32, (Z, H), 0) < length
        for head in range(K):
            s_RZ = lax.dot_general(q_ref[head], k_ref[head], (((1,), (1,)), ((), ())), preferred_element_type=F32)
            s_RZ = jnp.where(see_RZ, s_RZ * scale, UNSEEN)
            old_R1 = top[head, :, :1]
            new_R1 = jnp.maximum(old_R1, s_RZ.max(1, keepdims=True))
            shrink_R1 = jnp.exp(old_R1 - new_R1)
            p_RZ = jnp.where(see_RZ, jnp.exp(s_RZ - new_R1), 0)
            v_ZH = jnp.where(real_ZH, v_ref[head], 0)
            top[head] = jnp.broadcast_to(new_R1, top.shape[1:])
            total[head] = total[head] * shrink_R1 + p_RZ.sum(1, keepdims=True)
            sums[head] = sums[head] * shrink_R1 + jnp.dot(p_RZ.astype(v_ZH.dtype), v_ZH, preferred_element_type=F32)

    @pl.when(c == pl.num_programs(1) - 1)
    def _():
        for head in range(K):
            total_R1 = total[head, :, :1]
            y_ref[head] = (sums[head] / jnp.where(total_R1 == 0, 1, total_R1)).astype(y_ref.dtype)
