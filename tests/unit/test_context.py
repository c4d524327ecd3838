"""The order of tokens over a context axis: each once, and to every device as many pairs of a query and a key."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax import config, mesh, model
from glm_jax.parallel.context import order, zigzag


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_every_device_has_as_many_keys_to_look_at(parts):
    order_T = order(64, parts)
    assert sorted(order_T) == list(range(64))
    assert len(set((order_T.reshape(parts, -1) + 1).sum(axis=1))) == 1


def test_an_early_chunk_and_the_late_one_that_mirrors_it():
    assert order(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert order(8, 1).tolist() == list(range(8))


def test_what_stands_beside_a_token_moves_with_it():
    ids_BT = np.arange(16).reshape(2, 8)
    tokens = {"ids": ids_BT, "experts": np.stack([ids_BT, -ids_BT], axis=-1)}
    with jax.sharding.use_abstract_mesh(mesh.abstract(config.Mesh(fsdp=1, context=2))):
        moved = zigzag(tokens, dim=1)
    assert moved["ids"][1].tolist() == [8, 9, 14, 15, 10, 11, 12, 13]
    assert (moved["experts"] == np.stack([moved["ids"], -moved["ids"]], axis=-1)).all()
    assert zigzag(tokens, dim=1)["ids"] is ids_BT  # without a mesh


def test_keys_are_gathered_once_forward_and_once_backward():
    """And not a third time where attention rotates its queries again."""
    cfg = config.Model(V=64, D=16, L=2, dense_layers=1, N=4, K=2, H=8, F=16, M=16, E=4, A=2, mtp_layers=0)

    def loss(key):
        def of(params):
            ids_BT = jnp.zeros((2, 16), jnp.int32)
            return model.forward(cfg, params, model.router_bias(cfg), ids_BT)[0].sum()

        params = jax.tree.map(mesh.rest, model.init(cfg, key)[0], model.specs(cfg))
        return jax.grad(of)(params)

    with jax.sharding.use_abstract_mesh(mesh.abstract(config.Mesh(fsdp=1, context=2))):
        text = str(jax.make_jaxpr(loss)(jax.eval_shape(lambda: jax.random.key(0))))
    # of keys and of values, in a dense layer's loop and a routed one's: from two devices two rows of eight tokens
    assert len(re.findall(r":bf16\[2,2,8,2,8\]\S* = all_gather\[", text)) == 2 * 2 * 2
