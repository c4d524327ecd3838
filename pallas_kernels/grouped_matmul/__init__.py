"""Grouped matmul: rows sorted by group, each group with a matrix of its own; dropless, any group sizes.

`group_sizes_E` (int32) may sum to less than R. The tail rows beyond come out zero and get no gradient,
and what they hold (NaN included) reaches nothing else. Products accumulate in float32 and come out in x's dtype.

Inside `shard_map(check_vma=True)` all inputs must vary over the same axes: `jax.lax.pcast` them before the call.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.choose import Later, choose
from pallas_kernels.grouped_matmul import reference, routed, tpu, xla

IMPLEMENTATIONS = {"reference": reference, "xla": xla, "tpu": tpu, "gpu": Later("pallas_kernels.grouped_matmul.gpu")}


def gmm(
    x_RD: Float[Array, "R D"],
    w_EDM: Float[Array, "E D M"],
    group_sizes_E: Int[Array, " E"],
    *,
    implementation: str | None = None,
) -> Float[Array, "R M"]:
    """Rows of x times their group's matrix; differentiable in x and w. Raises ValueError for shapes or names that do not fit."""
    _check("gmm", x_RD, w_EDM, group_sizes_E, contract=1)
    module = choose("gmm", IMPLEMENTATIONS, implementation, x_RD, w_EDM)
    return _gmm(x_RD, w_EDM, group_sizes_E.astype(jnp.int32), module)


def gmm_t(
    x_RM: Float[Array, "R M"],
    w_EDM: Float[Array, "E D M"],
    group_sizes_E: Int[Array, " E"],
    *,
    implementation: str | None = None,
) -> Float[Array, "R D"]:
    """Rows of x times their group's matrix read transposed: the input's gradient of `gmm`. Not itself differentiable."""
    _check("gmm_t", x_RM, w_EDM, group_sizes_E, contract=2)
    module = choose("gmm_t", IMPLEMENTATIONS, implementation, x_RM, w_EDM)
    return module.gmm_t(x_RM, w_EDM, group_sizes_E.astype(jnp.int32))


def tgmm(
    x_RD: Float[Array, "R D"],
    y_RM: Float[Array, "R M"],
    group_sizes_E: Int[Array, " E"],
    sums_EDM: Float[Array, "E D M"] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "E D M"]:
    """Per group the product of x transposed and y, in float32: the weights' gradient of `gmm`. Not itself differentiable.

    With `sums_EDM` it is added to them, in float32, and comes out in their dtype; on TPU in their memory, if nobody else needs it.
    """
    _check_sizes("tgmm", group_sizes_E)
    if x_RD.ndim != 2 or y_RM.ndim != 2 or x_RD.shape[0] != y_RM.shape[0]:
        raise ValueError(f"tgmm: x {x_RD.shape} and y {y_RM.shape} must be matrices with equally many rows")
    result = (len(group_sizes_E), x_RD.shape[1], y_RM.shape[1])
    if sums_EDM is not None and sums_EDM.shape != result:
        raise ValueError(f"tgmm: sums {sums_EDM.shape} of x {x_RD.shape} and y {y_RM.shape} must be {result}")
    module = choose("tgmm", IMPLEMENTATIONS, implementation, x_RD, y_RM)
    return routed.tgmm(module, x_RD, y_RM, group_sizes_E.astype(jnp.int32), sums_EDM)


