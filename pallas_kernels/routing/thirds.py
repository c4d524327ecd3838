"""The router's product on matrix units that take bfloat16, exact where x is bfloat16: a float32 is a sum of three bfloat16.

x router = x [high | middle | low], one product with 3 E columns. XLA's own of the highest precision takes x apart as well, into
six products, and in GLM-4.5's train step those of the routers are what TPU's compiler spends the longest on.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array


def refusal(operation: str, x_BTD: Array, router_DE: Array) -> str | None:
    if x_BTD.dtype != jnp.bfloat16:
        return f"x {x_BTD.shape} is {x_BTD.dtype}; it takes bfloat16"
    return None


@jax.custom_vjp
def logits(x_BTD: Array, router_DE: Array) -> Array:
    return _sum(_product(x_BTD, _side_by_side(*_thirds(router_DE))))


def _forward(x_BTD: Array, router_DE: Array):
    return logits(x_BTD, router_DE), (x_BTD, router_DE)


def _backward(kept: tuple[Array, Array], dy_BTE: Array) -> tuple[Array, Array]:
    """dx, which is rounded to bfloat16, is summed without the products that lie below 2^-16."""
    x_BTD, router_DE = kept
    dy_high, dy_middle, dy_low = _thirds(dy_BTE)
    high, middle, low = _thirds(router_DE)
    of_router = jax.linear_transpose(partial(_product, x_BTD), _side_by_side(high, middle, low))
    of_x = jax.linear_transpose(lambda x_BTD: _product(x_BTD, _side_by_side(high, middle, high)), x_BTD)
    (drouter,) = of_router(_side_by_side(dy_high, dy_middle, dy_low))
    (dx_BTD,) = of_x(_side_by_side(dy_high, dy_high, dy_middle))
    return dx_BTD, _sum(drouter)


logits.defvjp(_forward, _backward)


def _thirds(z: Array) -> tuple[Array, Array, Array]:
    """Three float32 whose sum is z, and which bfloat16 holds."""
    high = jax.lax.reduce_precision(z, exponent_bits=8, mantissa_bits=7)
    middle = jax.lax.reduce_precision(z - high, exponent_bits=8, mantissa_bits=7)
    return high, middle, z - high - middle


def _side_by_side(*parts: Array) -> Array:
    return jnp.concatenate(parts, axis=-1)


def _sum(parts: Array) -> Array:
    high, middle, low = jnp.split(parts, 3, axis=-1)
    return high + (middle + low)


def _product(x_BTD: Array, parts_DE: Array) -> Array:
    """Exact in one pass, which the default precision is: factors are bfloat16 in value, in type float32, as sums are."""
    return jnp.einsum("...d,de->...e", x_BTD.astype(jnp.float32), parts_DE, precision=jax.lax.Precision.DEFAULT)
