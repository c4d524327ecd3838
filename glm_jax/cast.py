"""Weights in the type that their layer computes in, and their gradients in the same type.

A layer rounds its weights, and their gradients come back rounded as coarsely: kept as float32 until the optimizer reads them
they would take twice the memory and say no more. So a train step takes gradients by places, arrays of the layer's type that
stand beside the weights that it rounds and are never read.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from glm_jax.spec import Spec


@struct.dataclass
class Beside:
    """A weight, and where its gradient is taken: an array of its shape, in its layer's type."""

    weight: Array
    place: Array


def places(params: Any, specs: Any, dtype: Any) -> Any:
    """A tree like `params`, by which to differentiate `beside`: of weights that layers round, zeros of `dtype`; of the others
    the weight itself."""
    return jax.tree.map(lambda spec, w: jnp.zeros_like(w, dtype) if _rounds(spec, w, dtype) else w, specs, params)


def beside(params: Any, found: Any) -> Any:
    """`params` for a layer that is differentiated by the places `found` beside them."""
    return jax.tree.map(lambda w, place: place if place.dtype == w.dtype else Beside(w, place), params, found)


def cast(w: Array | Beside, spec: Spec, dtype: Any) -> Array:
    """A weight as its layer computes with it. Norm scales and the router keep their own precision: both are computed in
    float32 (spec section 1.1)."""
    if isinstance(w, Beside):
        return _through(w.weight, w.place)
    return _rounded(w, dtype) if _rounds(spec, w, dtype) else w if spec.kind in ("norm", "router") else w.astype(dtype)


def _rounds(spec: Spec, w: Array, dtype: Any) -> bool:
    return spec.kind not in ("norm", "router") and jnp.finfo(dtype).bits < jnp.finfo(w.dtype).bits


def _rounded(w: Array, dtype: Any) -> Array:
    """Rounded before it is cast: of a plain cast of a layer's slice TPU's compiler makes one of the whole stack, before the
    first layer, and keeps it."""
    return jax.lax.reduce_precision(w, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant).astype(dtype)


@jax.custom_vjp
def _through(w: Array, place: Array) -> Array:
    return _rounded(w, place.dtype)


_through.defvjp(lambda w, place: (_rounded(w, place.dtype), None), lambda _, dw: (None, dw))
