"""Routing: which experts each token takes and with which weights, how many tokens each expert got, and where routed rows go.

Scores, weights and counts are float32. The arrays' leading dimensions are tokens, of any number and layout: the sums over
one-hots below need no index to cross devices.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from pallas_kernels.choose import choose
from pallas_kernels.routing import reference, thirds, xla

IMPLEMENTATIONS = {"reference": reference, "xla": xla}
LOGITS = {"xla": xla, "tpu": thirds, "gpu": thirds}
TINY = 1e-20  # a token whose chosen scores are all zero gets weights of zero


def scores(
    x_BTD: Float[Array, "*T D"], router_DE: Float[Array, "D E"], *, implementation: str | None = None
) -> Float[Array, "*T E"]:
    """sigmoid(x router), computed in float32 whatever the inputs (GLM-4.5 report, section 2.1)."""
    router_DE = router_DE.astype(jnp.float32)
    return jax.nn.sigmoid(choose("scores", LOGITS, implementation, x_BTD, router_DE).logits(x_BTD, router_DE))


def choose_experts(
    scores_BTE: Float[Array, "*T E"],
    bias_E: Float[Array, " E"],
    active: int,
    scale: float = 1.0,
    given_BTA: Int[Array, "*T A"] | None = None,
) -> tuple[Int[Array, "*T A"], Float[Array, "*T E"], Float[Array, "*T A"]]:
    """The `active` experts of largest score + bias; weights are their scores, made to sum to `scale`, without the bias.

    Experts in given_BTA are taken instead, where they are not negative. Returns the experts (int32, best first), a one
    where an expert was chosen, and the weights. Gradients reach the chosen scores through the weights, and nothing else.
    Raises ValueError if there are fewer experts than `active`.
    """
    experts = scores_BTE.shape[-1]
    if not 0 < active <= experts:
        raise ValueError(f"choose_experts: {active} of {experts} experts cannot be active; name 1 to {experts}")
    experts_BTA = best(scores_BTE + bias_E, active)
    if given_BTA is not None:
        experts_BTA = jnp.where(given_BTA >= 0, given_BTA.astype(experts_BTA.dtype), experts_BTA)
    onehot_BTAE = jax.nn.one_hot(experts_BTA, experts)
    picked_BTA = jnp.sum(onehot_BTAE * scores_BTE[..., None, :], axis=-1)
    weights_BTA = scale * picked_BTA / (jnp.sum(picked_BTA, axis=-1, keepdims=True) + TINY)
    return experts_BTA, jnp.sum(onehot_BTAE, axis=-2), weights_BTA


def best(scores_BTE: Float[Array, "*T E"], active: int) -> Int[Array, "*T A"]:
    """The experts of the `active` largest scores, best first and of equals the first (int32): `jax.lax.top_k`, by taking out the
    largest so many times. That is less than the sort that top_k is on a TPU, and on a CPU tokens stay where they are."""
    expert_E = jnp.arange(scores_BTE.shape[-1])

    def take(left_BTE: Array, _) -> tuple[Array, Array]:
        expert_BT = jnp.argmax(left_BTE, axis=-1).astype(jnp.int32)
        return jnp.where(expert_E == expert_BT[..., None], -jnp.inf, left_BTE), expert_BT

    _, experts_ABT = jax.lax.scan(take, jax.lax.stop_gradient(scores_BTE), length=active)
    return jnp.moveaxis(experts_ABT, 0, -1)


def chosen(experts_BTA: Int[Array, "*T A"], experts: int) -> Float[Array, "*T E"]:
    """1 where a token names an expert, else 0."""
    return jnp.sum(jax.nn.one_hot(experts_BTA.astype(jnp.int32), experts), axis=-2)


def counts(chosen_BTE: Float[Array, "*T E"], real_BT: Bool[Array, "*T"]) -> Float[Array, " E"]:
    """Tokens that each expert got; those where `real_BT` is false count nowhere."""
    return jnp.sum(chosen_BTE * real_BT[..., None], axis=tuple(range(chosen_BTE.ndim - 1)))


def position_map(
    experts_R: Int[Array, " R"], groups: int, *, implementation: str | None = None
) -> tuple[Int[Array, " R"], Int[Array, " E"]]:
    """Where each row goes when rows are put expert by expert in their own order, and how many rows each expert gets (int32).

    A permutation: bit-equal to the inverse of a stable argsort. Rows of an expert outside 0..groups-1 come last and are
    counted nowhere. Raises ValueError for anything but a vector of integers, and an unknown implementation.
    """
    if experts_R.ndim != 1 or not jnp.issubdtype(experts_R.dtype, jnp.integer):
        raise ValueError(
            f"position_map: experts {experts_R.shape} {experts_R.dtype} must be a vector of integers; flatten them first"
        )
    experts_R = experts_R.astype(jnp.int32)
    module = choose("position_map", IMPLEMENTATIONS, implementation, experts_R)
    here_R = (experts_R >= 0) & (experts_R < groups)
    return module.position_map(jnp.where(here_R, experts_R, groups), groups)


def row_order(position_R: Int[Array, " R"]) -> Int[Array, " R"]:
    """The inverse of a position map: which row stands at each place."""
    rows_R = jnp.arange(position_R.shape[0], dtype=jnp.int32)
    return jnp.zeros_like(position_R).at[position_R].set(rows_R, unique_indices=True, mode="promise_in_bounds")
