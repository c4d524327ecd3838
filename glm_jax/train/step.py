"""One optimizer step: gradients accumulated over microbatches, Muon's update, the balance bias moved by counts.

The step knows no algorithm: pre-training, SFT and GRPO differ in what stands beside each token of a batch.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import Array

from glm_jax import cast, config, losses, mesh, model
from glm_jax.optim.balance import balance
from glm_jax.parallel.context import zigzag
from glm_jax.parallel.order import together
from glm_jax.train.state import State

Batch = dict[str, Array]  # a microbatch (see glm_jax.data.input), or a stack of them with C in front


@struct.dataclass
class Knobs:
    """What the schedule sets at each step; traced, so that nothing recompiles."""

    lr: Array
    mtp_weight: Array
    bias_rate: Array
    microbatches: Array  # how many of the batch's C microbatches are real


def loss_fn(
    params: model.GLM,
    cfg: config.Model,
    router_bias_LE: Array,
    batch: Batch,
    mtp_weight: Array | float,
    totals: dict,
    policy: losses.Policy | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Main loss + MTP loss + sequence balance loss of one microbatch, each over its global count in `totals`.

    The main loss is next-token cross-entropy or, with a policy, GRPO's surrogate; the MTP loss needs `mtp_targets`.
    totals: `weights` and `mtp_weights` summed over the whole batch, `microbatches`, and the balance loss's weight.
    """
    aux = model.hidden(
        cfg, params, router_bias_LE, batch["ids"], positions_BT=batch["positions"], segments_BT=batch["segments"],
        prefixes_BT=batch.get("prefixes"), next_ids_BT=batch["targets"] if "mtp_targets" in batch else None,
        experts_BTLA=batch.get("experts"),
    )  # fmt: skip
    head_DV, hidden_BTD = together((params.head_DV, aux.hidden_BTD))
    head_DV = model.output_matrix(cfg, dataclasses.replace(params, head_DV=head_DV))
    metrics = {}

    def component(hidden_BTD: Array, name: str) -> Array:
        targets_BT, weights_BT = batch[f"{name}targets"], batch[f"{name}weights"]
        if policy is None or name:
            total, _ = losses.next_token(hidden_BTD, head_DV, targets_BT, weights_BT, cfg.implementation)
        else:
            old_BT = batch["old_log_probs"]
            total, log_prob_BT = losses.policy_gradient(
                hidden_BTD, head_DV, targets_BT, weights_BT, batch["advantages"], old_BT,
                policy, cfg.implementation,
            )  # fmt: skip
            metrics.update(mismatch(log_prob_BT, old_BT, weights_BT != 0, policy.clip))
        return total / jnp.maximum(totals[f"{name}weights"], 1e-9)

    main = component(hidden_BTD, "")
    mtp = component(aux.mtp_hidden_BTD, "mtp_") if aux.mtp_hidden_BTD is not None else jnp.zeros(())
    sequence_balance = jnp.sum(aux.balance_L) / totals["microbatches"]
    loss = main + mtp_weight * mtp + totals["sequence_balance"] * sequence_balance
    silent_LE = jnp.zeros((router_bias_LE.shape[0] - aux.load_LE.shape[0], cfg.E), aux.load_LE.dtype)  # MTP not run
    load_LE = jnp.concatenate([aux.load_LE, silent_LE])
    return loss, {"loss": main, "mtp_loss": mtp, "balance_loss": sequence_balance, "load_LE": load_LE, **metrics}


