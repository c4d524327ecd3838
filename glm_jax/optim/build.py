"""The optimizer of a run: which weight goes to Muon and which to AdamW, weight decay, clipping (spec 4.1-4.3)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from glm_jax.config import Optim
from glm_jax.optim.muon import scale_by_muon
from glm_jax.spec import Spec


def optimizer(cfg: Optim, specs: Any) -> optax.GradientTransformation:
    """Gradients to *directions*: the train step does `params - lr * direction`, lr read from the schedule.

    Decoupled weight decay is inside the direction, so that the learning rate multiplies it too:
    W (1 - lr wd) - lr update. Clipping by the global norm comes first; the step's own `optax.tree.norm(grads)`
    for the log is the same expression and compiled once.
    """
    muon = scale_by_muon(
        specs,
        momentum=cfg.momentum,
        momentum_dtype=cfg.momentum_dtype,
        nesterov=cfg.nesterov,
        ns_steps=cfg.ns_steps,
        ns_dtype=cfg.ns_dtype,
        update_rms=cfg.update_rms,
        split_heads=cfg.split_heads,
        ns_polish=cfg.ns_polish,
        ns_gram=cfg.ns_gram,
    )
    adam = optax.scale_by_adam(cfg.adam_b1, cfg.adam_b2, cfg.adam_eps, mu_dtype=jnp.float32)
    decayed = jax.tree.map(lambda spec: cfg.decay_norms_and_biases or spec.kind not in ("norm", "bias"), specs)
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm) if math.isfinite(cfg.clip_norm) else optax.identity(),
        optax.partition({"muon": muon, "adamw": adam}, jax.tree.map(lambda spec: owner(cfg, spec), specs)),
        optax.add_decayed_weights(cfg.weight_decay, mask=decayed),
    )


def owner(cfg: Optim, spec: Spec) -> str:
    """Which of "muon" and "adamw" updates a weight: the report excludes embedding, biases and norms from Muon."""
    if cfg.name == "adamw":
        return "adamw"
    return {"matrix": "muon", "shared": "muon", "router": cfg.router, "head": cfg.lm_head}.get(spec.kind, "adamw")


def muon(learning_rate: float | optax.Schedule, specs: Any, cfg: Optim = Optim()) -> optax.GradientTransformation:
    """`optimizer` as optax users expect it: updates to add to the parameters, learning rate included.

    `specs` is a tree like the parameters' with a `Spec` per array; `Spec("L", "D", "F", "matrix")` is a stack of L
    matrices from D to F.
    """
    return optax.chain(optimizer(cfg, specs), optax.scale_by_learning_rate(learning_rate))
