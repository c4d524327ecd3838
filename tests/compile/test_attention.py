"""Attention compiled for TPUs that are not here, in GLM-4.5's shapes: it compiles, and takes the memory it should."""

import os
import subprocess
import sys

import pytest

GIB = 2**30
TOPOLOGIES = {"v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def compiled_temporaries(chip: str, tokens: int) -> int:
    """Bytes of temporaries of one device, forward and backward; in this process, which must not have used jax before."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from pallas_kernels.attention import attention

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices
    mesh = jax.sharding.Mesh(np.array(devices), ("data",), axis_types=(AxisType.Explicit,))
    split = PartitionSpec("data")

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((len(devices), *shape), dtype, sharding=NamedSharding(mesh, split))

    def value_and_gradients(q, k, v, dy, position, segment):
        def run(q, k, v):
            return attention(
                q, k, v, q_positions_BT=position, k_positions_BS=position, q_segments_BT=segment, k_segments_BS=segment,
                scale=128**-0.5, implementation="tpu",
            )  # fmt: skip

        y, vjp = jax.vjp(run, q, k, v)
        return y, *vjp(dy)

    q, k, places = array(tokens, 96, 128), array(tokens, 8, 128), array(tokens, dtype=jnp.int32)
    with jax.set_mesh(mesh):
        run = jax.jit(jax.shard_map(value_and_gradients, in_specs=split, out_specs=split))
        return run.lower(q, k, k, q, places, places).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "tokens", "most"), [("v5p", 131072, 3 * GIB)])
def test_compiles_within_its_memory(chip, tokens, most):
    pytest.importorskip("libtpu", reason="compiling for a TPU takes libtpu")
    env = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", __name__, chip, str(tokens)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) <= most


if __name__ == "__main__":
    print(compiled_temporaries(sys.argv[1], int(sys.argv[2])))
