"""Which weights' matrices share a list of homes."""

from glm_jax.parallel.homes import Kind, share


def test_small_matrices_move_into_idle_homes():
    wide, narrow = 5120 * 12_288, 5120 * 1024
    kinds = [Kind("D", 512, 93, narrow), Kind("D", 512, 93, wide), Kind("D", 512, 93, wide), Kind("E", 64, 90, narrow)]
    assert share(kinds) == [[1, 2, 0], [3]]  # 326 idle homes take 93; another group's matrices lie over other devices


def test_a_stack_that_needs_homes_of_its_own_gets_them():
    assert share([Kind("D", 8, 6, 64), Kind("D", 8, 3, 32), Kind("D", 8, 2, 16)]) == [[0, 2], [1]]
    assert share([Kind("D", 8, 6, 64), Kind("D", 8, 6, 64)]) == [[0, 1]]  # of one size: together always


def test_full_homes_have_no_room():
    assert share([Kind("D", 8, 16, 64), Kind("D", 8, 1, 32)]) == [[0], [1]]
