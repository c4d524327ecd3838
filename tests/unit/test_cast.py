"""Gradients taken by places beside the weights are those taken by the weights, in the type that they were computed in."""

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax import cast, model
from glm_jax.config import Model

CFG = Model(
    V=24, D=8, L=2, dense_layers=1, N=2, K=1, H=4, F=12, M=4, E=4, A=2, max_positions=16, dtype="bfloat16", remat="layer"
)  # fmt: skip
SPECS = model.specs(CFG)


def loss(params, router_bias_LE):
    ids_BT = jnp.arange(8).reshape(1, 8)
    aux = model.hidden(CFG, params, router_bias_LE, ids_BT, next_ids_BT=ids_BT)
    hidden_BTD = aux.hidden_BTD + aux.mtp_hidden_BTD
    return jnp.sum(jnp.square(hidden_BTD.astype(jnp.float32) @ model.output_matrix(CFG, params).astype(jnp.float32)))


def test_gradients_by_places_are_those_by_weights_and_half_as_large():
    params, router_bias_LE = model.init(CFG, jax.random.key(0))
    want = jax.jit(jax.grad(loss))(params, router_bias_LE)
    by_places = jax.jit(jax.grad(lambda places: loss(cast.beside(params, places), router_bias_LE)))
    got = by_places(cast.places(params, SPECS, CFG.dtype))
    for spec, g, w in zip(*map(jax.tree.leaves, (SPECS, got, want)), strict=True):
        assert g.dtype == ("float32" if spec.kind in ("norm", "router") else "bfloat16"), spec
        np.testing.assert_array_equal(g.astype(jnp.float32), w, err_msg=spec.hf)
        assert np.abs(w).max() > 0, spec.hf


def test_a_model_in_float32_is_differentiated_by_its_weights():
    params, _ = model.init(CFG, jax.random.key(0))
    found = cast.places(params, SPECS, "float32")
    assert all(a is b for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True))
    assert jax.tree.structure(cast.beside(params, found)) == jax.tree.structure(params)
