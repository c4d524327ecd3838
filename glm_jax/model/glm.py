"""GLM-4.5: embedding, dense layers, MoE layers, head, and one layer that predicts a token further.

`forward` is the one function that trainer and sampler call. Everything is a function of arrays; nothing is kept.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from glm_jax import mesh, spec
from glm_jax.config import Model
from glm_jax.model import cache as kv
from glm_jax.model.attention import Places, places
from glm_jax.model.blocks import DenseBlock, MoEBlock, block
from glm_jax.model.moe import ROUTER_BIAS, Routing
from glm_jax.model.mtp import MTP, mtp
from glm_jax.model.ops import project, rms_norm
from glm_jax.parallel import pipeline
from glm_jax.parallel.order import together
from glm_jax.parallel.vocabulary import embed
from glm_jax.spec import norm, part, weight

RESIDUAL = "residual"  # what enters a layer
REMAT = {  # what of a layer is kept for its backward pass, and where
    "layer": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[RESIDUAL],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
LAYER = "model.layers.{L}."  # published checkpoints number all layers in one row, the MTP layer last


@struct.dataclass
class GLM:
    """All parameters. Layers of a kind are stacked, or a tuple of single layers after `unstack`."""

    embed_VD: Array = weight("V -> D", kind="embedding", hf="model.embed_tokens")
    dense: DenseBlock | tuple | None = part(DenseBlock, stack=lambda cfg: cfg.dense_layers, hf=LAYER)
    moe: MoEBlock | tuple | None = part(
        MoEBlock, stack=lambda cfg: cfg.moe_layers, hf=LAYER, first_layer=lambda cfg: cfg.dense_layers
    )
    norm_D: Array = norm("D", hf="model.norm")
    head_DV: Array = weight("D -> V", kind="head", hf="lm_head")
    mtp: MTP | None = part(MTP, when=lambda cfg: cfg.mtp_layers > 0, hf=LAYER, first_layer=lambda cfg: cfg.L)


@struct.dataclass
class Aux:
    """Beside the logits: expert load and balance loss per MoE layer (the MTP layer's last), the cache, hidden states,
    and the experts that each token took, in the layers before the MTP layer."""

    load_LE: Array
    balance_L: Array
    hidden_BTD: Array
    mtp_hidden_BTD: Array | None
    cache: kv.Cache | None
    experts_LBTA: Array


def specs(cfg: Model) -> GLM:
    """The model with a `Spec` in place of every array."""
    return spec.declare(GLM, cfg)


def init(cfg: Model, key: Array, dtype: Any = jnp.float32) -> tuple[GLM, Array]:
    """(params, router_bias_LE). Under a mesh, call it inside jit with `mesh.shardings` as out_shardings."""
    return spec.init(specs(cfg), key, cfg.init_std, dtype), router_bias(cfg)


def router_bias(cfg: Model) -> Array:
    """Zeros, float32: a row per MoE layer, the MTP layer's last."""
    return jnp.zeros(router_bias_spec(cfg).shape, jnp.float32)


def router_bias_spec(cfg: Model) -> spec.Spec:
    """The declaration of router_bias_LE."""
    return ROUTER_BIAS.resolve(cfg, cfg.router_rows, spec.Place(LAYER, cfg.dense_layers))


def forward(  # noqa: PLR0913 (where tokens stand is four arrays, all optional)
    cfg: Model,
    params: GLM,
    router_bias_LE: Array,
    ids_BT: Array,
    *,
    positions_BT: Array | None = None,
    segments_BT: Array | None = None,
    prefixes_BT: Array | None = None,
    next_ids_BT: Array | None = None,
    experts_BTLA: Array | None = None,
    cache: kv.Cache | None = None,
) -> tuple[Array, Aux]:
    """Logits of the next token, float32 [B, T, V], and `Aux`.

    positions_BT restart in every document of a packed row; segments_BT number the documents (0: padding). By default
    a row is one document, continued from the cache if there is one. A segment may continue an earlier one, named in
    prefixes_BT, which several share: its positions go on from there. With next_ids_BT the MTP layer runs too.
    experts_BTLA are choices of an earlier computation of these tokens, to be made again (-1: choose here).
    """
    aux = hidden(
        cfg, params, router_bias_LE, ids_BT,
        positions_BT=positions_BT, segments_BT=segments_BT, prefixes_BT=prefixes_BT,
        next_ids_BT=next_ids_BT, experts_BTLA=experts_BTLA, cache=cache,
    )  # fmt: skip
    return head(cfg, params, aux.hidden_BTD), aux


def hidden(  # noqa: PLR0913 (as forward)
    cfg: Model,
    params: GLM,
    router_bias_LE: Array,
    ids_BT: Array,
    *,
    positions_BT: Array | None = None,
    segments_BT: Array | None = None,
    prefixes_BT: Array | None = None,
    next_ids_BT: Array | None = None,
    experts_BTLA: Array | None = None,
    cache: kv.Cache | None = None,
) -> Aux:
    """`forward` without the head: what a loss reads that never wants all logits at once."""
    if segments_BT is None:
        segments_BT = jnp.ones_like(ids_BT)
    if positions_BT is None:
        first_B1 = jnp.zeros_like(ids_BT[:, :1]) if cache is None else cache.length_B[:, None]
        positions_BT = first_B1 + jnp.arange(ids_BT.shape[1], dtype=jnp.int32)
    ids_BT, positions_BT, segments_BT = (mesh.constrain(z, "BT") for z in (ids_BT, positions_BT, segments_BT))
    prefixes_BT = None if prefixes_BT is None else mesh.constrain(prefixes_BT, "BT")
    at = places(cfg, positions_BT, segments_BT, prefixes_BT)
    if cache is not None:
        cache = kv.place(cache, positions_BT, segments_BT)

    table_VD = mesh.gather(params.embed_VD, specs(cfg).embed_VD, cfg.dtype)
    x_BTD = embed(table_VD, ids_BT)
    x_BTD, cache, _ = _layers(cfg, params.dense, None, x_BTD, at, cache, 0)
    given_LBTA = None if experts_BTLA is None else jnp.moveaxis(mesh.constrain(experts_BTLA, "BTLA"), 2, 0)
    bias_LE = router_bias_LE[: cfg.moe_layers]
    depth = pipeline.depth(cfg.moe_layers, cfg.pipeline_rounds) if cache is None and given_LBTA is None else 0
    if depth:
        x_BTD, routing = _pipelined(cfg, params.moe, bias_LE, x_BTD, at, depth)
    else:
        x_BTD, cache, routing = _layers(cfg, params.moe, bias_LE, x_BTD, at, cache, cfg.dense_layers, given_LBTA)
    if routing is None:
        experts_LBTA = mesh.constrain(jnp.zeros((0, *ids_BT.shape, cfg.A), jnp.int32), "LBTA")
    else:
        experts_LBTA = routing.experts_BTA
    hidden_BTD = rms_norm(x_BTD, params.norm_D, cfg.norm_eps)

    mtp_hidden_BTD, routings = None, [routing] if routing is not None else []
    if next_ids_BT is not None and params.mtp is not None:
        run = mtp if cfg.remat == "none" else partial(jax.checkpoint, static_argnums=0)(mtp)
        mtp_params, before_BTD = together((params.mtp, hidden_BTD))
        mtp_hidden_BTD, last = run(cfg, mtp_params, router_bias_LE[-1], before_BTD, embed(table_VD, next_ids_BT), at)
        routings.append(jax.tree.map(lambda z: z[None], last))
    load_LE, balance_L = (
        jnp.concatenate([getattr(r, name) for r in routings]) if routings else jnp.zeros((0, *tail))
        for name, tail in (("load_E", (cfg.E,)), ("balance", ()))
    )
    if cache is not None:
        cache = kv.advance(cache, segments_BT, jnp.moveaxis(experts_LBTA, 0, 2))
    return Aux(load_LE, balance_L, hidden_BTD, mtp_hidden_BTD, cache, experts_LBTA)


def head(cfg: Model, params: GLM, hidden_BTD: Array) -> Array:
    """Logits, float32: the output matrix is shared by the main model and the MTP layer."""
    head_DV = mesh.spread(params.head_DV, specs(cfg).head_DV, cfg.dtype, mesh.everywhere)
    return project(hidden_BTD, head_DV, dtype=jnp.float32)


def output_matrix(cfg: Model, params: GLM) -> Array:
    """head_DV as a loss uses it: gathered but for the vocabulary's share of each device, in the model's dtype."""
    return mesh.gather(params.head_DV, specs(cfg).head_DV, cfg.dtype)


def unstack(params: GLM) -> GLM:
    """Layers as tuples: `forward` then runs them one by one. For decoding, where slicing a stack costs as much as
    the layer itself."""

    def split(stack: Any) -> tuple | None:
        if stack is None:
            return None
        weights, tree = jax.tree.flatten(stack)
        return tuple(jax.tree.unflatten(tree, [w[i] for w in weights]) for i in range(weights[0].shape[0]))

    return dataclasses.replace(params, dense=split(params.dense), moe=split(params.moe))


def _pipelined(cfg: Model, stack: Any, bias_LE: Array, x_BTD: Array, at: Places, depth: int) -> tuple[Array, Routing]:
    """MoE layers, the first `depth` of them shared among the stages; the others as one stage."""

    def real_rows(at):  # of which balance losses are means
        return jnp.sum(jnp.any(at.segments_BT > 0, axis=1))

    def layer(x_BTD, of_layer, at):
        p, bias_E = of_layer
        x_BTD, _, routing = block(cfg, p, bias_E, x_BTD, at)
        assert routing is not None  # it is an MoE layer
        sums = routing.load_E, routing.balance * real_rows(at)
        return x_BTD, (sums, routing.experts_BTA)

    rounds = cfg.pipeline_rounds
    staged, left = (jax.tree.map(lambda z, i=i: z[i], (stack, bias_LE)) for i in (slice(depth), slice(depth, None)))
    staged = pipeline.by_stage(staged, rounds)
    layers = (
        mesh.spread(staged[0], specs(cfg).moe, cfg.dtype, mesh.in_stages),
        mesh.spread(staged[1], router_bias_spec(cfg), jnp.float32, mesh.in_stages),
    )
    x_BTD, (load_LE, balance_L), experts_LBTA = pipeline.through_stages(
        layer, layers, x_BTD, at, cfg.microbatches_per_stage, rounds
    )
    balance_L = balance_L / jnp.maximum(real_rows(at), 1)
    routing = Routing(mesh.whole(load_LE, ()), mesh.whole(balance_L, ()), mesh.constrain(experts_LBTA, "LBTA"))
    routing = pipeline.by_layer(routing, rounds)
    if depth == cfg.moe_layers:
        return x_BTD, routing
    x_BTD, _, last = _layers(cfg, left[0], left[1], x_BTD, at, None, 0)
    return x_BTD, jax.tree.map(lambda *z: jnp.concatenate(z), routing, last)


def _layers(
    cfg: Model, stack: Any, bias_LE: Array | None, x_BTD: Array, at: Places, cache: kv.Cache | None, first: int,
    given_LBTA: Array | None = None,
) -> tuple[Array, kv.Cache | None, Routing | None]:  # fmt: skip
    """Run layers of one kind: scanned and rematerialised where stacked, one by one where not."""
    if stack is None:
        return x_BTD, cache, None

    def step(carry, layer):
        x_BTD, cache = carry
        x_BTD = checkpoint_name(x_BTD, RESIDUAL)
        p, bias_E, number, given_BTA = layer
        x_BTD, cache, routing = block(cfg, p, bias_E, x_BTD, at, cache, number, given_BTA)
        return (x_BTD, cache), routing

    if isinstance(stack, tuple):
        routings = []
        for i, p in enumerate(stack):
            bias_E, given_BTA = (None if z is None else z[i] for z in (bias_LE, given_LBTA))
            (x_BTD, cache), routing = step((x_BTD, cache), (p, bias_E, first + i, given_BTA))
            routings.append(routing)
        return x_BTD, cache, jax.tree.map(lambda *z: jnp.stack(z), *routings)

    if cfg.remat != "none" and cache is None:
        step = jax.checkpoint(step, prevent_cse=False, policy=REMAT[cfg.remat])
    depth = jax.tree.leaves(stack)[0].shape[0]
    (x_BTD, cache), routing = jax.lax.scan(
        step, (x_BTD, cache), (stack, bias_LE, first + jnp.arange(depth), given_LBTA)
    )
    return x_BTD, cache, routing
