"""What a model has and costs, from its declarations alone: parameters (spec 1.2), cache, floating-point operations."""

from dataclasses import dataclass
from typing import Any

from glm_jax import spec
from glm_jax.config import Model
from glm_jax.model import glm
from glm_jax.spec import Spec

BACKWARD = 2  # a matrix product's gradient is two products of its size


@dataclass(frozen=True)
class Parameters:
    """Exact counts; a layer's balance bias, which no gradient reaches, counts with its layer as published."""

    attention: int  # of one layer, biases and QK-norm included
    expert: int
    moe_layer: int
    dense_layer: int
    body: int  # all decoder layers
    embedding: int  # the head has as many
    mtp_block: int  # the MTP layer's own MoE layer
    mtp_extras: int  # its projection and three norms
    final_norm: int

    @property
    def mtp(self) -> int:
        return self.mtp_block + self.mtp_extras

    @property
    def without_embeddings(self) -> int:
        return self.body + self.final_norm

    @property
    def with_mtp(self) -> int:
        """The report's convention: body, final norm and MTP layer, no embedding, no head."""
        return self.without_embeddings + self.mtp

    @property
    def checkpoint(self) -> int:
        """A published checkpoint without its MTP layer."""
        return self.without_embeddings + 2 * self.embedding

    @property
    def checkpoint_with_mtp(self) -> int:
        """The same with it, and its copies of embedding and head."""
        return self.checkpoint + self.mtp + (2 * self.embedding if self.mtp else 0)


def parameters(cfg: Model) -> Parameters:
    """Every count of spec 1.2."""
    specs: Any = glm.specs(cfg)
    moe = _layer(specs.moe, cfg.moe_layers) + cfg.E if specs.moe else 0
    dense = _layer(specs.dense, cfg.dense_layers) if specs.dense else 0
    some = specs.moe or specs.dense
    block = spec.count(specs.mtp.block) + cfg.E if specs.mtp else 0
    return Parameters(
        attention=_layer(some.attention, cfg.moe_layers or cfg.dense_layers),
        expert=sum(w.count for w in _experts(specs.moe)) // (cfg.moe_layers * cfg.E) if specs.moe else 0,
        moe_layer=moe,
        dense_layer=dense,
        body=moe * cfg.moe_layers + dense * cfg.dense_layers,
        embedding=specs.embed_VD.count,
        mtp_block=block,
        mtp_extras=spec.count(specs.mtp) + cfg.E - block if specs.mtp else 0,
        final_norm=specs.norm_D.count,
    )


def active(cfg: Model) -> int:
    """Parameters that work on a token, without embedding, head and MTP layer."""
    n = parameters(cfg)
    return n.without_embeddings - cfg.moe_layers * (cfg.E - cfg.A) * n.expert


def kv_bytes_per_token(cfg: Model, itemsize: int = 2) -> int:
    """Bytes of the cache for one token, the MTP layer's not counted."""
    return 2 * cfg.L * cfg.K * cfg.H * itemsize


def flops_per_token(cfg: Model, length: int, *, training: bool = False, mtp: bool = False) -> float:
    """Floating-point operations of a token, the mean over a row of `length`: products of matrices and of attention, two
    for each multiply-add, attention over the tokens up to the own one.

    Forward, or with the backward pass (nothing recomputed). `mtp`: the MTP layer and its use of the head too. Norms,
    activations, the softmax and the look-up are left out: less than a percent.
    """
    specs: Any = glm.specs(cfg)
    parts = [specs.dense, specs.moe, specs.head_DV] + ([specs.mtp, specs.head_DV] if mtp and specs.mtp else [])
    products = sum(_multiply_adds(cfg, w) for one in parts for _, w in spec.leaves(one))
    layers = cfg.L + bool(mtp and specs.mtp)
    attended = (length + 1) / 2
    attention = layers * 2 * cfg.N * cfg.H * attended  # scores, and the sum of values
    return 2 * (products + attention) * (1 + BACKWARD * training)


def _multiply_adds(cfg: Model, declared: Spec) -> int:
    """Of one token with one weight: each matrix once, of experts the active ones."""
    if not declared.ins:
        return 0
    return used(cfg, declared)


def used(cfg: Model, declared: Spec) -> int:
    """Entries of a weight that one token uses: of a stack of experts A of E."""
    return declared.count * cfg.A // cfg.E if "E" in declared.batch else declared.count


def _layer(part: Any, layers: int) -> int:
    return spec.count(part) // layers


def _experts(part: Any) -> list[Spec]:
    return [declared for _, declared in spec.leaves(part) if "E" in declared.batch]
