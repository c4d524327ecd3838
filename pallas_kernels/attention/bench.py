"""Attention, forward and with its gradients, against jax.nn's with a mask, and on TPU jax's and tokamax's splash attention.

Operations are those of the visible half of every document: four a pair of query and key and a head's width forward, ten more
backward (five products where forward has two).
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.attention import IMPLEMENTATIONS, attention
from pallas_kernels.attention.cases import CASES, Case
from pallas_kernels.bench import Bench, normal, only_on_tpu, tagged

PLACES = ("q_positions_BT", "k_positions_BS", "q_segments_BT", "k_segments_BS")


def forward(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, *places: Array, implementation: str | None = None) -> Array:
    named = dict(zip(PLACES, places, strict=True))
    return attention(q_BTNH, k_BSKH, v_BSKH, **named, scale=q_BTNH.shape[-1] ** -0.5, implementation=implementation)


def stock(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, *places: Array) -> Array:
    """jax.nn.dot_product_attention; packing is a mask array there."""
    q_positions, k_positions, q_segments, k_segments = places
    mask_BTS = (q_positions[:, :, None] >= k_positions[:, None]) & (q_segments[:, :, None] == k_segments[:, None])
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None])


def splash(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, *places: Array) -> Array:
    """jax's splash attention, backward in two kernels."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    only_on_tpu("splash attention")
    T, group = q_BTNH.shape[1], q_BTNH.shape[2] // k_BSKH.shape[2]
    sizes = kernels.BlockSizes(**_splash_blocks(T, "block_q_dq", "block_kv_dq"))
    mask = masks.MultiHeadMask([masks.CausalMask((T, T))] * group)
    kernel = kernels.make_splash_mqa_single_device(mask, block_sizes=sizes)
    return _by_kv_head(kernel, kernels.SegmentIds(q=places[2], kv=places[3]), q_BTNH, k_BSKH, v_BSKH)


def tokamax_splash(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, *places: Array) -> Array:
    """tokamax's: its door asks this machine's device which kernel to take, so the kernel itself is named here."""
    from tokamax._src.ops.experimental.tpu.splash_attention import (  # pyright: ignore[reportMissingImports]
        splash_attention_kernel as kernels,
    )
    from tokamax._src.ops.experimental.tpu.splash_attention import (  # pyright: ignore[reportMissingImports]
        splash_attention_mask as masks,
    )

    only_on_tpu("splash attention")
    T = q_BTNH.shape[1]
    config = kernels.SplashConfig(**_splash_blocks(T))
    kernel = kernels.make_splash_mqa_single_device(masks.CausalMask((T, T)), config=config)
    return _by_kv_head(kernel, kernels.SegmentIds(q=places[2], kv=places[3]), q_BTNH, k_BSKH, v_BSKH)


def _splash_blocks(T: int, *more: str) -> dict[str, Any]:
    """The tile of our kernels, for all passes."""
    names = "block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"
    return dict.fromkeys((*names, *more), min(1024, T))


def _by_kv_head(kernel: Any, segments_BT: Any, q_BTNH: Array, k_BSKH: Array, v_BSKH: Array) -> Array:
    """A kernel of one key-value head and its queries, on all of them."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BKGTH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    y_BKGTH: Any = jax.vmap(heads)(q_BKGTH, k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2), segments_BT)
    return y_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def and_gradient(f, q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, *places: Array, **options) -> tuple[Array, ...]:
    """The output and the gradients of q, k and v, of the output itself as the cotangent."""
    y_BTNH, vjp = jax.vjp(lambda *qkv: f(*qkv, *places, **options), q_BTNH, k_BSKH, v_BSKH)
    return y_BTNH, *vjp(y_BTNH)


def benches(tag: str) -> Iterator[Bench]:
    for name, case, dtype in tagged(CASES, tag):
        yield from _benches(name, case, dtype)


def _benches(name: str, case: Case, dtype) -> Iterator[Bench]:
    B, T, S, N, K, H = case.B, case.T, case.S, case.N, case.K, case.H
    qkv = (B, T, N, H), (B, S, K, H), (B, S, K, H)
    places = tuple(jax.ShapeDtypeStruct((B, n), jnp.int32) for n in (T, S, T, S))
    pairs = N * sum(int(visible.sum()) for visible in _seen(case))
    size = jnp.dtype(dtype).itemsize
    peers = {"jax.nn": stock} | ({"splash": splash, "tokamax": tokamax_splash} if T == S else {})
    for operation, times, run, peer in (
        ("attention", 4, forward, dict(peers)),
        (
            "attention and gradient",
            14,
            partial(and_gradient, forward),
            {k: partial(and_gradient, f) for k, f in peers.items()},
        ),
    ):
        if T < S and times > 4:
            continue  # against a cache: nothing trains there
        yield Bench(
            operation=operation,
            case=name,
            run=run,
            arguments=(*(jax.ShapeDtypeStruct(shape, dtype) for shape in qkv), *places),
            operations=times * pairs * H,
            bytes_moved=(1 if times == 4 else 2) * size * B * H * 2 * (T * N + S * K),
            inputs=partial(_inputs, case, qkv, dtype),
            implementations=tuple(IMPLEMENTATIONS),
            peers=peer,
        )


def _places(case: Case) -> tuple[np.ndarray, ...]:
    """Positions and segments of queries and keys: documents of equal length, queries at the keys' end."""
    at = np.arange(case.S)
    length = -(-case.S // case.documents)
    positions, segments = at % length, at // length + 1
    segments = np.where(at < case.S - case.padding, segments, 0)
    rows = [
        np.broadcast_to(z, (case.B, len(z))) for z in (positions[-case.T :], positions, segments[-case.T :], segments)
    ]
    return tuple(np.ascontiguousarray(z, dtype=np.int32) for z in rows)


def _seen(case: Case) -> Iterator[np.ndarray]:
    """Per row, how many keys each query sees."""
    q_positions, _, q_segments, _ = _places(case)
    for positions, segments in zip(q_positions, q_segments, strict=True):
        yield np.where(segments > 0, positions.astype(np.int64) + 1, 0)


def _inputs(case: Case, qkv: tuple[tuple[int, ...], ...], dtype) -> tuple[Array, ...]:
    return *normal(dtype, *qkv), *(jnp.asarray(z) for z in _places(case))
