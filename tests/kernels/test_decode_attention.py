"""Attention to a cache in pages: every implementation against a loop over rows and queries in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import decode_attention as kernels
from pallas_kernels.decode_attention.cases import CASES, Case

LENGTHS = [70, 0, 1, 33, 96]  # full to the last slot, empty, one token, a ragged tail
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}  # unit normals; bfloat16 rounds probabilities and results to 8 bits


def problem(case: Case, dtype="float32", seed=0, lengths=LENGTHS):
    """A pool in which every slot that no row owns holds NaN, tables that end in such a page, and two rows that share one."""
    rng = np.random.default_rng(seed)
    pages, K, Z, C, H = case.B * case.C + 1, case.K, case.Z, case.C, case.H
    table, free = np.full((case.B, C), pages - 1), iter(rng.permutation(pages - 1))
    for b, length in enumerate(lengths):
        used = -(-length // Z)
        table[b, :used] = [next(free) for _ in range(used)]
    table[4, 0] = table[0, 0]
    k, v = (np.full((pages, K, Z, H), np.nan) for _ in range(2))
    for b, length in enumerate(lengths):
        for s in range(length):
            k[table[b, s // Z], :, s % Z], v[table[b, s // Z], :, s % Z] = rng.normal(size=(2, K, H))
    q = rng.normal(size=(case.B, case.T, case.N, H))
    return *(jnp.asarray(z, dtype) for z in (q, k, v)), jnp.asarray(table), jnp.asarray(lengths)


def row_by_row(q, k, v, table, lengths, scale):
    q, k, v = (np.asarray(z, np.float64) for z in (q, k, v))
    y, (T, N), (K, Z) = np.zeros_like(q), q.shape[1:3], k.shape[1:3]
    for b, t, n in np.ndindex(*q.shape[:3]):
        seen = np.arange(max(0, int(lengths[b]) - T + t + 1))
        if len(seen):
            at = table[b][seen // Z], n // (N // K), seen % Z
            p = np.exp(k[at] @ q[b, t, n] * scale)
            y[b, t, n] = p @ v[at] / p.sum()
    return y


@partial(jax.jit, static_argnames="implementation")
def decode(q, k, v, table, lengths, implementation):
    at = {"pages_BC": table, "lengths_B": lengths}
    return kernels.decode_attention(q, k, v, **at, scale=0.1, implementation=implementation)


def run(implementation, *inputs):
    if implementation != "tpu":
        return decode(*inputs, implementation)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        return decode.__wrapped__(*inputs, implementation)


SLOW_TPU = [*(n for n in kernels.IMPLEMENTATIONS if n != "tpu"), pytest.param("tpu", marks=pytest.mark.slow)]


@pytest.mark.parametrize("implementation", SLOW_TPU)
@pytest.mark.parametrize(("name", "dtype"), [("one_token", "float32"), ("draft", "bfloat16")])
def test_every_row_sees_its_own_tokens(name, dtype, implementation):
    inputs = problem(CASES[name], dtype)
    got = run(implementation, *inputs)
    assert got.dtype == dtype
    want = row_by_row(*(np.asarray(z, np.float64) for z in inputs[:3]), *map(np.asarray, inputs[3:]), 0.1)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("dtype", ["uint8", "uint32"])
def test_pages_and_lengths_of_any_integer_type_are_the_same(dtype, implementation):
    *arrays, table, lengths = problem(CASES["draft"])
    got = decode(*arrays, table.astype(dtype), lengths.astype(dtype), implementation)
    np.testing.assert_array_equal(got, decode(*arrays, table, lengths, implementation))


def test_bad_input_names_the_rule():
    q, k, v, table, lengths = problem(CASES["one_token"])
    call = partial(kernels.decode_attention, scale=1.0)
    with pytest.raises(ValueError, match="N a multiple of K"):
        call(q[:, :, :5], k, v, pages_BC=table, lengths_B=lengths)
    with pytest.raises(ValueError, match="cast them to one dtype"):
        call(q.astype("bfloat16"), k, v, pages_BC=table, lengths_B=lengths)
    with pytest.raises(ValueError, match=r"lengths \(4,\)"):
        call(q, k, v, pages_BC=table, lengths_B=lengths[1:])
    with pytest.raises(ValueError, match="must be integers"):
        call(q, k, v, pages_BC=table.astype("float32"), lengths_B=lengths)
    with pytest.raises(NotImplementedError, match="pages of 8 tokens"):
        call(q, k[:, :, :8], v[:, :, :8], pages_BC=table, lengths_B=lengths, implementation="tpu")
