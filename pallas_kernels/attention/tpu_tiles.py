"""Which tiles of queries and keys the TPU kernels visit, in which order: found on the device from each block's extremes.

I and J count blocks of queries and of keys.
"""

import jax.numpy as jnp
from jax import Array

FULL = 1  # every query of the tile sees every key
PREFIXED = 2  # some query of the block has a prefix that is not its own segment
FIRST = 4  # the first tile of its output block
LAST = 8  # the last one
FRESH = 16  # the first one of its block of queries

HIGHEST = jnp.iinfo(jnp.int32).max


def visible_tiles(
    q_at_B3T: Array, k_at_B2S: Array, queries: int, keys: int, *, keys_first: bool
) -> tuple[tuple[Array, Array, Array, Array], Array]:
    """Row, query block, key block and flags of each tile, int32 [as many as there could be]; and how many there are.

    Query blocks come one after another with all their key blocks, or with `keys_first` the other way round. Each output
    has at least one tile, though nothing may be visible in it: somebody must write its zeros.
    """
    q_at = [_in_blocks(z_BT, queries) for z_BT in q_at_B3T.swapaxes(0, 1)]
    k_at = [_in_blocks(z_BS, keys) for z_BS in k_at_B2S.swapaxes(0, 1)]
    seen_BIJ = _seen(q_at, k_at)
    full_BIJ = seen_BIJ & _full(q_at, k_at)
    first_queries_I, first_keys_J = (jnp.arange(n) == 0 for n in seen_BIJ.shape[1:])
    seen_BIJ |= ~seen_BIJ.any(2, keepdims=True) & first_keys_J
    if keys_first:
        seen_BIJ |= ~seen_BIJ.any(1, keepdims=True) & first_queries_I[:, None]
    prefixed_BI1 = (q_at[2] != q_at[1]).any(2, keepdims=True)
    fresh_BIJ = jnp.cumsum(seen_BIJ, 2) == 1
    flags_BIJ = FULL * full_BIJ + PREFIXED * prefixed_BI1 + FRESH * fresh_BIJ
    if keys_first:
        outer, inner, step, flags = _listed(seen_BIJ.swapaxes(1, 2), flags_BIJ.swapaxes(1, 2))
        return (step, inner, outer, flags), seen_BIJ.sum(dtype=jnp.int32)
    outer, inner, step, flags = _listed(seen_BIJ, flags_BIJ)
    return (step, outer, inner, flags), seen_BIJ.sum(dtype=jnp.int32)


def _in_blocks(z_BT: Array, size: int) -> Array:
    return z_BT.reshape(z_BT.shape[0], -1, size)


def _lowest(z: Array, real: Array) -> Array:
    return jnp.where(real, z, HIGHEST).min(-1)


def _highest(z: Array, real: Array) -> Array:
    return jnp.where(real, z, -HIGHEST).max(-1)


def _seen(q_at: list[Array], k_at: list[Array]) -> Array:
    """Boolean [B, I, J]: false only where no query of the one block sees a key of the other."""
    (q_position, q_segment, q_prefix), (k_position, k_segment) = q_at, k_at
    q_real, k_real = q_segment != 0, k_segment != 0
    first_seen = jnp.minimum(q_segment, q_prefix)
    in_time_BIJ = _highest(q_position, q_real)[:, :, None] >= _lowest(k_position, k_real)[:, None]
    not_after_BIJ = _highest(q_segment, q_real)[:, :, None] >= _lowest(k_segment, k_real)[:, None]
    not_before_BIJ = _lowest(first_seen, q_real)[:, :, None] <= _highest(k_segment, k_real)[:, None]
    return in_time_BIJ & not_after_BIJ & not_before_BIJ


def _full(q_at: list[Array], k_at: list[Array]) -> Array:
    """Boolean [B, I, J]: every query sees every key, all keys being of one segment; padding is in no such block."""
    (q_position, q_segment, q_prefix), (k_position, k_segment) = q_at, k_at
    in_time_BIJ = q_position.min(-1)[:, :, None] >= k_position.max(-1)[:, None]
    one_BJ = (k_segment.min(-1) == k_segment.max(-1)) & (k_segment[..., 0] != 0)
    of_it_BIJ = False
    for z in (q_segment, q_prefix):
        same_BI = (z.min(-1) == z.max(-1)) & (q_segment != 0).all(-1)
        of_it_BIJ |= same_BI[:, :, None] & (z[..., 0][:, :, None] == k_segment[..., 0][:, None])
    return in_time_BIJ & of_it_BIJ & one_BJ[:, None]


def _listed(seen_BOI: Array, flags_BOI: Array) -> tuple[Array, Array, Array, Array]:
    """Outer block, inner block, row and flags of the tiles that are seen, in order; behind them the first one again."""
    _, outer, inner = seen_BOI.shape
    seen, step = seen_BOI.reshape(-1), jnp.arange(seen_BOI.size, dtype=jnp.int32)
    tile = jnp.nonzero(seen, size=seen.size, fill_value=0)[0].astype(jnp.int32)
    output, last = tile // inner, step == seen.sum() - 1
    begins = (step == 0) | (output != jnp.roll(output, 1))
    ends = last | (output != jnp.roll(output, -1))
    flags = flags_BOI.reshape(-1)[tile] + FIRST * begins + LAST * ends
    return output % outer, tile % inner, output // outer, flags.astype(jnp.int32)
