"""Figures of programs compiled for chips that are not here. Skipped without the compilers: libtpu, jax-cuda12-plugin."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from pallas_kernels import analysis

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not analysis.can_compile("tpu"), reason="needs the libtpu wheel that jax pins: pip install 'jax[tpu]'"
    ),
]


def _product(x_ref, y_ref, z_ref):
    z_ref[...] = jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32).astype(z_ref.dtype)


def product(x: jax.Array, y: jax.Array, tile: int) -> jax.Array:
    (rows, inner), columns = x.shape, y.shape[1]
    return pl.pallas_call(
        _product,
        grid=(rows // tile, columns // tile),
        in_specs=[pl.BlockSpec((tile, inner), lambda i, j: (i, 0)), pl.BlockSpec((inner, tile), lambda i, j: (0, j))],
        out_specs=pl.BlockSpec((tile, tile), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((rows, columns), x.dtype),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * inner * columns, bytes_accessed=3 * 2 * rows * columns, transcendentals=0
        ),
        name="product",
    )(x, y)


SQUARE = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "tpu7x"])
def test_a_schedule_multiplies_what_the_tile_does(chip):
    figures = analysis.tpu(partial(product, tile=512), (SQUARE, SQUARE), chip)
    (loops,) = figures.loops.values()
    assert loops[0].products == 512 * 1024 * 512  # a grid step
    assert 0.6 < loops[0].over_ideal(figures.chip) < 2
    assert figures.operations == 2 * 1024**3
    assert figures.bound_seconds == pytest.approx(
        max(2 * 1024**3 / figures.chip.flops, figures.bytes_moved / figures.chip.bandwidth)
    )
    assert figures.argument_bytes == 2 * 2 * 1024**2


def test_what_does_not_compile_says_why():
    with pytest.raises(RuntimeError, match="block shape"):
        analysis.tpu(partial(product, tile=100), (SQUARE, SQUARE), "v5p")
