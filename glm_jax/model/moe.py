"""Feed-forward layers: dense SwiGLU, and routed experts beside a shared one (GLM-4.5 report, section 2.1; spec 2)."""

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from glm_jax.config import Model
from glm_jax.model.ops import project, swiglu
from glm_jax.parallel.expert import routed_experts
from glm_jax.spec import part, state, weight
from pallas_kernels import routing

# added to scores to choose experts, never to weigh them; moved by counts, never by a gradient
ROUTER_BIAS = state("E", hf="mlp.gate.e_score_correction_bias")


@struct.dataclass
class Dense:
    gate_DF: Array = weight("D -> F", hf="mlp.gate_proj")
    up_DF: Array = weight("D -> F", hf="mlp.up_proj")
    down_FD: Array = weight("F -> D", hf="mlp.down_proj")


@struct.dataclass
class Shared:
    gate_DM: Array = weight("D -> M", kind="shared", hf="mlp.shared_experts.gate_proj")
    up_DM: Array = weight("D -> M", kind="shared", hf="mlp.shared_experts.up_proj")
    down_MD: Array = weight("M -> D", kind="shared", hf="mlp.shared_experts.down_proj")


@struct.dataclass
class MoE:
    router_DE: Array = weight("D -> E", kind="router", replicate="E", hf="mlp.gate")
    gate_EDM: Array = weight("E | D -> M", hf="mlp.experts.{E}.gate_proj")
    up_EDM: Array = weight("E | D -> M", hf="mlp.experts.{E}.up_proj")
    down_EMD: Array = weight("E | M -> D", hf="mlp.experts.{E}.down_proj")
    shared: Shared | None = part(Shared, when=lambda cfg: cfg.shared_experts > 0)


@struct.dataclass
class Routing:
    """What one MoE layer did: tokens each expert got, the sequence balance loss before its weight, and its choices."""

    load_E: Array
    balance: Array
    experts_BTA: Array


def dense(p: Dense, x_BTD: Array) -> Array:
    h_BTF = swiglu(project(x_BTD, p.gate_DF), project(x_BTD, p.up_DF))
    return project(h_BTF, p.down_FD, to="BTD")


def shared(p: Shared, x_BTD: Array) -> Array:
    h_BTM = swiglu(project(x_BTD, p.gate_DM), project(x_BTD, p.up_DM))
    return project(h_BTM, p.down_MD, to="BTD")


def moe(
    cfg: Model, p: MoE, bias_E: Array, x_BTD: Array, real_BT: Array, given_BTA: Array | None = None
) -> tuple[Array, Routing]:
    """Routed experts plus the unscaled, ungated shared expert. `real_BT` is False on padding, which counts nowhere.
    `given_BTA`: experts chosen earlier, as `choose` takes them."""
    scores_BTE = routing.scores(x_BTD, p.router_DE)
    experts_BTA, chosen_BTE, weights_BTA = choose(cfg, scores_BTE, bias_E, given_BTA)
    y_BTD = routed_experts(
        x_BTD, experts_BTA, weights_BTA, p.gate_EDM, p.up_EDM, p.down_EMD, cfg.implementation, cfg.dispatch
    )
    if p.shared is not None:
        y_BTD = y_BTD + shared(p.shared, x_BTD)

    counted_BTE = chosen_BTE
    if cfg.balance_on == "unbiased":
        counted_BTE = routing.chosen(routing.best(scores_BTE, cfg.A), cfg.E)
    load_E = routing.counts(chosen_BTE, real_BT)
    return y_BTD, Routing(load_E, balance_loss(cfg, scores_BTE, counted_BTE, real_BT), experts_BTA)


def choose(cfg: Model, scores_BTE: Array, bias_E: Array, given_BTA: Array | None = None) -> tuple[Array, Array, Array]:
    """Top-A of score + bias; weights are the chosen scores, normalised and scaled, without the bias.

    Experts in given_BTA are taken instead, where they are not negative: two computations of one token that differ in
    their last bits choose differently where two scores are almost equal.
    Returns experts_BTA (int32), chosen_BTE (1 where chosen, float32) and weights_BTA (float32).
    """
    return routing.choose_experts(scores_BTE, bias_E, cfg.A, cfg.routed_scale, given_BTA)


def balance_loss(cfg: Model, scores_BTE: Array, counted_BTE: Array, real_BT: Array) -> Array:
    """Mean over rows of sum_i f_i P_i (spec 2): f the share of choices times E, P the mean normalised score.

    A "sequence" is a training row. The gradient flows through P alone; rows of padding only do not count.
    """
    real_BT1 = real_BT[..., None].astype(jnp.float32)
    tokens_B1 = jnp.sum(real_BT1, axis=1)
    share_BTE = scores_BTE / (jnp.sum(scores_BTE, axis=-1, keepdims=True) + 1e-20)
    P_BE = jnp.sum(share_BTE * real_BT1, axis=1) / jnp.maximum(tokens_B1, 1)
    f_BE = jnp.sum(counted_BTE * real_BT1, axis=1) * cfg.E / (cfg.A * jnp.maximum(tokens_B1, 1))
    rows = jnp.maximum(jnp.sum(tokens_B1 > 0), 1)
    return jnp.sum(jax.lax.stop_gradient(f_BE) * P_BE) / rows
