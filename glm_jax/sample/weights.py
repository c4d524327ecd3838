"""Parameters as sampling holds them: layer by layer, in the type that they compute in.

A decoded token costs what reading the weights costs. A CPU copies the second factor of a product before it multiplies, but reads
the first once and in order, if what is summed over lies side by side: so there matrices are held with their inputs innermost,
and `model.ops.project` puts them first. Each use begins with `as_declared`, which the products undo: nothing is moved.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from glm_jax import mesh, model
from glm_jax.config import ConfigError, Model
from glm_jax.spec import Spec, declare
from pallas_kernels import fp8
from pallas_kernels.choose import platform
from pallas_kernels.fp8 import Quantized

IN_8_BITS = ("matrix", "shared")  # kinds of weights: embedding, output matrix, router, norms and biases keep their bits


@partial(jax.jit, static_argnames=("cfg", "in_8_bits"))
def prepare(cfg: Model, params: model.GLM, in_8_bits: bool = False) -> model.GLM:
    """Parameters as decoding reads them: layer by layer, in the model's dtype, without the MTP layer. For `Session` and `generate`
    alone; these do it themselves, and who calls them often with the same parameters does it once and passes the result.

    `in_8_bits`: the layers' matrices as `pallas_kernels.fp8` has them (report, section 3.5; spec section 11: FP8 rollouts, BF16 training).
    ConfigError for these on a tensor axis: a block's scale would lie on two devices.
    """
    if in_8_bits and mesh.axis_size(mesh.TENSOR) > 1:
        raise ConfigError(
            f"8-bit weights cannot be split over mesh.tensor={mesh.axis_size(mesh.TENSOR)}; use mesh.expert or mesh.fsdp instead"
        )
    used = model.unstack(mesh.spread(params, model.specs(cfg), cfg.dtype, mesh.in_use))
    head_DV = mesh.spread(used.head_DV, model.specs(cfg).head_DV, cfg.dtype, mesh.everywhere)
    used = dataclasses.replace(used, head_DV=head_DV, mtp=None)
    return _turned(cfg, _quantized(cfg, used) if in_8_bits else used, back=False)


def as_declared(cfg: Model, prepared: model.GLM) -> model.GLM:
    """What `prepare` made, with the dimensions that the model's code expects."""
    return _turned(cfg, prepared, back=True)


def _turned(cfg: Model, params: model.GLM, back: bool) -> model.GLM:
    """On a CPU, every matrix but embedding and router with what is summed over behind its outputs, or back."""
    if platform() != "cpu":
        return params

    def turn(spec: Spec, w: Array | Quantized) -> Array | Quantized:
        if spec.kind not in (*IN_8_BITS, "head") or isinstance(w, Quantized):
            return w
        # what experts send back to D is summed over them too: [D, E, M]
        first = 0 if "D" in spec.outs else len(spec.batch)
        last = first + len(spec.outs) if back else len(spec.batch) + len(spec.ins)
        return jnp.moveaxis(w, range(first, last), range(first - last, 0))

    return jax.tree.map(turn, _specs(cfg, params), params)


def _quantized(cfg: Model, params: model.GLM) -> model.GLM:
    """Every matrix of a layer in 8 bits, scaled in blocks of what is summed over by what comes out, in its own shape."""

    def quantize(spec: Spec, w: Array) -> Array | Quantized:
        if spec.kind not in IN_8_BITS:
            return w
        batch, ins, run = len(spec.batch), len(spec.batch) + len(spec.ins), fp8.quantize
        if mesh.active():  # each device its experts: jax has no rule for splitting dimensions beside one that is spread
            layout = mesh.without(mesh.in_use(spec), mesh.TENSOR)
            w = jax.sharding.reshard(w, layout)
            run = jax.shard_map(run, in_specs=PartitionSpec(*layout[:batch]), out_specs=PartitionSpec(*layout[:batch]))
        matrix = w.reshape(*w.shape[:batch], math.prod(w.shape[batch:ins]), math.prod(w.shape[ins:]))
        value, scale = run(matrix)
        return Quantized(value.reshape(w.shape), scale)

    return jax.tree.map(quantize, _specs(cfg, params), params)


def _specs(cfg: Model, params: model.GLM) -> model.GLM:
    """Of unstacked parameters."""

    def layers(stack: Any) -> tuple | None:
        return None if stack is None else tuple(declare(type(p), cfg) for p in stack)

    return dataclasses.replace(model.specs(cfg), dense=layers(params.dense), moe=layers(params.moe), mtp=None)
