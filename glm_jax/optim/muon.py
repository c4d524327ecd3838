"""Muon in Moonlight's form, as an optax transform that reads each weight's matrix from its declaration.

    M <- mu M + G;   U <- G + mu M;   update = update_rms * sqrt(max(rows, cols)) * NS(U)

(spec section 4.2). NS is five steps of the published quintic, which leave singular values s between 0.68 and 1.21: the
update's RMS is update_rms times the RMS of s, 0.158 to 0.21 for Gaussian momentum and not 0.2. `ns_polish` steps of a
quintic that converges follow if asked for: two bring s to one within 0.06 %, and the RMS with it.

The matrix of a `Spec` has all its ins as rows and all its outs as columns; batch letters, the
layer stack among them, count independent matrices. Under a mesh each matrix is whole on one device while it is orthogonalised
(`glm_jax.parallel.homes`); the head, too large for that, stays split along the vocabulary, and its X X^T are summed. The
momentum lies where its weight lies.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from glm_jax.config import DType
from glm_jax.parallel.homes import Stack, each_matrix, over_columns
from glm_jax.spec import Spec
from pallas_kernels import newton_schulz as kernels

PUBLISHED = (3.4445, -4.7750, 2.0315)  # steep at 0: lifts small singular values, and converges to none
CONVERGENT = (15 / 8, -10 / 8, 3 / 8)  # flat at 1: what is near comes nearer, by the cube of its distance
HEADS = "NK"


class MuonState(NamedTuple):
    momentum: Any  # a tree like the parameters'


@partial(jax.jit, static_argnames=("steps", "dtype", "polish"))
def newton_schulz(x_BPQ: Array, steps: int = 5, dtype: DType = "float32", polish: int = 0) -> Array:
    """Each P-by-Q matrix with its singular values pushed towards one; any number of batch dimensions.

    Five steps of the published coefficients leave what was above 0.3 % of the norm between 0.68 and 1.21, what was
    below lower, and no number of them converges; two of `polish` then leave 0.9994 to 1.0001. Products take `dtype`
    in and accumulate in float32; the result has `dtype`.
    """
    return _iterate(_unit(x_BPQ, (-2, -1)).astype(dtype), steps, polish)


def scale_by_muon(  # noqa: PLR0913 (the options of one method, all named)
    specs: Any,
    *,
    momentum: float = 0.95,
    momentum_dtype: DType = "float32",
    nesterov: bool = True,
    ns_steps: int = 5,
    ns_dtype: DType = "float32",
    update_rms: float = 0.2,
    split_heads: bool = False,
    ns_polish: int = 0,
    ns_gram: bool = False,
) -> optax.GradientTransformation:
    """Orthogonalised momentum for every array of `specs`, a tree like the parameters' with a `Spec` for each.

    The result is an ascent direction: subtract it, times the learning rate. In float32 it is the formula to 1e-5; with
    `ns_dtype` bfloat16, as Moonlight trains, to 3e-2. `split_heads` treats every head of the
    attention projections as a matrix of its own, its scale included. `momentum_dtype` bfloat16 halves the state; each step's
    sum is float32 and rounded once, when it is kept. `ns_gram` iterates on X X^T alone: fewer operations, and float16 or
    float32. Leaves that `optax.partition` masks pass by.
    """

    def init(params: Any) -> MuonState:
        return MuonState(jax.tree.map(lambda w: jnp.zeros_like(w, dtype=momentum_dtype), params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        f32 = jnp.float32
        new = jax.tree.map(lambda g, m: momentum * m.astype(f32) + g.astype(f32), updates, state.momentum)
        ahead = jax.tree.map(lambda g, m: g.astype(f32) + momentum * m, updates, new) if nesterov else new

        leaves, tree = jax.tree.flatten(specs)
        found = tree.flatten_up_to(ahead)
        mine = [i for i, u in enumerate(found) if not isinstance(u, optax.MaskedNode)]
        options = ns_steps, ns_dtype, split_heads, ns_polish, ns_gram
        for i, u in zip(mine, orthogonal([leaves[i] for i in mine], [found[i] for i in mine], *options), strict=True):
            found[i] = update_rms * u
        return jax.tree.unflatten(tree, found), MuonState(jax.tree.map(lambda m: m.astype(momentum_dtype), new))

    return optax.GradientTransformation(init, update)


def orthogonal(
    specs: list[Spec], us: list[Array], steps: int, dtype: DType, split_heads: bool, polish: int = 0, gram: bool = False
) -> list[Array]:
    """sqrt(max(rows, cols)) * NS of each of the weights' matrices: entries of RMS about one, float32."""
    stacks = [_stack(spec, split_heads) for spec in specs]
    xs = [_unit(u, stack.rows + stack.columns).astype(dtype) for stack, u in zip(stacks, us, strict=True)]
    whole = [i for i, stack in enumerate(stacks) if stack.spec.kind != "head" or stack.split is None]
    iterate = partial(_iterate, steps=steps, polish=polish, gram=gram)
    ys = dict(zip(whole, each_matrix(iterate, [stacks[i] for i in whole], [xs[i] for i in whole]), strict=True))
    for i in set(range(len(xs))) - set(whole):
        ys[i] = over_columns(partial(_iterate_columns, quintics=_quintics(steps, polish)), stacks[i], xs[i])

    def scale(i: int) -> float:
        sides = (math.prod(us[i].shape[d] for d in side) for side in (stacks[i].rows, stacks[i].columns))
        return math.sqrt(max(sides))

    return [scale(i) * ys[i].astype(jnp.float32) for i in range(len(xs))]


