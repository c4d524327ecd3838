"""Parameters as sampling holds them: layer by layer, in the type that they compute in.

A decoded token costs what reading the weights costs. A CPU copies the second factor of a product before it multiplies, but reads
the first once and in order, if what is summed over lies side by side: so there matrices are held with their inputs innermost,
and `model.ops.project` puts them first. Each use begins with `as_declared`, which the products undo: nothing is moved.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from glm_jax import mesh, model
from glm_jax.config import Model
from glm_jax.spec import Spec, declare
from pallas_kernels.choose import platform


@partial(jax.jit, static_argnames=("cfg",))
def prepare(cfg: Model, params: model.GLM) -> model.GLM:
    """Parameters as decoding reads them: layer by layer, in the model's dtype, without the MTP layer. For `Session` and `generate`
    alone; these do it themselves, and who calls them often with the same parameters does it once and passes the result.
    """
    used = model.unstack(mesh.spread(params, model.specs(cfg), cfg.dtype, mesh.in_use))
    head_DV = mesh.spread(used.head_DV, model.specs(cfg).head_DV, cfg.dtype, mesh.everywhere)
    return _turned(cfg, dataclasses.replace(used, head_DV=head_DV, mtp=None), back=False)


def as_declared(cfg: Model, prepared: model.GLM) -> model.GLM:
    """What `prepare` made, with the dimensions that the model's code expects."""
    return _turned(cfg, prepared, back=True)


def _turned(cfg: Model, params: model.GLM, back: bool) -> model.GLM:
    """On a CPU, every matrix but embedding and router with what is summed over behind its outputs, or back."""
    if platform() != "cpu":
        return params

    def turn(spec: Spec, w: Array) -> Array:
        if spec.kind not in ("matrix", "shared", "head"):
            return w
        # what experts send back to D is summed over them too: [D, E, M]
        first = 0 if "D" in spec.outs else len(spec.batch)
        last = first + len(spec.outs) if back else len(spec.batch) + len(spec.ins)
        return jnp.moveaxis(w, range(first, last), range(first - last, 0))

    def layers(stack: Any) -> tuple | None:
        return None if stack is None else tuple(declare(type(p), cfg) for p in stack)

    specs = dataclasses.replace(model.specs(cfg), dense=layers(params.dense), moe=layers(params.moe), mtp=None)
    return jax.tree.map(turn, specs, params)
