"""The Hopper kernels, executed in the simulator, which looks for races and fills memory with NaN first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention, grouped_matmul
from pallas_kernels.attention import blocks
from pallas_kernels.attention.cases import CASES, Case
from pallas_kernels.grouped_matmul import gpu
from pallas_kernels.grouped_matmul.cases import GMM, Gmm
from tests.kernels import test_attention as attending
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


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "hopper" in case.tags])
def test_attention_equals_a_loop_over_queries(name):
    inputs = attending.problem(CASES[name], "bfloat16")
    with hopper():
        y = attending.forward(*inputs, "gpu")
    np.testing.assert_allclose(y.astype("float32"), attending.query_by_query(*inputs), atol=1e-2)


@pytest.mark.slow
def test_gradients_of_attention_equal_the_definition():
    inputs = attending.problem(CASES["hopper_packed_padded"], "bfloat16")
    with hopper(late=False):
        results = attending.value_and_gradients.__wrapped__(*inputs, "gpu")
    want = attending.value_and_gradients(*(z.astype("float32") for z in inputs[:3]), *inputs[3:], "reference")
    for got, expected in zip(results, want, strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype("float32"), expected, atol=attending.TOLERANCE["bfloat16"])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("of_keys", [False, True])
def test_blocks_that_are_left_out_or_unmasked_are_right_to_be(seed, of_keys):
    rng = np.random.default_rng(seed)
    q_at, k_at = (np.sort(rng.integers(0, 5, (2, rows, 256), dtype=np.int32)) for rows in (3, 2))
    q_at[:, 0], k_at[:, 0] = (np.sort(rng.integers(0, 9, (2, 256))) for _ in range(2))
    q_at[:, 2] = np.maximum(1, np.minimum(q_at[:, 2], q_at[:, 1]))
    see = attention.reference.visible_BTS(q_at[:, 0], k_at[:, 0], q_at[:, 1], k_at[:, 1], q_at[:, 2])
    q_at[:, 0] = np.where(q_at[:, 1] == 0, -blocks.NEVER, q_at[:, 0])
    lists, counts = blocks.block_lists(jnp.asarray(q_at), jnp.asarray(k_at), 32, 16, of_keys)
    see = np.asarray(see).reshape(2, 8, 32, 16, 16).swapaxes(2, 3)
    see = see.swapaxes(1, 2) if of_keys else see
    for b, i in np.ndindex(*lists.shape[:2]):
        unmasked, visited = counts[b, i]
        assert see[b, i, lists[b, i, :unmasked]].all()
        assert not see[b, i, lists[b, i, visited:]].any()
        np.testing.assert_array_equal(np.sort(lists[b, i]), np.arange(lists.shape[2]))


@pytest.mark.parametrize("seed", range(6))
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
    with pytest.raises(NotImplementedError, match="columns=256 does not divide 128"):
        gpu.gmm(x.astype("bfloat16"), w.astype("bfloat16"), sizes, gpu.Config())
    q, k, v, *at = attending.problem(Case(1, 64, 64, 2, 1, 96), "bfloat16")
    with pytest.raises(NotImplementedError, match="must be bfloat16, with heads 64 or 128 wide"):
        attending.forward(q, k, v, *at, "gpu")
    with pytest.raises(ValueError, match="columns of 64 up to 256"):
        gpu.Config(columns=320)


def test_multiprocessors_are_those_of_the_mesh_in_context():
    with hopper(multiprocessors=3):
        assert gpu.hopper.multiprocessors() == 3
    assert gpu.hopper.multiprocessors() == 132
    assert jax.default_backend() == "cpu"
