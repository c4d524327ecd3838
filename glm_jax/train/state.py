"""What training carries from step to step."""

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from glm_jax import mesh, model
from glm_jax.config import Model


@struct.dataclass
class State:
    step: Array  # int32, optimizer steps since the start of pre-training
    params: model.GLM
    router_bias_LE: Array  # moved by expert counts, never by a gradient
    opt: optax.OptState


def create(cfg: Model, tx: optax.GradientTransformation, seed: int) -> State:
    """A fresh state, float32, laid out over the mesh that is set; every array is born on its own devices."""

    def make(key: Array) -> State:
        params, router_bias_LE = fresh(cfg, key)
        return State(jnp.zeros((), jnp.int32), params, router_bias_LE, tx.init(params))  # pyright: ignore[reportArgumentType] (optax's types name containers, not dataclasses)

    return jax.jit(make)(jax.random.key(seed))


def fresh(cfg: Model, key: Array) -> tuple[model.GLM, Array]:
    """`model.init`, laid out over the mesh that is set; to be traced."""
    params, router_bias_LE = model.init(cfg, key)
    if mesh.active():
        params = jax.tree.map(jax.sharding.reshard, params, jax.tree.map(mesh.at_rest, model.specs(cfg)))
    return params, router_bias_LE


def abstract(cfg: Model, tx: optax.GradientTransformation) -> State:
    """Shapes, dtypes and layouts of `create`'s result, without computing it: what a checkpoint is restored into."""
    return mesh.concrete(jax.eval_shape(lambda: create(cfg, tx, 0)))
