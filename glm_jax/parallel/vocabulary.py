"""The embedding's look-up where the vocabulary is split: the devices along the expert and tensor axes look their tokens up
together, each in its own share of the table, and the rows go to where their tokens are. Neither the table nor its gradient is
ever whole on a device.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from glm_jax import mesh
from glm_jax.parallel import collectives


def embed(table_VD: Array, ids_BT: Array) -> Array:
    """Rows of the table, x_BTD. Their gradient adds up in float32, however often a token occurs, and is rounded once."""

    def local(table_VD: Array, ids_BT: Array) -> Array:
        share = len(table_VD)
        first = share * jax.lax.axis_index(collectives.sharing()) if collectives.sharing() else 0
        here_X = collectives.gathered(ids_BT.reshape(-1)) - first
        here_X = jnp.where((here_X >= 0) & (here_X < share), here_X, share)  # others' rows are zero
        x_XD = collectives.summed(collectives.scattered(_rows(share, collectives.vary(table_VD), here_X)))
        return x_XD.reshape(*ids_BT.shape, -1)

    return mesh.per_shard(local, ("VD", "BT"), "BTD")(table_VD, ids_BT)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(size: int, table_VD: Array, ids_X: Array) -> Array:
    """Rows of a table of `size` rows; zeros for an id that is `size`."""
    return table_VD.at[ids_X].get(mode="fill", fill_value=0)


def _forward(size: int, table_VD: Array, ids_X: Array):
    return _rows(size, table_VD, ids_X), ids_X


def _backward(size: int, ids_X: Array, dx_XD: Array):
    axes = tuple(jax.typeof(dx_XD).manual_axis_type.varying)
    zeros_VD = jax.lax.pcast(jnp.zeros((size, dx_XD.shape[1]), jnp.float32), axes, to="varying")
    return zeros_VD.at[ids_X].add(dx_XD.astype(jnp.float32), mode="drop").astype(dx_XD.dtype), None


_rows.defvjp(_forward, _backward)
