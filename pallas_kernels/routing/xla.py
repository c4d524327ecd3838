"""The router's product in float32, and the position map by counting, without a sort: comparisons and sums that every back end
fuses, in whole numbers.

A row's place is where its expert begins, plus the expert's rows in earlier blocks, plus those before it in its own block.
"""

import jax
import jax.numpy as jnp
from jax import Array

BLOCK = 128


def logits(x_BTD: Array, router_DE: Array) -> Array:
    # else matrix units round the factors, and other experts win
    return jnp.einsum("...d,de->...e", x_BTD.astype(jnp.float32), router_DE, precision=jax.lax.Precision.HIGHEST)


def position_map(expert_R: Array, groups: int) -> tuple[Array, Array]:
    rows = expert_R.shape[0]
    expert_cb = jnp.pad(expert_R, (0, -rows % BLOCK), constant_values=groups).reshape(-1, BLOCK)  # c blocks of b rows
    mine_cbE = expert_cb[:, :, None] == jnp.arange(groups + 1)
    count_cE = mine_cbE.sum(1, dtype=jnp.int32)
    until_cE = jnp.cumsum(count_cE, axis=0)
    total_E = count_cE.sum(0)
    first_cE = jnp.cumsum(total_E) - total_E + until_cE - count_cE
    same_cbb = expert_cb[:, :, None] == expert_cb[:, None, :]
    before_cb = (same_cbb & jnp.tri(BLOCK, k=-1, dtype=bool)).sum(2, dtype=jnp.int32)
    place_cb = jnp.where(mine_cbE, first_cE[:, None], 0).sum(2) + before_cb
    return place_cb.reshape(-1)[:rows], total_E[:groups]
