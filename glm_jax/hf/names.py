"""The table of names: which tensors of a published checkpoint a weight is, read from its declaration (spec 1.4).

A matrix lies there as [out, in] and each expert alone; the embedding as [in, out], which is how a look-up reads it.
Newer files may hold the experts of a layer as one tensor, gate above up: `Tensor.fused` says where in it one lies.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from glm_jax import model, spec
from glm_jax.config import Model
from glm_jax.spec import Spec

ROUTER_BIAS = "router_bias_LE"
_FUSED = {
    "gate_proj.weight": ("gate_up_proj", 0, 2),
    "up_proj.weight": ("gate_up_proj", 1, 2),
    "down_proj.weight": ("down_proj", 0, 1),
}


@dataclass(frozen=True)
class Fused:
    """Where an expert's matrix lies in a fused tensor [experts, parts x rows, columns]."""

    name: str
    expert: int
    part: int
    parts: int


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint: its name, the place [index] that it fills in our array, and its other form, if any."""

    name: str
    index: tuple[int, ...]
    fused: Fused | None = None


def weights(cfg: Model) -> dict[str, Spec]:
    """Dotted path -> declaration of every array that a checkpoint holds, the balance bias last."""
    declared = dict(spec.leaves(model.specs(cfg)))
    return {**declared, ROUTER_BIAS: model.router_bias_spec(cfg)} if cfg.router_rows else declared


def tensors(declared: Spec, within: tuple[range, ...] | None = None) -> Iterator[Tensor]:
    """The tensors that one of our arrays is made of: one for each index of its batch letters (or those `within`)."""
    everywhere = tuple(map(range, declared.shape[: len(declared.batch)]))
    for index in itertools.product(*(everywhere if within is None else within)):
        number = dict(zip(declared.batch, index, strict=True))
        layer, expert = declared.first_layer + number.get("L", 0), number.get("E")
        fused = None if expert is None or declared.ins == "" else _fused(declared, layer, expert)
        yield Tensor(declared.hf.format(L=layer, E=expert), index, fused)


def _fused(declared: Spec, layer: int, expert: int) -> Fused:
    stem, projection = declared.hf.split("{E}.")
    name, part, parts = _FUSED[projection]
    return Fused(stem.format(L=layer) + name, expert, part, parts)


def transposed(declared: Spec) -> bool:
    """Whether its tensors are [out, in]: all matrices but the embedding."""
    return declared.ins != "" and declared.kind != "embedding"


def file_order(declared: Spec) -> tuple[int, ...]:
    """Our dims in the order in which a file has them."""
    batch, ins, count = len(declared.batch), len(declared.ins), len(declared.dims)
    if not transposed(declared):
        return tuple(range(count))
    return (*range(batch), *range(batch + ins, count), *range(batch, batch + ins))


def matrix(declared: Spec) -> tuple[int, int]:
    """(in, out) sizes of one of its matrices; (1, entries) of a vector."""
    sizes = declared.shape[len(declared.batch) :]
    split = len(declared.ins)
    return math.prod(sizes[:split]), math.prod(sizes[split:])


def tensor_shape(declared: Spec) -> tuple[int, ...]:
    """Shape of each of its tensors in a file."""
    ins, outs = matrix(declared)
    if not declared.ins:
        return (outs,)
    return (outs, ins) if transposed(declared) else (ins, outs)


def table(cfg: Model) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor name -> (dotted path of our array, index in it): the whole checkpoint less the MTP layer's copies."""
    return {
        tensor.name: (path, tensor.index) for path, declared in weights(cfg).items() for tensor in tensors(declared)
    }


def copies(cfg: Model) -> dict[str, str]:
    """Copies of shared tensors that the MTP layer carries: name -> dotted path of the array that it repeats."""
    if not cfg.mtp_layers:
        return {}
    layer = model.LAYER.format(L=cfg.L)
    return {f"{layer}embed_tokens.weight": "embed_VD", f"{layer}shared_head.head.weight": "head_DV"}
