"""Small pure functions that every layer uses. Arrays and numbers in, arrays out."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from glm_jax import mesh
from pallas_kernels import fp8
from pallas_kernels.choose import platform
from pallas_kernels.fp8 import Quantized

FEW_TOKENS = 32


def project(x_BTD: Array, w: Array | Quantized, ins: int = 1, dtype: Any = None, to: str = "") -> Array:
    """x's last `ins` dimensions times a weight's first, the weight's others in their place: [B, T, D] with [D, N, H] is [B, T, N, H].
    `to` names the result's letters where what is summed over may lie on several devices.

    Of few tokens a CPU's time goes in reading the weight, and it reads a product's first factor once, in order, where the second
    is copied first: there the weight comes first (and sampling holds it so that its inputs lie side by side). Of many, tokens are
    one dimension there: sums over two of them, which gradients of weights are, would be transposed first.

    A weight of 8 bits, which only sampling has, is multiplied by x's numbers rounded to 8 bits too.
    """
    if isinstance(w, Quantized):
        return _in_8_bits(x_BTD, w, ins)
    layout = mesh.out_sharding(to) if to else None
    many = x_BTD.size > FEW_TOKENS * math.prod(w.shape[:ins])
    # tokens that lie on several devices in both dimensions are not one
    if platform() != "cpu" or (many and mesh.axis_size(mesh.CONTEXT) > 1):
        return jnp.tensordot(x_BTD, w, axes=ins, preferred_element_type=dtype, out_sharding=layout)
    if many:
        return _with_tokens_in_one(x_BTD, w, ins, dtype, layout)
    outs = w.ndim - ins
    w = jnp.moveaxis(w, range(ins), range(-ins, 0))  # as sampling holds it
    contract = range(outs, w.ndim), range(x_BTD.ndim - ins, x_BTD.ndim)
    x_BTD, w = (
        z if dtype is None else z.astype(dtype) for z in (x_BTD, w)
    )  # this back end has no product of two types
    if layout is not None:
        layout = PartitionSpec(*layout[-outs:], *layout[:-outs])
    y = jax.lax.dot_general(w, x_BTD, (contract, ((), ())), out_sharding=layout)
    return jnp.moveaxis(y, range(outs), range(-outs, 0))


def _with_tokens_in_one(x_BTD: Array, w: Array, ins: int, dtype: Any, layout: PartitionSpec | None) -> Array:
    """The product of [X, D], laid out as the dimensions that X is made of; `layout` is the result's where it needs one."""
    tokens = x_BTD.ndim - ins
    x_XD = x_BTD.reshape(math.prod(x_BTD.shape[:tokens]), *w.shape[:ins])
    if layout is not None:
        layout = PartitionSpec(*jax.typeof(x_XD).sharding.spec[:1], *layout[tokens:])
    y_XE = jnp.tensordot(x_XD, w, axes=ins, preferred_element_type=dtype, out_sharding=layout)
    back = PartitionSpec(*jax.typeof(x_BTD).sharding.spec[:tokens], *jax.typeof(y_XE).sharding.spec[1:])
    shape = *x_BTD.shape[:tokens], *w.shape[ins:]
    return jax.lax.reshape(y_XE, shape, out_sharding=back if mesh.active() else None)


def _in_8_bits(x_BTD: Array, w: Quantized, ins: int) -> Array:
    """The product with a weight that every device has whole, as `sample.weights` quantises it: as one matrix."""
    into, outs = w.value.shape[:ins], w.value.shape[ins:]
    whole, split = "BTDD"[: 2 + ins], "BTD" if len(outs) == 1 else "BTNH"

    def product(x_BTD: Array, value: Array, scale: Array) -> Array:
        matrix = Quantized(value.reshape(math.prod(into), math.prod(outs)), scale)
        matrix = jax.tree.map(lambda z: mesh.copied_as(z, x_BTD), matrix)
        y_XE = fp8.matmul(x_BTD.reshape(-1, math.prod(into)), matrix)
        return y_XE.reshape(*x_BTD.shape[:-ins], *outs)

    return mesh.per_shard(product, (whole, "", ""), split)(mesh.constrain(x_BTD, whole), *w)


def rms_norm(x_BTD: Array, scale_D: Array, eps: float) -> Array:
    """RMSNorm over the last dimension: computed in float32, cast back to x's dtype, then scaled (spec 1.3)."""
    x32 = x_BTD.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return normed.astype(x_BTD.dtype) * scale_D.astype(x_BTD.dtype)


def rotary_angles(positions_BT: Array, rotary: int, theta: float) -> Array:
    """Angle of each rotated pair, float32 [B, T, rotary/2 rounded up]: position * theta^(-2j/rotary)."""
    frequency = theta ** (-jnp.arange(0, rotary, 2, dtype=jnp.float32) / rotary)
    return positions_BT[..., None].astype(jnp.float32) * frequency


def rope(z_BTNH: Array, cos_BTH: Array, sin_BTH: Array) -> Array:
    """Rotate the first dims of every head, half-split: dim i pairs with i + their number (spec 1.3); the rest pass."""
    half = cos_BTH.shape[-1]
    cos, sin = (a[:, :, None, :].astype(z_BTNH.dtype) for a in (cos_BTH, sin_BTH))
    first, second, rest = z_BTNH[..., :half], z_BTNH[..., half : 2 * half], z_BTNH[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def swiglu(gate: Array, up: Array) -> Array:
    return jax.nn.silu(gate) * up