def expert_mlp(
    x_XD: Float[Array, "X D"],
    gate_EDM: Float[Array, "E D M"],
    up_EDM: Float[Array, "E D M"],
    down_EMD: Float[Array, "E M D"],
    experts_XA: Int[Array, "X A"],
    weights_XA: Float[Array, "X A"],
    *,
    at_once: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "X D"]:
    """Each token's weighted sum over its experts of down(silu(gate x) * up x).

    An expert outside 0..E-1 adds nothing and gets no gradient: under expert parallelism pass `experts_XA - first`.
    A token names an expert at most once. "xla" computes in float32 whatever the inputs, never stores the routed rows and keeps
    its inputs only for the backward pass; on an accelerator rows and hidden layer are x's dtype, sums float32, routed rows of x (on
    TPU for the backward pass only) and of the result are stored while they are needed, and the pre-activations of gate and up
    are kept. The result has x's dtype.
    At most `at_once` routed rows are stored at a time on an accelerator, in as many passes as the experts here have rows; then nothing
    but the inputs is kept.
    Differentiable in all but `experts_XA`. Raises ValueError for shapes that do not fit.
    """
    check_mlp(x_XD, gate_EDM, up_EDM, down_EMD, experts_XA, weights_XA, at_once)
    experts_XA = experts_XA.astype(jnp.int32)
    module = choose("expert_mlp", IMPLEMENTATIONS, implementation, x_XD, gate_EDM)
    if module is reference:
        return reference.expert_mlp(x_XD, gate_EDM, up_EDM, down_EMD, experts_XA, weights_XA)
    return _expert_mlp(x_XD, gate_EDM, up_EDM, down_EMD, experts_XA, weights_XA, module, at_once)


def expert_mlp_grad(
    x_XD: Float[Array, "X D"],
    layer: tuple[Float[Array, "E D M"], Float[Array, "E D M"], Float[Array, "E M D"]],
    experts_XA: Int[Array, "X A"],
    weights_XA: Float[Array, "X A"],
    dy_XD: Float[Array, "X D"],
    sums: tuple[Float[Array, "E D M"], Float[Array, "E D M"], Float[Array, "E M D"]],
    *,
    at_once: int | None = None,
    implementation: str | None = None,
) -> tuple[
    Float[Array, "X D"],
    Float[Array, "X A"],
    tuple[Float[Array, "E D M"], Float[Array, "E D M"], Float[Array, "E M D"]],
]:
    """What `expert_mlp` of a `layer` (gate, up, down) would give back for `dy_XD`: gradients of x and weights, and `sums` with those of
    the layer added to them as `tgmm` does: for tokens that come in pieces. The pre-activations are computed again.

    Raises ValueError for shapes that do not fit.
    """
    check_mlp(x_XD, *layer, experts_XA, weights_XA, at_once)
    shapes = tuple(w.shape for w in layer)
    if dy_XD.shape != x_XD.shape or tuple(s.shape for s in sums) != shapes:
        raise ValueError(
            f"expert_mlp_grad: dy {dy_XD.shape} must be as x {x_XD.shape}, sums {[s.shape for s in sums]} as the layer {shapes}"
        )
    experts_XA = experts_XA.astype(jnp.int32)
    module = choose("expert_mlp", IMPLEMENTATIONS, implementation, x_XD, layer[0])
    if module in (reference, xla):

        def mlp(x_XD, weights_XA, gate_EDM, up_EDM, down_EMD):
            arrays = x_XD, gate_EDM, up_EDM, down_EMD, experts_XA, weights_XA
            return expert_mlp(*arrays, implementation=implementation)

        dx_XD, dweights_XA, *dlayer = jax.vjp(mlp, x_XD, weights_XA, *layer)[1](dy_XD)
        gate_EDM, up_EDM, down_EMD = ((s + d).astype(s.dtype) for s, d in zip(sums, dlayer, strict=True))
        return dx_XD, dweights_XA, (gate_EDM, up_EDM, down_EMD)
    inputs = x_XD, *layer, experts_XA, weights_XA
    dx_XD, dweights_XA, sums = routed.expert_mlp_grad(module, *inputs, None, dy_XD, sums, at_once)
    return dx_XD, dweights_XA.astype(weights_XA.dtype), sums


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _gmm(x_RD, w_EDM, group_sizes_E, module):
    return module.gmm(x_RD, w_EDM, group_sizes_E)


def _gmm_fwd(x_RD, w_EDM, group_sizes_E, module):
    return module.gmm(x_RD, w_EDM, group_sizes_E), (x_RD, w_EDM, group_sizes_E)


def _gmm_bwd(module, saved, dy_RM):
    x_RD, w_EDM, group_sizes_E = saved
    dx_RD = module.gmm_t(dy_RM, w_EDM, group_sizes_E)
    dw_EDM = module.tgmm(x_RD, dy_RM, group_sizes_E).astype(w_EDM.dtype)
    return dx_RD, dw_EDM, None


