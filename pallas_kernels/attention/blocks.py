"""Which blocks of keys a block of queries visits, decided on the device from smallest and largest positions and segments."""

import jax.numpy as jnp
from jax import Array

NEVER = jnp.iinfo(jnp.int32).max


def block_lists(q_at_BPT: Array, k_at_BPS: Array, q_block: int, k_block: int, of_keys: bool) -> tuple[Array, Array]:
    """Of each block of queries the blocks of keys that it visits, or of each of keys those of queries: [B, I, P] indices,
    and [B, I, 2] how many of them need no mask, which come first, and how many there are in all."""
    q_position, q_segment, q_prefix = (q_at_BPT[:, p].reshape(len(q_at_BPT), -1, 1, q_block) for p in range(3))
    k_position, k_segment = (k_at_BPS[:, p].reshape(len(k_at_BPS), 1, -1, k_block) for p in range(2))

    def lowest(z, segment):
        return jnp.where(segment == 0, NEVER, z).min(-1)

    def highest(z, segment):
        return jnp.where(segment == 0, -NEVER, z).max(-1)

    some_BIJ = lowest(k_position, k_segment) <= highest(q_position, q_segment)
    some_BIJ &= lowest(k_segment, k_segment) <= highest(q_segment, q_segment)
    some_BIJ &= lowest(jnp.minimum(q_segment, q_prefix), q_segment) <= highest(k_segment, k_segment)
    one = (k_segment.min(-1) == q_segment.max(-1)) & (k_segment.max(-1) == q_segment.min(-1))
    all_BIJ = some_BIJ & one & (k_position.max(-1) <= q_position.min(-1))
    if of_keys:
        some_BIJ, all_BIJ = some_BIJ.swapaxes(1, 2), all_BIJ.swapaxes(1, 2)
    P = some_BIJ.shape[2]
    order_BIP = jnp.sort(jnp.arange(P, dtype=jnp.int32) + P * jnp.where(all_BIJ, 0, jnp.where(some_BIJ, 1, 2)), -1)
    return order_BIP % P, jnp.stack([all_BIJ.sum(-1, dtype=jnp.int32), some_BIJ.sum(-1, dtype=jnp.int32)], -1)
