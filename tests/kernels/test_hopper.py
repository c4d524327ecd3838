"""The Hopper kernels, executed in the simulator, which looks for races and fills memory with NaN first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul
from pallas_kernels.grouped_matmul import gpu
from pallas_kernels.grouped_matmul.cases import GMM, Gmm
from tests.kernels import test_grouped_matmul as grouped
from tests.kernels.hopper_simulator import hopper


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in GMM.items() if "hopper" in case.tags])
def test_gmm_and_its_gradients_equal_a_loop_over_groups(name):
    inputs = grouped.problem(GMM[name], "bfloat16")
    with hopper():
        results = grouped.gmm_and_gradients.__wrapped__(*inputs, "gpu")  # two simulated kernels under one jit hang
    for got, want in zip(results, grouped.by_group(*inputs), strict=True):
        grouped.assert_close(got, want, "bfloat16")


@pytest.mark.slow
def test_weights_gradient_is_a_float32_sum():
    x, _, sizes, dy = inputs = grouped.problem(GMM["hopper_narrow"], "bfloat16")
    with hopper():
        sums = grouped_matmul.tgmm(x, dy, sizes, implementation="gpu")
    grouped.assert_close(sums, grouped.by_group(*inputs)[2], "float32")


@pytest.mark.parametrize("seed", range(20))
def test_tiles_cover_each_row_once_or_with_its_own_group(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 40, 7) * rng.integers(0, 2, 7)
    rows, tile = int(sizes.sum() + rng.integers(0, 50) + 1), 16
    table = gpu.tile_table(jnp.asarray(sizes), rows, tile)
    group_T, first_T, rows_T, (tiles,) = (np.asarray(z) for z in table)
    owner = np.repeat(np.arange(8), [*sizes, rows - sizes.sum()])
    covered = np.zeros(rows, bool)
    assert tiles <= len(group_T)
    for group, first, count in zip(group_T[:tiles], first_T[:tiles], rows_T[:tiles], strict=True):
        assert 0 < count <= tile
        np.testing.assert_array_equal(owner[first : first + count], group)
        covered[first : first + count] = True
    assert covered.all()


def test_what_the_hopper_kernels_do_not_take_is_said_with_shapes():
    x, w, sizes, _ = grouped.problem(GMM["ragged"], "bfloat16")
    with pytest.raises(NotImplementedError, match=r"x \(300, 24\) bfloat16.*multiples of 128"):
        grouped_matmul.gmm(x, w, sizes, implementation="gpu")
    x, w, sizes, _ = grouped.problem(Gmm(8, 128, 128, (8,)))
    with pytest.raises(NotImplementedError, match="float32 must be bfloat16"):
        grouped_matmul.gmm(x, w, sizes, implementation="gpu")
    with pytest.raises(ValueError, match="columns of 64 up to 256"):
        gpu.Config(columns=320)


def test_multiprocessors_are_those_of_the_mesh_in_context():
    with hopper(multiprocessors=3):
        assert gpu.hopper.multiprocessors() == 3
    assert gpu.hopper.multiprocessors() == 132
    assert jax.default_backend() == "cpu"
