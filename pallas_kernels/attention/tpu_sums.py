"""Sums over a grid's steps that are too large for the chip's own memory: fetched, added to and written back, step by step."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


def sum_in_memory(place, fresh, same, sums_ref, arrived, left) -> tuple[Array, Callable[[], None], Callable[[], None]]:
    """A step's slot, and what to do before and after it adds to `sums_ref[slot]`: a block that other steps add to as well.

    Two slots: while a step computes, the block of the next one arrives and that of the last one leaves. `place(step)` is
    the block, `fresh(step)` whether it holds nothing yet, `same(a, b)` whether two steps have the same.
    """
    step, count = pl.program_id(1) * pl.num_programs(2) + pl.program_id(2), pl.num_programs(1) * pl.num_programs(2)
    before, after = jnp.maximum(step - 1, 0), jnp.minimum(step + 1, count - 1)
    slot = step % 2

    def fetch(step):
        return pltpu.make_async_copy(place(step), sums_ref.at[step % 2], arrived.at[step % 2])

    def write(step):
        return pltpu.make_async_copy(sums_ref.at[step % 2], place(step), left.at[step % 2])

    def begin():
        pl.when(step > 0)(lambda: write(before).wait())
        not_asked = (step == 0) | same(before, step)
        pl.when(~fresh(step) & not_asked)(lambda: fetch(step).start())
        pl.when(~fresh(step))(lambda: fetch(step).wait())
        pl.when((step < count - 1) & ~fresh(after) & ~same(step, after))(lambda: fetch(after).start())

        @pl.when(fresh(step))
        def _():
            sums_ref[slot] = jnp.zeros_like(sums_ref[slot])

    def end():
        write(step).start()
        pl.when(step == count - 1)(lambda: write(step).wait())

    return slot, begin, end
