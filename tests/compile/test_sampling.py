"""The sampler with weights of 8 bits, compiled for a TPU: its products are the chip's kernels, its weights half as large."""

import jax
import pytest

from glm_jax import mesh
from glm_jax.config import Mesh, Model
from glm_jax.plan.target import target
from glm_jax.sample import engine
from pallas_kernels import analysis

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not analysis.can_compile("tpu"), reason="needs the libtpu wheel that jax pins: pip install 'jax[tpu]'"
    ),
]
CFG = Model(
    V=256, D=1024, L=3, dense_layers=1, N=8, K=2, H=128, F=2048, M=384, E=8, A=2, mtp_layers=0, max_positions=256
)  # fmt: skip


def test_decoding_in_8_bits_on_four_chips():
    bytes_of = {}
    with jax.set_mesh(mesh.make(Mesh(fsdp=1, expert=4), target("v5p:2x2x1").devices)):
        for in_8_bits in (False, True):
            compiled = engine.traced(CFG, "decode", 32, 64, 64, in_8_bits).lower().compile()
            assert ("fp8_matmul" in compiled.as_text()) == in_8_bits
            bytes_of[in_8_bits] = compiled.memory_analysis().argument_size_in_bytes
    # of a device: a quarter of the experts' products, all other matrices
    matrices = 3 * (CFG.D * 128 * (2 * CFG.N + 2 * CFG.K)) + 3 * CFG.D * (CFG.F + 2 * CFG.M + 2 * CFG.E // 4 * CFG.M)
    assert bytes_of[False] - bytes_of[True] == pytest.approx(matrices, rel=0.05)
