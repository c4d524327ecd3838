"""Drawing a token: temperature, exact nucleus, and randomness that belongs to a row and a position, not to a batch."""

import jax
import jax.numpy as jnp
from jax import Array


def draw(keys_B: Array, logits_BV: Array, temperature: Array, top_p: Array) -> tuple[Array, Array]:
    """(ids_B, log-probabilities_B). Temperature 0 takes the likeliest token.

    The log-probability is the token's under softmax(logits / temperature), before the nucleus is cut; at temperature 0
    under softmax(logits). It is what a loss that divides its logits by the temperature computes for the same token.
    """
    scale = jnp.where(temperature > 0, temperature, 1.0)
    logp_BV = jax.nn.log_softmax(logits_BV.astype(jnp.float32) / scale)

    def sample(logp_BV: Array) -> Array:
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logp_BV.shape[1:]))(keys_B)
        keep_BV = jax.lax.cond(
            top_p < 1, lambda z_BV: nucleus(jnp.exp(z_BV), top_p), lambda z_BV: jnp.ones_like(z_BV, bool), logp_BV
        )
        return first_of_largest(jnp.where(keep_BV, logp_BV + noise_BV, -jnp.inf))

    ids_B = jax.lax.cond(temperature > 0, sample, first_of_largest, logp_BV)
    return ids_B, jnp.take_along_axis(logp_BV, ids_B[:, None], axis=1)[:, 0]


def first_of_largest(z_BV: Array) -> Array:
    """jnp.argmax over the last dimension, int32, as two reductions that a CPU vectorises. NaN gives the last index."""
    number_V = jnp.arange(z_BV.shape[-1], dtype=jnp.int32)
    largest_BV = z_BV == jnp.max(z_BV, axis=-1, keepdims=True)
    return jnp.min(jnp.where(largest_BV, number_V, z_BV.shape[-1] - 1), axis=-1)


def nucleus(p_BV: Array, top_p: Array) -> Array:
    """Boolean [B, V]: the likeliest tokens up to and with the one that brings their sum to `top_p` < 1.

    The last token's probability is found by bisection over the bits of positive floats, whose order is the numbers'
    own: 30 masked sums, exact, where sorting a vocabulary costs a CPU as much as the model. Tokens exactly as likely
    as the last stay in with it.
    """
    bits_BV = jax.lax.bitcast_convert_type(p_BV, jnp.int32)

    def halve(_, bounds):
        low_B1, high_B1 = bounds  # the last token's bits lie in [low, high]
        middle_B1 = low_B1 + (high_B1 - low_B1 + 1) // 2
        enough_B1 = jnp.sum(jnp.where(bits_BV >= middle_B1, p_BV, 0), axis=1, keepdims=True) >= top_p
        return jnp.where(enough_B1, middle_B1, low_B1), jnp.where(enough_B1, high_B1, middle_B1 - 1)

    top_B1 = jnp.max(bits_BV, axis=1, keepdims=True)
    return bits_BV >= jax.lax.fori_loop(0, 30, halve, (jnp.zeros_like(top_B1), top_B1))[0]


def keys(seed: Array, rows_B: Array, positions_B: Array) -> Array:
    """One key per row from (seed, row, position): what a row draws does not depend on its neighbours."""
    key = jax.random.key(seed)
    return jax.vmap(lambda row, at: jax.random.fold_in(jax.random.fold_in(key, row), at))(rows_B, positions_B)
