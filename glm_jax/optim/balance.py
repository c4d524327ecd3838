"""Loss-free balancing: the router's selection bias follows the counts, not a gradient (spec section 2)."""

import jax.numpy as jnp
from jax import Array


def balance(router_bias_LE: Array, load_LE: Array, rate: Array | float) -> Array:
    """One step towards an even load: b + rate * sign(mean load - load), per layer, float32.

    `load_LE` counts the tokens that chose each expert in the whole optimizer step, all microbatches and devices
    together. A layer that saw no token keeps its bias; `rate` 0 freezes all.
    """
    load_LE = load_LE.astype(jnp.float32)
    return router_bias_LE + rate * jnp.sign(load_LE.mean(axis=-1, keepdims=True) - load_LE)