def _stack(spec: Spec, split_heads: bool) -> Stack:
    """Positions of the batch, of the matrix's rows and of its columns in the weight's array."""
    heads = HEADS if split_heads else ""
    batch = spec.batch + "".join(letter for letter in spec.ins + spec.outs if letter in heads)
    ins, outs = ("".join(letter for letter in side if letter not in heads) for side in (spec.ins, spec.outs))
    return Stack(spec, *(tuple(map(spec.dims.index, letters)) for letters in (batch, ins, outs)))


def _unit(x: Array, axes: tuple[int, ...]) -> Array:
    """`x` over its Frobenius norm along the axes of its matrices, float32: in range for any dtype."""
    x = x.astype(jnp.float32)
    return x / (jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True)) + 1e-7)


def _quintics(steps: int, polish: int) -> tuple[tuple[float, float, float], ...]:
    """`steps` of the published quintic, then `polish` of the convergent one."""
    return (PUBLISHED,) * steps + (CONVERGENT,) * polish


def _iterate(x_BPQ: Array, steps: int, polish: int, gram: bool = False) -> Array:
    return kernels.newton_schulz(x_BPQ, _quintics(steps, polish), implementation="gram" if gram else None)


def _iterate_columns(
    x_PQ: Array, total: Callable[[Array], Array], quintics: tuple[tuple[float, float, float], ...]
) -> Array:
    """The same of a matrix of which each device has some columns: A = X X^T is a sum over them, the rest is local."""
    product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST if x_PQ.dtype == jnp.float32 else None,
                      preferred_element_type=jnp.float32)  # fmt: skip

    def step(x_PQ: Array, quintic: Array) -> tuple[Array, None]:
        a, b, c = quintic
        gram_PP = total(product("pq,rq->pr", x_PQ, x_PQ))
        low_PP = gram_PP.astype(x_PQ.dtype)
        poly_PP = (b * gram_PP + c * product("pr,rs->ps", low_PP, low_PP)).astype(x_PQ.dtype)
        return (a * x_PQ.astype(jnp.float32) + product("pr,rq->pq", poly_PP, x_PQ)).astype(x_PQ.dtype), None

    return jax.lax.scan(step, x_PQ, jnp.asarray(quintics, jnp.float32))[0]
