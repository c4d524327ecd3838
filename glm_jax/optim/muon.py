"""Muon in Moonlight's form, as an optax transform that reads each weight's matrix from its declaration.

    M <- mu M + G;   U <- G + mu M;   update = update_rms * sqrt(max(rows, cols)) * NS(U)

(spec section 4.2). NS is five steps of the published quintic, which leave singular values s between 0.68 and 1.21: the
update's RMS is update_rms times the RMS of s, 0.158 to 0.21 for Gaussian momentum and not 0.2. `ns_polish` steps of a
quintic that converges follow if asked for: two bring s to one within 0.06 %, and the RMS with it.

The matrix of a `Spec` has all its ins as rows and all its outs as columns; batch letters, the
layer stack among them, count independent matrices. Under a mesh a matrix is whole on its device while it is
orthogonalised, and the momentum lies where its weight lies.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from glm_jax import mesh
from glm_jax.config import DType
from glm_jax.spec import Spec
from pallas_kernels import newton_schulz as kernels

PUBLISHED = (3.4445, -4.7750, 2.0315)  # steep at 0: lifts small singular values, and converges to none
CONVERGENT = (15 / 8, -10 / 8, 3 / 8)  # flat at 1: what is near comes nearer, by the cube of its distance
HEADS = "NK"


class MuonState(NamedTuple):
    momentum: Any  # float32, a tree like the parameters'


@partial(jax.jit, static_argnames=("steps", "dtype", "polish"))
def newton_schulz(x_BPQ: Array, steps: int = 5, dtype: DType = "float32", polish: int = 0) -> Array:
    """Each P-by-Q matrix with its singular values pushed towards one; any number of batch dimensions.

    Five steps of the published coefficients leave what was above 0.3 % of the norm between 0.68 and 1.21, what was
    below lower, and no number of them converges; two of `polish` then leave 0.9994 to 1.0001. Products take `dtype`
    in and accumulate in float32; the result has `dtype`.
    """
    return _iterate(_unit(x_BPQ, (-2, -1)).astype(dtype), steps, polish)


def scale_by_muon(
    specs: Any,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    ns_dtype: DType = "float32",
    update_rms: float = 0.2,
    split_heads: bool = False,
    ns_polish: int = 0,
) -> optax.GradientTransformation:
    """Orthogonalised momentum for every array of `specs`, a tree like the parameters' with a `Spec` for each.

    The result is an ascent direction: subtract it, times the learning rate. In float32 it is the formula to 1e-5; with
    `ns_dtype` bfloat16, as Moonlight trains, to 3e-2. `split_heads` treats every head of the
    attention projections as a matrix of its own, its scale included. Leaves that `optax.partition` masks pass by.
    """

    def init(params: Any) -> MuonState:
        return MuonState(jax.tree.map(lambda w: jnp.zeros_like(w, dtype=jnp.float32), params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        new = jax.tree.map(lambda g, m: momentum * m + g.astype(jnp.float32), updates, state.momentum)
        ahead = jax.tree.map(lambda g, m: g.astype(jnp.float32) + momentum * m, updates, new) if nesterov else new

        def direction(spec: Spec, u: Any) -> Any:
            if isinstance(u, optax.MaskedNode):
                return u
            return update_rms * orthogonal(spec, u, ns_steps, ns_dtype, split_heads, ns_polish)

        return jax.tree.map(direction, specs, ahead), MuonState(new)

    return optax.GradientTransformation(init, update)


def orthogonal(spec: Spec, u: Array, steps: int, dtype: DType, split_heads: bool, polish: int = 0) -> Array:
    """sqrt(max(rows, cols)) * NS of each of the weight's matrices: entries of RMS about one, float32."""
    batch, ins, outs = _axes(spec, split_heads)
    order = batch + ins + outs
    rows, cols = (math.prod(u.shape[i] for i in axes) for axes in (ins, outs))

    x = mesh.whole(_unit(u, ins + outs).astype(dtype), spec)
    x_BPQ = x.transpose(order).reshape(*(u.shape[i] for i in batch), rows, cols)
    x_BPQ = _iterate(x_BPQ, steps, polish)
    x = x_BPQ.reshape([u.shape[i] for i in order]).transpose([order.index(i) for i in range(u.ndim)])
    return math.sqrt(max(rows, cols)) * mesh.rest(x, spec).astype(jnp.float32)


def _axes(spec: Spec, split_heads: bool) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Positions of the batch, of the matrix's rows and of its columns in the weight's array."""
    heads = HEADS if split_heads else ""
    places = {letter: i for i, letter in enumerate(spec.dims)}
    batch = spec.batch + "".join(letter for letter in spec.ins + spec.outs if letter in heads)
    ins, outs = ("".join(letter for letter in side if letter not in heads) for side in (spec.ins, spec.outs))
    return tuple(tuple(places[letter] for letter in letters) for letters in (batch, ins, outs))  # type: ignore[return-value]


def _unit(x: Array, axes: tuple[int, ...]) -> Array:
    """`x` over its Frobenius norm along the axes of its matrices, float32: in range for any dtype."""
    x = x.astype(jnp.float32)
    return x / (jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True)) + 1e-7)


def _iterate(x_BPQ: Array, steps: int, polish: int) -> Array:
    """`steps` of the published quintic, then `polish` of the convergent one."""
    return kernels.newton_schulz(x_BPQ, (PUBLISHED,) * steps + (CONVERGENT,) * polish)
