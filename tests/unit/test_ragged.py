"""Rows that devices send each other: the exchange against its definition, and that none is lost, on devices that `vmap` makes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.parallel import expert, gather, ragged
from glm_jax.parallel.exchange import ragged_all_to_all

DEVICES = 4


def cut(random, length, parts):
    """(offsets, sizes) of so many slices of `length` rows: some empty, in any order, with gaps."""
    ends = np.sort(random.integers(0, length + 1, 2 * parts)).reshape(parts, 2)
    order = random.permutation(parts)
    return ends[order, 0], ends[order, 1] - ends[order, 0]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("slices", [1, 3])  # of each device for each
def test_an_exchange_is_what_jax_defines(seed, slices):
    random = np.random.default_rng(seed)
    parts = DEVICES * slices
    operand, output = random.normal(size=(DEVICES, 23, 2)), random.normal(size=(DEVICES, 31, 2))
    starts, sizes, places = (np.zeros((DEVICES, DEVICES, slices), int) for _ in range(3))
    for there in range(DEVICES):  # what it receives stands apart; what is sent may overlap
        offsets, lengths = cut(random, output.shape[1], parts)
        places[:, there], sizes[:, there] = offsets.reshape(DEVICES, -1), lengths.reshape(DEVICES, -1)
    sizes = np.minimum(sizes, operand.shape[1])
    starts = random.integers(0, operand.shape[1] - sizes + 1)

    want = output.copy()
    for here, there, i in np.ndindex(*sizes.shape):
        size, start, place = (z[here, there, i] for z in (sizes, starts, places))
        want[there, place : place + size] = operand[here, start : start + size]

    received = sizes.transpose(1, 0, 2)
    moves = (jnp.asarray(z.reshape(DEVICES, parts)) for z in (starts, sizes, places, received))
    exchanged = jax.jit(jax.vmap(partial(ragged_all_to_all, axis="expert"), axis_name="expert"))
    got = exchanged(jnp.asarray(operand), jnp.asarray(output), *moves)
    np.testing.assert_array_equal(got, want.astype(np.float32))


@pytest.mark.parametrize("room", [1, 7, 40])
def test_every_row_arrives_once_and_comes_back_to_its_place(room):
    most = DEVICES * 30
    nobodys = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1), bool)

    def device(row_R, count_IJ, passes):
        route = ragged.Route(jnp.arange(most), *nobodys, count_IJ, room, passes)

        def one(i, found):
            arrived, back_R = found
            there, back = ragged._moves(route, i)
            row_Z = ragged._sent(route, row_R, there)
            return arrived + (row_Z > 0).sum(), ragged._exchange(10 * row_Z, back_R, back)

        return jax.lax.fori_loop(0, passes, one, (0, jnp.zeros_like(row_R)))

    everywhere = jax.jit(jax.vmap(device, in_axes=(0, None, None), axis_name="expert"))
    row_IR = 1 + jnp.arange(DEVICES * most).reshape(DEVICES, most)
    random_IJ = np.random.default_rng(0).integers(0, 6, (DEVICES, DEVICES)).astype(np.int32)
    for skew in (1, 0, [[0, 5, 0, 0]], [[5], [0], [0], [0]]):  # even, nothing at all, to one, from one
        count_IJ = random_IJ * np.array(skew, np.int32)
        passes = -(-count_IJ.sum(axis=0).max() // room)
        arrived_J, back_IR = everywhere(row_IR, count_IJ, passes)
        np.testing.assert_array_equal(arrived_J, count_IJ.sum(axis=0))
        sent_IR = np.arange(most) < count_IJ.sum(axis=1)[:, None]
        np.testing.assert_array_equal(back_IR, np.where(sent_IR, 10 * row_IR, 0))


def test_rows_that_are_sent_once_to_each_device():
    received = {n: ragged.balanced(1, 8, 160, n) * (1 - 1 / n) for n in (4, 8, 16, 32)}
    assert {n: round(rows, 1) for n, rows in received.items()} == {4: 2.7, 8: 4.7, 16: 6.2, 32: 7.1}
    assert ragged.balanced(10, 8, 8, 4) == 40  # all experts are active: all tokens to all devices
    draws = np.random.default_rng(0).random((10_000, 160)).argsort(axis=1)[:, :8] // 10
    assert np.mean([len(set(row)) for row in draws]) == pytest.approx(ragged.balanced(1, 8, 160, 16), rel=0.01)
    assert ragged.rows(1024, 8, 160, 16) == (8192, 9216)
    assert ragged.rows(16, 2, 8, 8) == (32, 40)
    assert ragged.rows(16, 8, 8, 4) == (64, 64)


@pytest.mark.parametrize(
    "dispatch, tokens, axis, where, taken",
    [
        (None, 4096, 8, "tpu", gather),
        (None, 4096, 16, "tpu", ragged),
        (None, 4096, 16, "gpu", ragged),
        (None, 4096, 16, "cpu", gather),
        (None, 8, 16, "tpu", gather),
        ("gather", 4096, 16, "tpu", gather),
        ("ragged", 8, 2, "cpu", ragged),
        ("ragged", 4096, 1, "tpu", gather),
    ],
)
def test_a_wide_expert_axis_takes_the_ragged_exchange(dispatch, tokens, axis, where, taken):
    assert expert.strategy(dispatch, tokens, axis, where) is taken