_gmm.defvjp(_gmm_fwd, _gmm_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _expert_mlp(x_XD, gate_EDM, up_EDM, down_EMD, experts_XA, weights_XA, module, at_once):
    return _expert_mlp_fwd(x_XD, gate_EDM, up_EDM, down_EMD, experts_XA, weights_XA, module, at_once)[0]


def _expert_mlp_fwd(x_XD, gate_EDM, up_EDM, down_EMD, experts_XA, weights_XA, module, at_once):
    inputs = x_XD, gate_EDM, up_EDM, down_EMD, experts_XA, weights_XA
    y_XD, hidden = (xla.expert_mlp(*inputs), None) if module is xla else routed.expert_mlp(module, *inputs, at_once)
    return y_XD, (inputs, hidden)


def _expert_mlp_bwd(module, at_once, saved, dy_XD):
    (x_XD, gate_EDM, up_EDM, down_EMD, experts_XA, weights_XA), hidden = saved
    layer, choices = (gate_EDM, up_EDM, down_EMD), (experts_XA, weights_XA)
    if module is xla:
        dx_XD, *dlayer, dweights_XA = xla.expert_mlp_grad(x_XD, *layer, *choices, dy_XD)
    else:
        found = routed.expert_mlp_grad(module, x_XD, *layer, *choices, hidden, dy_XD, at_once=at_once)
        dx_XD, dweights_XA, dlayer = found
    dlayer = (d.astype(w.dtype) for d, w in zip(dlayer, layer, strict=True))
    return dx_XD.astype(x_XD.dtype), *dlayer, None, dweights_XA.astype(weights_XA.dtype)  # none for the experts


_expert_mlp.defvjp(_expert_mlp_fwd, _expert_mlp_bwd)


def _check(name: str, x: Array, w: Array, group_sizes_E: Array, contract: int) -> None:
    _check_sizes(name, group_sizes_E)
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[contract] or w.shape[0] != group_sizes_E.shape[0]:
        raise ValueError(
            f"{name}: x {x.shape}, w {w.shape}, group_sizes {group_sizes_E.shape} do not fit; x's width must be w's dimension {contract} "
            "and w must have one matrix per group"
        )
    if x.dtype != w.dtype:
        raise ValueError(f"{name}: x is {x.dtype} and w {w.dtype}; cast one of them, nothing is promoted here")


def _check_sizes(name: str, group_sizes_E: Array) -> None:
    if group_sizes_E.ndim != 1 or not jnp.issubdtype(group_sizes_E.dtype, jnp.integer):
        raise ValueError(
            f"{name}: group_sizes {group_sizes_E.shape} {group_sizes_E.dtype} must be a vector of integers"
        )


def check_mlp(
    x: Array, gate: Array, up: Array, down: Array, experts: Array, weights: Array, at_once: int | None
) -> None:
    """ValueError for what is no layer of experts with its tokens and choices."""
    if at_once is not None and at_once < 1:
        raise ValueError(f"expert_mlp: at_once={at_once} must be at least 1; None stores all routed rows")
    shapes = f"x {x.shape}, gate {gate.shape}, up {up.shape}, down {down.shape}, experts {experts.shape}, weights {weights.shape}"
    if gate.ndim != 3 or up.shape != gate.shape or down.shape != (gate.shape[0], gate.shape[2], gate.shape[1]):
        raise ValueError(f"expert_mlp: {shapes} do not fit; gate and up are [E,D,M] and down [E,M,D]")
    if (
        x.ndim != 2
        or x.shape[1] != gate.shape[1]
        or experts.shape != weights.shape
        or experts.ndim != 2
        or len(experts) != len(x)
    ):
        raise ValueError(f"expert_mlp: {shapes} do not fit; x is [X,D], experts and weights are [X,A]")
    if not jnp.issubdtype(experts.dtype, jnp.integer):
        raise ValueError(f"expert_mlp: experts are {experts.dtype}; they must be integers")
