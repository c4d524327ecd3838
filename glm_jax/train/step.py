"""One optimizer step: gradients accumulated over microbatches, Muon's update, the balance bias moved by counts."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from glm_jax import config, losses, model
from glm_jax.optim.balance import balance
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
    params: model.GLM, cfg: config.Model, router_bias_LE: Array, batch: Batch, mtp_weight: Array | float, totals: dict
) -> tuple[Array, dict[str, Array]]:
    """Next-token loss + MTP loss + sequence balance loss of one microbatch, each over its global count in `totals`.

    totals: `weights` and `mtp_weights` summed over the whole batch, `microbatches`, and the balance loss's weight.
    """
    aux = model.hidden(
        cfg, params, router_bias_LE, batch["ids"],
        positions_BT=batch["positions"], segments_BT=batch["segments"], next_ids_BT=batch["targets"],
    )  # fmt: skip

    head_DV = model.output_matrix(cfg, params)

    def component(hidden_BTD: Array, name: str) -> Array:
        targets_BT, weights_BT = batch[f"{name}targets"], batch[f"{name}weights"]
        total, _ = losses.next_token(hidden_BTD, head_DV, targets_BT, weights_BT, cfg.implementation)
        return total / jnp.maximum(totals[f"{name}weights"], 1)

    main = component(aux.hidden_BTD, "")
    mtp = component(aux.mtp_hidden_BTD, "mtp_") if aux.mtp_hidden_BTD is not None else jnp.zeros(())
    sequence_balance = jnp.sum(aux.balance_L) / totals["microbatches"]
    loss = main + mtp_weight * mtp + totals["sequence_balance"] * sequence_balance
    return loss, {"loss": main, "mtp_loss": mtp, "balance_loss": sequence_balance, "load_LE": aux.load_LE}


@partial(jax.jit, static_argnames=("cfg", "tx", "sequence_balance"), donate_argnames="state")
def train_step(
    state: State,
    batch: Batch,
    knobs: Knobs,
    *,
    cfg: config.Model,
    tx: optax.GradientTransformation,
    sequence_balance: float,
) -> tuple[State, dict[str, Array]]:
    """The next state and this step's metrics. `batch` stacks C microbatches; those behind knobs.microbatches are empty."""
    totals = {
        "weights": jnp.sum(batch["weights"]),
        "mtp_weights": jnp.sum(batch["mtp_weights"]),
        "microbatches": knobs.microbatches.astype(jnp.float32),
        "sequence_balance": sequence_balance,
    }
    gradient = jax.grad(loss_fn, has_aux=True)

    def microbatch(i: Array | int) -> Any:
        one = {name: jax.lax.dynamic_index_in_dim(z, i, keepdims=False) for name, z in batch.items()}
        return gradient(state.params, cfg, state.router_bias_LE, one, knobs.mtp_weight, totals)

    if batch["ids"].shape[0] == 1:
        grads, metrics = microbatch(0)
    else:
        grads, metrics = jax.lax.fori_loop(
            1, knobs.microbatches, lambda i, total: jax.tree.map(jnp.add, total, microbatch(i)), microbatch(0)
        )
    directions, opt = tx.update(grads, state.opt, state.params)  # pyright: ignore[reportArgumentType] (as in state.py)
    params = jax.tree.map(lambda p, d: p - knobs.lr.astype(p.dtype) * d, state.params, directions)
    router_bias_LE = balance(state.router_bias_LE, metrics["load_LE"], knobs.bias_rate)
    metrics = {**metrics, "gradient_norm": optax.tree.norm(grads), "tokens": totals["weights"]}
    return State(state.step + 1, params, router_bias_LE, opt), metrics
