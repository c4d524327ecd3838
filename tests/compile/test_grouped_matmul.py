"""Grouped matmul compiled for TPUs that are not here, at GLM-4.5's and Air's shapes: no spill where it multiplies, and the
static schedule near what the matrix units need. Skipped without libtpu."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import analysis, grouped_matmul
from pallas_kernels.grouped_matmul import tpu_layer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not analysis.can_compile("tpu"), reason="needs the libtpu wheel that jax pins: pip install 'jax[tpu]'"
    ),
]
ROWS = 16384
# D, M, and E of one of eight expert shards
SHAPES = {"glm45": (5120, 1536, 20), "glm45_down": (1536, 5120, 20), "air": (4096, 1408, 16)}


def arrays(operation, D, M, E):
    rows_D, rows_M, w_EDM = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((ROWS, D), (ROWS, M), (E, D, M)))
    left, right = {"gmm": (rows_D, w_EDM), "gmm_t": (rows_M, w_EDM), "tgmm": (rows_D, rows_M)}[operation]
    return left, right, jax.ShapeDtypeStruct((E,), jnp.int32)


@pytest.mark.parametrize(
    ("operation", "model", "chip"),
    [
        ("gmm", "glm45", "v5p"),
        ("gmm", "glm45", "v6e"),
        ("gmm", "air", "v6e"),
        ("gmm", "glm45", "tpu7x"),
        ("gmm_t", "air", "v5p"),
        ("gmm_t", "glm45", "tpu7x"),
        ("gmm_t", "glm45_down", "v6e"),
        ("tgmm", "glm45", "v5p"),
    ],
)
def test_the_schedule_is_that_of_the_matrix_units(operation, model, chip):
    door = partial(getattr(grouped_matmul, operation), implementation=None)  # the mesh in context chooses "tpu"
    figures = analysis.tpu(door, arrays(operation, *SHAPES[model]), chip)
    loop = figures.inner_loop
    assert list(figures.loops) and loop.spills == loop.fills == 0
    assert loop.over_ideal(figures.chip) <= 1.1
    assert figures.temporary_bytes < 2**20  # no copy of rows or weights


def of_chunks(x_RD, y_RM, sizes_E):
    """Three times the same chunk."""
    zeros_EDM = jnp.zeros((len(sizes_E), x_RD.shape[1], y_RM.shape[1]), x_RD.dtype)
    return jax.lax.fori_loop(0, 3, lambda _, sums_EDM: grouped_matmul.tgmm(x_RD, y_RM, sizes_E, sums_EDM), zeros_EDM)


def test_a_gradient_is_added_to_sums_where_they_lie():
    figures = analysis.tpu(of_chunks, arrays("tgmm", *SHAPES["glm45"]), "v5p")
    loop = figures.inner_loop
    assert list(figures.loops) and loop.spills == loop.fills == 0
    assert loop.over_ideal(figures.chip) <= 1.1
    assert figures.temporary_bytes < 2**20  # neither the product nor the sums a second time


def gate_up(x_XD, experts_XA, gate_EDM, up_EDM):
    """As `expert_mlp` begins: the routed rows are nowhere but in the kernel."""
    size_E = jnp.zeros(len(gate_EDM), jnp.int32).at[experts_XA.reshape(-1)].add(1)
    token_R = jnp.argsort(experts_XA.reshape(-1)) // experts_XA.shape[1]
    return tpu_layer.gate_up(tpu_layer.words(x_XD), token_R, gate_EDM, up_EDM, size_E)


def layer_arrays(product, D, M, E):
    def of(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    hidden, sizes = of(ROWS, M), of(E, dtype=jnp.int32)
    return {
        "gate_up": (of(ROWS // 8, D), of(ROWS // 8, 8, dtype=jnp.int32), of(E, D, M), of(E, D, M)),
        "hidden_grad": (of(ROWS, D), of(E, M, D), hidden, hidden, of(ROWS, dtype=jnp.float32), sizes),
        "rows_grad": (hidden, hidden, of(E, D, M), of(E, D, M), sizes),
    }[product]


@pytest.mark.parametrize("product", ["gate_up", "hidden_grad", "rows_grad"])
def test_the_layers_own_products_do_not_spill(product):
    run = gate_up if product == "gate_up" else getattr(tpu_layer, product)
    D, M, E = SHAPES["glm45"]
    figures = analysis.tpu(run, layer_arrays(product, D, M, E), "v5p")
    loop = figures.inner_loop
    assert list(figures.loops) and loop.spills == loop.fills == 0
    assert loop.over_ideal(figures.chip) <= 1.1
    assert figures.temporary_bytes < ROWS * D * 2 / 2  # less than half of one routed copy
