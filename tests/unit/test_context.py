"""The order of tokens over a context axis: each once, and to every device as many pairs of a query and a key."""

import jax
import numpy as np
import pytest

from glm_jax import config, mesh
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
