"""The TPU kernel of Newton-Schulz, compiled for chips that are not here. Skipped without libtpu."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import analysis, newton_schulz

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not analysis.can_compile("tpu"), reason="needs the libtpu wheel that jax pins: pip install 'jax[tpu]'"
    ),
]
STEP = partial(newton_schulz.newton_schulz, quintics=((3.4445, -4.7750, 2.0315),))


@pytest.mark.parametrize("chip", ["v5p", "v6e", "tpu7x"])
def test_a_symmetric_product_is_half_the_operations(chip):
    size = 1024  # two tiles a side: three of four
    figures = analysis.tpu(STEP, (jax.ShapeDtypeStruct((2, size, size), jnp.bfloat16),), chip)
    assert figures.operations == 2 * 2 * size**3 * (0.75 + 0.75 + 1)
    assert len(figures.loops) == 3


def test_matrices_over_a_mesh_stay_where_they_are():
    mesh = AbstractMesh((2, 2), ("fsdp", "expert"), axis_types=(AxisType.Explicit,) * 2)
    x = jax.ShapeDtypeStruct((4, 512, 512), jnp.bfloat16, sharding=NamedSharding(mesh, P("expert")))
    figures = analysis.tpu(STEP, (x,), "v5p", axes={"fsdp": 2, "expert": 2})
    assert figures.argument_bytes == figures.output_bytes == 2 * 512 * 512 * 2  # two of four matrices
    assert figures.loops
