"""Which weights' matrices share a list of homes."""

import jax.numpy as jnp
import numpy as np

from glm_jax.parallel import homes
from glm_jax.parallel.homes import Kind, Stack, each_matrix, share
from glm_jax.spec import Spec


def test_small_matrices_move_into_idle_homes():
    wide, narrow = 5120 * 12_288, 5120 * 1024
    kinds = [Kind("D", 512, 93, narrow), Kind("D", 512, 93, wide), Kind("D", 512, 93, wide), Kind("E", 64, 90, narrow)]
    assert share(kinds) == [[1, 2, 0], [3]]  # 326 idle homes take 93; another group's matrices lie over other devices


def test_a_stack_that_needs_homes_of_its_own_gets_them():
    assert share([Kind("D", 8, 6, 64), Kind("D", 8, 3, 32), Kind("D", 8, 2, 16)]) == [[0, 2], [1]]
    assert share([Kind("D", 8, 6, 64), Kind("D", 8, 6, 64)]) == [[0, 1]]  # of one size: together always


def test_full_homes_have_no_room():
    assert share([Kind("D", 8, 16, 64), Kind("D", 8, 1, 32)]) == [[0], [1]]


def test_large_stacks_that_lie_whole_are_worked_on_a_layer_at_a_time(monkeypatch):
    seen = []

    def negated(x_BPQ):
        seen.append(x_BPQ.shape)
        return -x_BPQ

    x = jnp.arange(3 * 2 * 4 * 5, dtype=jnp.float32).reshape(3, 2, 4, 5)
    stack = Stack(Spec("LE", "D", "M", "matrix"), (0, 1), (2,), (3,))
    for room in (x.nbytes, x.nbytes - 1):
        monkeypatch.setattr(homes, "CHUNK_BYTES", room)
        (got,) = each_matrix(negated, [stack], [x])
        np.testing.assert_array_equal(got, -x)
    assert seen == [(3, 2, 4, 5), (2, 4, 5)]
