"""Grouped-query attention with optional QK-norm and partial RoPE (GLM-4.5 report, section 2.1; spec 1.3)."""

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from glm_jax import mesh
from glm_jax.config import Model
from glm_jax.model import cache as kv
from glm_jax.model.ops import project, rms_norm, rope, rotary_angles
from glm_jax.spec import bias, declare, norm, part, weight
from pallas_kernels.attention import attention as attention_kernel

# Of a layer's attention for its backward pass, beside what goes in: queries are rotated again, for they are as large as the result,
# but keys are not gathered again.
KEPT = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse", mesh.WHOLE_ROW)


@struct.dataclass
class QKNorm:
    q_H: Array = norm("H", hf="self_attn.q_norm")
    k_H: Array = norm("H", hf="self_attn.k_norm")


@struct.dataclass
class QKVBias:
    q_NH: Array = bias("N H", hf="self_attn.q_proj")
    k_KH: Array = bias("K H", hf="self_attn.k_proj")
    v_KH: Array = bias("K H", hf="self_attn.v_proj")


@struct.dataclass
class Attention:
    q_DNH: Array = weight("D -> N H", hf="self_attn.q_proj")
    k_DKH: Array = weight("D -> K H", hf="self_attn.k_proj")
    v_DKH: Array = weight("D -> K H", hf="self_attn.v_proj")
    o_NHD: Array = weight("N H -> D", hf="self_attn.o_proj")
    qkv_bias: QKVBias | None = part(QKVBias, when=lambda cfg: cfg.qkv_bias)
    qk_norm: QKNorm | None = part(QKNorm, when=lambda cfg: cfg.qk_norm)  # Air has none


@struct.dataclass
class Places:
    """Where tokens stand: position in their document, document in their row (0: padding), the segment that it continues
    (or itself; None where none continues another), and RoPE's angles."""

    positions_BT: Array
    segments_BT: Array
    prefixes_BT: Array | None
    cos_BTH: Array
    sin_BTH: Array


def places(cfg: Model, positions_BT: Array, segments_BT: Array, prefixes_BT: Array | None) -> Places:
    angles = rotary_angles(positions_BT, cfg.rotary, cfg.rope_theta)
    return Places(positions_BT, segments_BT, prefixes_BT, jnp.cos(angles), jnp.sin(angles))


def _rotated(cfg: Model, z_BTNH: Array, scale_H: Array | None, at: Places) -> Array:
    """Queries or keys after their norm, after the bias and with one scale for all heads, and RoPE."""
    z_BTNH = z_BTNH if scale_H is None else rms_norm(z_BTNH, scale_H, cfg.norm_eps)
    return rope(z_BTNH, at.cos_BTH, at.sin_BTH)


def attention(
    cfg: Model,
    p: Attention,
    o_NHD: Array,
    x_BTD: Array,
    at: Places,
    cache: kv.Cache | None = None,
    layer: Array | int = 0,
) -> tuple[Array, kv.Cache | None]:
    """Attend to this row's earlier tokens, or to the cache's where one is given (it comes back one layer longer).

    The output weights o_NHD come as they lie between steps and are gathered here, once more in the backward pass: kept, they would
    be as large as the queries.
    """
    q_BTNH = project(x_BTD, p.q_DNH)
    k_BTKH = project(x_BTD, p.k_DKH)
    v_BTKH = project(x_BTD, p.v_DKH)
    if p.qkv_bias is not None:
        q_BTNH, k_BTKH, v_BTKH = q_BTNH + p.qkv_bias.q_NH, k_BTKH + p.qkv_bias.k_KH, v_BTKH + p.qkv_bias.v_KH
    q_scale_H, k_scale_H = (None, None) if p.qk_norm is None else (p.qk_norm.q_H, p.qk_norm.k_H)
    k_BTKH = _rotated(cfg, k_BTKH, k_scale_H, at)

    k_BSKH, v_BSKH, positions_BS, segments_BS = k_BTKH, v_BTKH, at.positions_BT, at.segments_BT
    if cache is not None:
        cache = kv.extend(cache, layer, k_BTKH, v_BTKH)
        k_BSKH, v_BSKH = kv.read(cache, layer)
        positions_BS, segments_BS = cache.positions_BS, cache.segments_BS
    shared, prefixes_BT = None, at.prefixes_BT
    if cache is not None and cache.shared is not None:
        shared, prefixes_BT = (cache.shared.k_LKSH[layer], cache.shared.v_LKSH[layer]), None

    def attend(q, k, v, q_at, k_at, q_prefixes, shared):
        if cache is None:  # this device's queries meet the keys of their whole row
            k, v, k_at = jax.tree.map(mesh.row, (k, v, k_at))
        (q_positions, q_segments), (k_positions, k_segments) = q_at, k_at
        return attention_kernel(
            q, k, v,
            q_positions_BT=q_positions, k_positions_BS=k_positions,
            q_segments_BT=q_segments, k_segments_BS=k_segments,
            q_prefixes_BT=q_prefixes, shared_KSH=shared, scale=cfg.H**-0.5, implementation=cfg.implementation,
        )  # fmt: skip

    keys, of_keys = ("BTKH", "BT") if cache is None else ("BSKH", "BS")
    attend = mesh.per_shard(attend, ("BTNH", keys, keys, "BT", of_keys, "BT", "KSH"), "BTNH")
    where = (at.positions_BT, at.segments_BT), (positions_BS, segments_BS), prefixes_BT, shared

    def rotate_and_attend(q_BTNH, q_scale_H, k_BSKH, v_BSKH):
        return attend(_rotated(cfg, q_BTNH, q_scale_H, at), k_BSKH, v_BSKH, *where)

    def output(y_BTNH, o_NHD):
        return project(y_BTNH, mesh.gather(o_NHD, declare(Attention, cfg).o_NHD, cfg.dtype), ins=2, to="BTD")

    if cfg.remat != "none" and cache is None:
        rotate_and_attend, output = jax.checkpoint(rotate_and_attend, policy=KEPT), jax.checkpoint(output)
    y_BTNH = rotate_and_attend(q_BTNH, q_scale_H, k_BSKH, v_BSKH)
    return output(y_BTNH, o_NHD), cache
