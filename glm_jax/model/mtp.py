"""The multi-token-prediction layer: from a token's hidden state and the next token, the one after (spec 1.5)."""

import jax.numpy as jnp
from flax import struct
from jax import Array

from glm_jax import mesh
from glm_jax.config import Model
from glm_jax.model.attention import Places
from glm_jax.model.blocks import MoEBlock, block
from glm_jax.model.moe import Routing
from glm_jax.model.ops import project, rms_norm
from glm_jax.spec import declare, norm, part, weight


@struct.dataclass
class MTP:
    embed_norm_D: Array = norm("D", hf="enorm")
    hidden_norm_D: Array = norm("D", hf="hnorm")
    project_UD: Array = weight("U -> D", hf="eh_proj")
    block: MoEBlock = part(MoEBlock)
    norm_D: Array = norm("D", hf="shared_head.norm")


def mtp(cfg: Model, p: MTP, bias_E: Array, hidden_BTD: Array, next_BTD: Array, at: Places) -> tuple[Array, Routing]:
    """Hidden states that the shared head reads as the token after next.

    hidden_BTD is the main model's, after its final norm; next_BTD embeds the next token of each position.
    """
    project_UD = mesh.gather(p.project_UD, declare(MTP, cfg).project_UD, cfg.dtype)
    u_BTU = jnp.concatenate(
        [rms_norm(next_BTD, p.embed_norm_D, cfg.norm_eps), rms_norm(hidden_BTD, p.hidden_norm_D, cfg.norm_eps)], axis=-1
    )
    g_BTD, _, routing = block(cfg, p.block, bias_E, project(u_BTU, project_UD), at)
    assert routing is not None  # its block is an MoE layer
    return rms_norm(g_BTD, p.norm_D, cfg.norm_eps), routing
