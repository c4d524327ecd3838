"""One decoder layer: h = x + attention(norm x), y = h + ffn(norm h) (spec 1.3)."""

from flax import struct
from jax import Array

from glm_jax import mesh
from glm_jax.config import Model
from glm_jax.model.attention import Attention, Places, attention
from glm_jax.model.cache import Cache
from glm_jax.model.moe import Dense, MoE, Routing, dense, moe
from glm_jax.model.ops import rms_norm
from glm_jax.spec import declare, norm, part


@struct.dataclass
class DenseBlock:
    attention_norm_D: Array = norm("D", hf="input_layernorm")
    attention: Attention = part(Attention)
    ffn_norm_D: Array = norm("D", hf="post_attention_layernorm")
    ffn: Dense = part(Dense)


@struct.dataclass
class MoEBlock:
    attention_norm_D: Array = norm("D", hf="input_layernorm")
    attention: Attention = part(Attention)
    ffn_norm_D: Array = norm("D", hf="post_attention_layernorm")
    ffn: MoE = part(MoE)


def block(
    cfg: Model,
    p: DenseBlock | MoEBlock,
    bias_E: Array | None,
    x_BTD: Array,
    at: Places,
    cache: Cache | None = None,
    layer: Array | int = 0,
    experts_BTA: Array | None = None,
) -> tuple[Array, Cache | None, Routing | None]:
    """A dense layer (no routing comes back) or an MoE layer, by the class of `p`; experts_BTA as in `moe`."""
    shards, p = p.attention, mesh.gather(p, declare(type(p), cfg), cfg.dtype)
    y_BTD, cache = attention(
        cfg, p.attention, shards.o_NHD, rms_norm(x_BTD, p.attention_norm_D, cfg.norm_eps), at, cache, layer
    )
    x_BTD = x_BTD + y_BTD
    h_BTD = rms_norm(x_BTD, p.ffn_norm_D, cfg.norm_eps)
    if isinstance(p.ffn, Dense):
        return x_BTD + dense(p.ffn, h_BTD), cache, None
    assert bias_E is not None  # an MoE layer has its row of router_bias_LE
    y_BTD, routing = moe(cfg, p.ffn, bias_E, h_BTD, at.segments_BT > 0, experts_BTA)
    return x_BTD + y_BTD, cache, routing
