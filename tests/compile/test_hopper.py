"""The Hopper kernels compiled to sm_90a machine code for the published models' shapes: registers and matrix instructions."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import analysis
from pallas_kernels.attention.gpu import attention
from pallas_kernels.grouped_matmul.gpu import gmm, gmm_t, tgmm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not analysis.can_compile("hopper"),
        reason="needs the wheels jax-cuda12-plugin and jax-cuda12-pjrt of jax's version, without dependencies",
    ),
]
ROWS, EXPERTS = 16384, 16
WIDTHS = {"glm45": (5120, 1536), "air": (4096, 1408)}


def _of(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def attention_and_gradients(q, k, v, positions, segments, dy):
    places = positions, positions, segments, segments, segments
    y, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, *places, scale=q.shape[-1] ** -0.5), q, k, v)
    return y, *vjp(dy)


def assert_uses_the_tensor_cores_without_waiting(code: analysis.MachineCode) -> None:
    assert code.wgmma > 0
    assert code.hgmma is None or code.hgmma >= code.wgmma  # in machine code, where there is a tool to look
    assert code.spill_bytes == 0
    assert not [line for line in code.warnings if "serialized" in line]


@pytest.mark.parametrize(("operation", "model"), [(gmm, "air"), (gmm_t, "glm45"), (tgmm, "air")])
def test_grouped_matmul(operation, model):
    D, M = WIDTHS[model]
    x, y, w = _of(ROWS, D), _of(ROWS, M), _of(EXPERTS, D, M)
    inputs = {gmm: (x, w), gmm_t: (y, w), tgmm: (x, y)}[operation]
    figures = analysis.hopper(operation, (*inputs, _of(EXPERTS, dtype=jnp.int32)))
    assert figures.temporary_bytes < 2**20  # the table of tiles, and no copy of the weights
    (code,) = figures.machine_code
    assert_uses_the_tensor_cores_without_waiting(code)


def test_attention_of_131072_tokens():
    T, N, K, H = 131072, 96, 8, 128
    q, k, at = _of(1, T, N, H), _of(1, T, K, H), _of(1, T, dtype=jnp.int32)
    figures = analysis.hopper(attention_and_gradients, (q, k, k, at, at, q))
    assert figures.temporary_bytes < 0.2 * 2**30  # statistics and lists of blocks
    assert len(figures.machine_code) == 3
    for code in figures.machine_code:
        assert_uses_the_tensor_cores_without_waiting(code)
