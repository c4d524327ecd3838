"""Grouped matmul: rows sorted by group, each group with a matrix of its own; dropless, any group sizes.

`group_sizes_E` (int32) may sum to less than R. The tail rows beyond come out zero and get no gradient,
and what they hold (NaN included) reaches nothing else. Products accumulate in float32 and come out in x's dtype.

Inside `shard_map(check_vma=True)` all inputs must vary over the same axes: `jax.lax.pcast` them before the call.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.grouped_matmul import reference, xla

IMPLEMENTATIONS = {"reference": reference, "xla": xla}


def gmm(
    x_RD: Float[Array, "R D"],
    w_EDM: Float[Array, "E D M"],
    group_sizes_E: Int[Array, " E"],
    *,
    implementation: str | None = None,
) -> Float[Array, "R M"]:
    """Rows of x times their group's matrix; differentiable in x and w. Raises ValueError for shapes or names that do not fit."""
    _check("gmm", x_RD, w_EDM, group_sizes_E, contract=1)
    return _gmm(x_RD, w_EDM, group_sizes_E, _module(implementation))


def gmm_t(
    x_RM: Float[Array, "R M"],
    w_EDM: Float[Array, "E D M"],
    group_sizes_E: Int[Array, " E"],
    *,
    implementation: str | None = None,
) -> Float[Array, "R D"]:
    """Rows of x times their group's matrix read transposed: the input's gradient of `gmm`. Not itself differentiable."""
    _check("gmm_t", x_RM, w_EDM, group_sizes_E, contract=2)
    return _module(implementation).gmm_t(x_RM, w_EDM, group_sizes_E)


def tgmm(
    x_RD: Float[Array, "R D"],
    y_RM: Float[Array, "R M"],
    group_sizes_E: Int[Array, " E"],
    *,
    implementation: str | None = None,
) -> Float[Array, "E D M"]:
    """Per group the product of x transposed and y, in float32: the weights' gradient of `gmm`. Not itself differentiable."""
    _check_sizes("tgmm", group_sizes_E)
    if x_RD.ndim != 2 or y_RM.ndim != 2 or x_RD.shape[0] != y_RM.shape[0]:
        raise ValueError(f"tgmm: x {x_RD.shape} and y {y_RM.shape} must be matrices with equally many rows")
    return _module(implementation).tgmm(x_RD, y_RM, group_sizes_E)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _gmm(x_RD, w_EDM, group_sizes_E, module):
    return module.gmm(x_RD, w_EDM, group_sizes_E)


def _gmm_fwd(x_RD, w_EDM, group_sizes_E, module):
    return module.gmm(x_RD, w_EDM, group_sizes_E), (x_RD, w_EDM, group_sizes_E)


def _gmm_bwd(module, saved, dy_RM):
    x_RD, w_EDM, group_sizes_E = saved
    dx_RD = module.gmm_t(dy_RM, w_EDM, group_sizes_E).astype(x_RD.dtype)
    dw_EDM = module.tgmm(x_RD, dy_RM, group_sizes_E).astype(w_EDM.dtype)
    return dx_RD, dw_EDM, np.zeros(group_sizes_E.shape, jax.dtypes.float0)


_gmm.defvjp(_gmm_fwd, _gmm_bwd)


def _module(name: str | None):
    if name is None:
        return xla
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"grouped_matmul: unknown implementation {name!r}; known: {', '.join(IMPLEMENTATIONS)}, or None for the best")
    return IMPLEMENTATIONS[name]


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
        raise ValueError(f"{name}: group_sizes {group_sizes_E.shape} {group_sizes_E.dtype} must be a vector of integers")
