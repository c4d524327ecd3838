"""A weight is declared once, as a string; everything else reads the declaration.

`weight("E | D -> M")` says: E independent matrices, each from D to M. From it follow the shape (`shape`), the
initial value (`init`), the layout on a mesh (`glm_jax.mesh`), the matrix that Muon orthogonalises
(`glm_jax.optim.muon`: left of the arrow in, right of it out, left of the bar a batch), the parameter count, and with
`hf=` its tensors in a published checkpoint (`glm_jax.hf.names`). Layer stacks put an L in front of the batch.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from glm_jax import dims
from glm_jax.config import Model

# `shared`: a matrix of the shared experts, whose M is M times their number
Kind = Literal["matrix", "shared", "embedding", "head", "router", "bias", "norm", "state"]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where weights lie in a published checkpoint: what goes before their names, and the number of their first layer."""

    prefix: str = ""
    first_layer: int = 0


@dataclasses.dataclass(frozen=True)
class Spec:
    """One weight: its letters by role, their sizes, and what kind of weight it is."""

    batch: str
    ins: str
    outs: str
    kind: Kind
    replicate: str = ""  # letters that no mesh axis may split
    shape: tuple[int, ...] = ()
    hf: str = ""  # its tensors' names in a published checkpoint; {L} and {E} stand for the number of a layer, an expert
    first_layer: int = 0  # number of the first layer of its stack there

    @property
    def dims(self) -> str:
        return self.batch + self.ins + self.outs

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    def resolve(self, cfg: Model, stack: int | None, place: "Place" = Place()) -> "Spec":
        """This declaration with sizes; `stack` layers put an L in front."""
        copies = {"M": cfg.shared_experts} if self.kind == "shared" else {}
        shape = tuple(cfg.size(letter) * copies.get(letter, 1) for letter in self.dims)
        named = dataclasses.replace(self, hf=place.prefix + self.hf, first_layer=place.first_layer)
        if stack is None:
            return dataclasses.replace(named, shape=shape)
        return dataclasses.replace(named, batch="L" + self.batch, shape=(stack, *shape))


def _parse(text: str, kind: Kind, replicate: str, hf: str) -> Spec:
    batch, _, matrix = text.rpartition("|")
    ins, _, outs = matrix.rpartition("->")
    batch, ins, outs = ("".join(part.split()) for part in (batch, ins, outs))
    dims.check(batch + ins + outs)
    return Spec(batch, ins, outs, kind, replicate, hf=hf)


def weight(text: str, *, kind: Kind = "matrix", replicate: str = "", hf: str = "") -> Any:
    """Declare a matrix, "batch | in -> out", initialised normally with the model's `init_std`."""
    return dataclasses.field(metadata={"spec": _parse(text, kind, replicate, f"{hf}.weight")})


def bias(text: str, *, hf: str = "") -> Any:
    """Declare an additive bias, initialised to zero."""
    return dataclasses.field(metadata={"spec": _parse(text, "bias", text.replace(" ", ""), f"{hf}.bias")})


def norm(text: str, *, hf: str = "") -> Any:
    """Declare the scale of an RMSNorm, initialised to one."""
    return dataclasses.field(metadata={"spec": _parse(text, "norm", text.replace(" ", ""), f"{hf}.weight")})


def state(text: str, *, hf: str = "") -> Spec:
    """Declare a buffer outside the gradient and the optimizer (the balance bias): float32 zeros at first."""
    return _parse(text, "state", text.replace(" ", ""), hf)


@dataclasses.dataclass(frozen=True)
class Part:
    """A nested class of weights: how deep it is stacked, whether the model has it, and its layers' place in a published
    checkpoint."""

    cls: type
    stack: Callable[[Model], int] | None
    when: Callable[[Model], bool]
    hf: str
    first_layer: Callable[[Model], int] | None


def part(
    cls: type,
    *,
    stack: Callable[[Model], int] | None = None,
    when: Callable[[Model], bool] = lambda cfg: True,
    hf: str = "",
    first_layer: Callable[[Model], int] | None = None,
) -> Any:
    """Declare a nested class of weights: stacked `stack(cfg)` deep, and None unless `when(cfg)`.

    `hf` goes before the names inside it; the {L} in it counts from `first_layer(cfg)`.
    """
    return dataclasses.field(metadata={"part": Part(cls, stack, when, hf, first_layer)})


def declare(cls: type, cfg: Model, stack: int | None = None, place: Place = Place()) -> Any:
    """`cls` with a `Spec` in the place of every array: the model's shape table as a tree."""
    values: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        if "spec" in f.metadata:
            values[f.name] = f.metadata["spec"].resolve(cfg, stack, place)
            continue
        child: Part = f.metadata["part"]
        depth = child.stack(cfg) if child.stack else stack
        first = child.first_layer(cfg) if child.first_layer else place.first_layer
        inside = Place(place.prefix + child.hf, first)
        values[f.name] = declare(child.cls, cfg, depth, inside) if child.when(cfg) and depth != 0 else None
    return cls(**values)


def leaves(specs: Any) -> list[tuple[str, Spec]]:
    """(dotted path, Spec) of every weight."""
    flat, _ = jax.tree_util.tree_flatten_with_path(specs)
    return [(path_name(path), spec) for path, spec in flat]


def path_name(path: tuple) -> str:
    """A pytree path as dotted text: layers.attention.q_DNH."""
    return ".".join(str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path)


def count(specs: Any) -> int:
    """Parameters declared by `specs`; no array is made."""
    return sum(spec.count for _, spec in leaves(specs))


def init(specs: Any, key: Array, std: float, dtype: Any = jnp.float32) -> Any:
    """Arrays for `specs`: matrices normal with deviation `std` (report: 0.02), norms one, biases and states zero.

    Each weight's key comes from its own name, so adding one weight changes no other's initial value.
    """

    def make(path: tuple, spec: Spec) -> Array:
        if spec.kind == "norm":
            return jnp.ones(spec.shape, dtype)
        if spec.kind in ("bias", "state"):
            return jnp.zeros(spec.shape, dtype)
        own = jax.random.fold_in(key, zlib.crc32(path_name(path).encode()))
        return (std * jax.random.normal(own, spec.shape, jnp.float32)).astype(dtype)

    return jax.tree_util.tree_map_with_path(make, specs)
