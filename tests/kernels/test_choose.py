"""Which implementation a door takes."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import choose

X = jnp.zeros((3, 5))
XLA = SimpleNamespace()
TPU = SimpleNamespace(
    refusal=lambda operation, x: None if x.shape[0] % 8 == 0 else f"{x.shape[0]} rows are not a multiple of 8"
)
KNOWN = {"xla": XLA, "tpu": TPU}


def test_without_a_name_it_is_the_best_for_the_platform_that_takes_the_arrays(monkeypatch):
    assert choose.choose("op", KNOWN, None, X) is XLA
    monkeypatch.setattr(choose, "platform", lambda: "tpu")
    assert choose.choose("op", KNOWN, None, X) is XLA
    assert choose.choose("op", KNOWN, None, jnp.zeros((16, 5))) is TPU
    assert choose.choose("op", {"xla": XLA}, None, X) is XLA


def test_a_name_is_taken_or_refused_aloud():
    assert choose.choose("op", KNOWN, "tpu", jnp.zeros((8, 5))) is TPU
    with pytest.raises(
        NotImplementedError, match=r"op: implementation 'tpu' cannot: 3 rows .* None takes one that can"
    ):
        choose.choose("op", KNOWN, "tpu", X)
    with pytest.raises(ValueError, match=r"op: unknown implementation 'gpu'; known: xla, tpu, or None"):
        choose.choose("op", KNOWN, "gpu", X)


def test_the_platform_is_that_of_the_mesh_in_context():
    assert choose.platform() == jax.default_backend()
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    there = mesh.abstract_mesh.update(abstract_device=jax.sharding.AbstractDevice("TPU v5", 2, "tpu"))
    with jax.sharding.use_abstract_mesh(there):
        assert choose.platform() == "tpu"
