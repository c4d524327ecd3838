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
    # It runs once. On CPUs less of LLVM's effort compiles it five times as fast, and to the same bits.
    light = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    return jax.jit(_make, static_argnums=(0, 1), compiler_options=light)(cfg, tx, jax.random.key(seed))


def _make(cfg: Model, tx: optax.GradientTransformation, key: Array) -> State:
    params, router_bias_LE = fresh(cfg, key)
    return State(jnp.zeros((), jnp.int32), params, router_bias_LE, tx.init(params))  # pyright: ignore[reportArgumentType] (optax's types name containers, not dataclasses)


def fresh(cfg: Model, key: Array) -> tuple[model.GLM, Array]:
    """`model.init`, laid out over the mesh that is set; to be traced."""
    params, router_bias_LE = model.init(cfg, key)
    if mesh.active():
        params = jax.tree.map(jax.sharding.reshard, params, jax.tree.map(mesh.at_rest, model.specs(cfg)))
    return params, router_bias_LE


def abstract(cfg: Model, tx: optax.GradientTransformation) -> State:
    """Shapes, dtypes and layouts of `create`'s result, without computing it: what a checkpoint is restored into."""
    return mesh.concrete(jax.eval_shape(lambda: _make(cfg, tx, jax.random.key(0))))
