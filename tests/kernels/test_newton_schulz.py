"""Newton-Schulz: every implementation against the polynomial of the singular values."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.newton_schulz import newton_schulz, operations, tpu
from pallas_kernels.newton_schulz.cases import CASES, Case

QUINTIC = (3.4445, -4.7750, 2.0315)
INTERPRETED = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


def matrices(case: Case, dtype: str, seed: int = 0):
    x = np.random.default_rng(seed).normal(size=(*case.batch, case.P, case.Q))
    return jnp.asarray(x / np.linalg.norm(x, axis=(-2, -1), keepdims=True), dtype)


def exact(x, steps: int):
    """In float64, of the rounded input."""
    u, s, v = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    for _ in range(steps):
        s = QUINTIC[0] * s + QUINTIC[1] * s**3 + QUINTIC[2] * s**5
    return np.einsum("...pr,...r,...rq->...pq", u, s, v)


def error(y, x, steps: int) -> float:
    want = exact(x, steps)
    return float(np.linalg.norm(np.asarray(y, np.float64) - want) / np.linalg.norm(want))


@pytest.mark.parametrize("implementation", ["reference", "xla", "gram"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "test" in case.tags])
def test_singular_values_follow_the_polynomial(name, implementation):
    case = CASES[name]
    x = matrices(case, "float32")
    y = newton_schulz(x, (QUINTIC,) * case.steps, implementation=implementation)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert error(y, x, case.steps) < 1e-4  # float32 rounding, amplified by five steps of slope up to 3.4


TPU_CASES = [
    pytest.param("wide", marks=pytest.mark.slow),
    "one_row",
    pytest.param("tall_unaligned", marks=pytest.mark.slow),
    pytest.param("several_tiles", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name", TPU_CASES)
def test_tpu_kernel_is_as_near_as_xla_is(name):
    case = CASES[name]
    x = matrices(case, "bfloat16")
    small = tpu.Config(rows=128, columns=128, contract=128)
    step = partial(newton_schulz, implementation="xla")
    with pltpu.force_tpu_interpret_mode(INTERPRETED):
        wide = x if case.P <= case.Q else x.swapaxes(-1, -2)
        y = tpu.newton_schulz(wide, (QUINTIC,) * min(case.steps, 2), small)
    y = y if case.P <= case.Q else y.swapaxes(-1, -2)
    near = error(step(x, (QUINTIC,) * min(case.steps, 2)), x, min(case.steps, 2))
    assert error(y, x, min(case.steps, 2)) < 1.5 * near + 2**-8  # bfloat16: two roundings more of the polynomial


def test_gram_in_float16_is_nearer_than_the_plain_form_in_bfloat16():
    """Singular values over four decades, as momentum has; in bfloat16 the Gram form is less near."""
    random = np.random.default_rng(0)
    u, v = (np.linalg.qr(random.normal(size=(n, 96)))[0] for n in (96, 320))
    x = (u * np.geomspace(1, 1e-4, 96)) @ v.T
    x /= np.linalg.norm(x)

    def of(implementation: str, dtype: str) -> float:
        rounded = jnp.asarray(x, dtype)
        return error(newton_schulz(rounded, (QUINTIC,) * 5, implementation=implementation), x, 5)

    plain = of("xla", "bfloat16")
    assert 2 * of("gram", "float16") < plain < of("gram", "bfloat16")


def test_the_gradient_is_that_of_the_polynomial():
    x = matrices(Case((2,), 4, 6), "float32")
    dy = matrices(Case((2,), 4, 6), "float32", seed=1)

    def along(x, t):
        return jnp.sum(dy * newton_schulz(x + t * dy, (QUINTIC,) * 2, implementation="xla"))

    step = 1e-3
    slope = (along(x, step) - along(x, -step)) / (2 * step)
    gradient = jax.grad(lambda x: along(x, 0.0))(x)
    np.testing.assert_allclose(jnp.sum(gradient * dy), slope, rtol=1e-2)  # central differences in float32


@pytest.mark.slow
def test_the_tpu_kernel_has_the_gradient_of_xla():
    x, dy = (matrices(Case((1,), 8, 16), "bfloat16", seed) for seed in (0, 1))
    with pltpu.force_tpu_interpret_mode(INTERPRETED):
        _, vjp = jax.vjp(lambda x: newton_schulz(x, (QUINTIC,), implementation="tpu"), x)
        (got,) = vjp(dy)
    (want,) = jax.vjp(lambda x: newton_schulz(x, (QUINTIC,), implementation="xla"), x)[1](dy)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("implementation", "steps"), [("xla", 1), ("gram", 7)])  # a loop's body counts once
def test_operations_are_those_of_the_program(implementation, steps):
    P, Q = 32, 96
    run = jax.jit(lambda x: newton_schulz(x, (QUINTIC,) * steps, implementation=implementation))
    counted = run.lower(jnp.ones((P, Q))).compile().cost_analysis()["flops"]
    assert counted == pytest.approx(operations(P, Q, steps, implementation == "gram"), rel=0.05)


def test_nan_stays_in_its_matrix():
    x = matrices(Case((3,), 4, 6), "float32").at[1, 2, 3].set(jnp.nan)
    y = newton_schulz(x, (QUINTIC,))
    assert np.isfinite(y[0]).all() and np.isfinite(y[2]).all() and np.isnan(y[1]).all()


def test_what_does_not_fit_is_told():
    x = matrices(Case((2,), 4, 6), "float32")
    with pytest.raises(NotImplementedError, match=r"\(2, 4, 6\) is float32; it takes bfloat16"):
        newton_schulz(x, (QUINTIC,), implementation="tpu")
    with pytest.raises(ValueError, match=r"must be matrices"):
        newton_schulz(x[0, 0], (QUINTIC,))
    with pytest.raises(ValueError, match=r"triples"):
        newton_schulz(x, ((1.0, 2.0),))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="known: reference, xla, tpu, gram"):
        newton_schulz(x, (QUINTIC,), implementation="cuda")
    assert newton_schulz(x[:0], (QUINTIC,)).shape == (0, 4, 6)
