"""Attention compiled for TPUs that are not here, in GLM-4.5's shapes: it compiles, and takes the memory it should."""

from functools import partial

import pytest

from pallas_kernels import analysis
from pallas_kernels.bench import benches

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not analysis.can_compile("tpu"), reason="needs the libtpu wheel that jax pins: pip install 'jax[tpu]'"
    ),
]


@pytest.mark.parametrize("chip", ["v5p"])
def test_forward_and_backward_of_131072_tokens_leave_room(chip):
    operation, case = "attention and gradient", "glm45_128k"
    (one,) = (one for one in benches("attention", "chip") if (one.operation, one.case) == (operation, case))
    figures = analysis.tpu(partial(one.run, implementation="tpu"), one.arguments, chip)
    assert figures.temporary_bytes <= 3 * analysis.chips.GIB