def mismatch(log_prob_BT: Array, old_BT: Array, sampled_BT: Array, clip: tuple[float, float]) -> dict[str, Array]:
    """How far the trainer's log-probabilities lie from the sampler's: sums over sampled tokens, and the largest.

    k3 is the unbiased, positive estimator of the KL divergence, r - 1 - log r. `clipped` counts ratios outside the clip.
    """
    difference_BT = jnp.where(sampled_BT, log_prob_BT - old_BT, 0)
    excess_BT = jnp.expm1(difference_BT)
    return {
        "sampled_tokens": jnp.sum(sampled_BT),
        "mismatch_sum": jnp.sum(jnp.abs(difference_BT)),
        "mismatch_max": jnp.max(jnp.abs(difference_BT)),
        "k3_sum": jnp.sum(excess_BT - difference_BT),
        "clipped_sum": jnp.sum((excess_BT < -clip[0]) | (excess_BT > clip[1])),
        "entropy_sum": -jnp.sum(
            jnp.where(sampled_BT, log_prob_BT, 0)
        ),  # an unbiased estimate at the sampling temperature
    }


@partial(jax.jit, static_argnames=("cfg", "tx", "sequence_balance", "policy"), donate_argnames="state")
def train_step(
    state: State,
    batch: Batch,
    knobs: Knobs,
    *,
    cfg: config.Model,
    tx: optax.GradientTransformation,
    sequence_balance: float = 0.0,
    policy: losses.Policy | None = None,
) -> tuple[State, dict[str, Array]]:
    """The next state and this step's metrics. `batch` stacks C microbatches; those behind knobs.microbatches are empty."""
    totals = {
        **{name: jnp.sum(z) for name, z in batch.items() if name.endswith("weights")},
        "microbatches": knobs.microbatches.astype(jnp.float32),
        "sequence_balance": sequence_balance,
    }

    def microbatch(i: Array | int) -> Any:
        one = {name: jax.lax.dynamic_index_in_dim(z, i, keepdims=False) for name, z in batch.items()}

        def loss(places: Any) -> Any:
            params = cast.beside(state.params, places)
            return loss_fn(params, cfg, state.router_bias_LE, one, knobs.mtp_weight, totals, policy)

        grads, metrics = jax.grad(loss, has_aux=True)(cast.places(state.params, model.specs(cfg), cfg.dtype))
        return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params), metrics

    if batch["ids"].shape[0] == 1:
        grads, metrics = microbatch(0)
    else:  # from zeros, so that a microbatch's program is compiled once
        nothing = jax.tree.map(mesh.zeros, jax.eval_shape(microbatch, 0))
        grads, metrics = jax.lax.fori_loop(
            0, knobs.microbatches, lambda i, total: jax.tree.map_with_path(_merge, total, microbatch(i)), nothing
        )
    directions, opt = tx.update(grads, state.opt, state.params)  # pyright: ignore[reportArgumentType] (as in state.py)
    params = jax.tree.map(lambda p, d: p - knobs.lr.astype(p.dtype) * d, state.params, directions)
    router_bias_LE = balance(state.router_bias_LE, metrics["load_LE"], knobs.bias_rate)
    metrics = {**metrics, "gradient_norm": optax.tree.norm(grads), "tokens": totals["weights"]}
    return State(state.step + 1, params, router_bias_LE, opt), metrics


def stacked(microbatches: Sequence[dict[str, np.ndarray]], room: int, rows: int | None = None) -> Batch:
    """Microbatches as `train_step` takes them, padded with empty ones to `room` of them: one compiled shape. The tokens of
    each row are put in the order of `parallel.context`.

    With `rows`, each process gives its share of microbatches of so many rows (`mesh.process_share`); else all of them.
    """
    empty = {name: np.zeros_like(z) for name, z in microbatches[0].items()}
    padded = [*microbatches, *[empty] * (room - len(microbatches))]
    place = mesh.batch_sharding(jax.sharding.get_mesh())
    whole = {name: (room, rows or z.shape[0], *z.shape[1:]) for name, z in empty.items()}
    here = zigzag({name: np.stack([one[name] for one in padded]) for name in empty}, dim=2)
    return {name: jax.make_array_from_process_local_data(place, here[name], whole[name]) for name in empty}


def _merge(path: tuple, total: Array, one: Array) -> Array:
    """Gradients and metrics of microbatches add up; of what ends in _max the largest stays."""
    return jnp.maximum(total, one) if str(getattr(path[-1], "key", "")).endswith("_max") else total + one
