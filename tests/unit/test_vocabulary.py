"""The embedding's look-up on one device: rows, and a gradient that does not drown in its own sum."""

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.parallel.vocabulary import embed


def test_rows_and_their_gradient():
    random = np.random.default_rng(0)
    table_VD, ids_BT = random.normal(size=(11, 4)).astype("float32"), random.integers(0, 11, (3, 5))
    x_BTD, vjp = jax.vjp(lambda table_VD: embed(table_VD, ids_BT), jnp.asarray(table_VD))
    np.testing.assert_array_equal(x_BTD, table_VD[ids_BT])
    dx_BTD = random.normal(size=x_BTD.shape).astype("float32")
    want_VD = np.zeros_like(table_VD)
    np.add.at(want_VD, ids_BT, dx_BTD)
    np.testing.assert_allclose(vjp(dx_BTD)[0], want_VD, atol=1e-6)  # float32 sums in another order


def test_a_frequent_token_in_bfloat16():
    ids_BT = jnp.full((2, 1024), 3)
    gradient_VD = jax.grad(lambda table_VD: jnp.sum(embed(table_VD, ids_BT)))(jnp.ones((5, 2), jnp.bfloat16))
    want_VD = np.zeros((5, 2))
    want_VD[3] = 2048  # not 256, where adding 1 stops
    np.testing.assert_array_equal(gradient_VD, want_VD)
