"""Muon against its own definition: an independent NumPy reading, and what must hold for any gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.optim import newton_schulz, scale_by_muon
from glm_jax.spec import Spec


def _reading(grads, momentum=0.95, nesterov=True):
    """Moonlight's update for a sequence of gradients of one matrix, float64 (spec 4.2)."""
    moved, out = np.zeros(grads[0].shape), []
    for grad in np.asarray(grads, np.float64):
        moved = momentum * moved + grad
        x = grad + momentum * moved if nesterov else moved
        rows, cols = x.shape
        x = x / (np.sqrt((x**2).sum()) + 1e-7)
        x = x.T if rows > cols else x
        for _ in range(5):
            square = x @ x.T
            x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
        out.append(0.2 * np.sqrt(max(rows, cols)) * (x.T if rows > cols else x))
    return np.stack(out)


def _directions(spec, grads, **options):
    tx = scale_by_muon({"w": spec}, ns_dtype="float32", **options)

    @jax.jit
    def all_steps(grads):
        def step(state, grad):
            d, state = tx.update({"w": grad}, state)
            return state, d["w"]

        return jax.lax.scan(step, tx.init({"w": grads[0]}), grads)[1]

    return np.asarray(all_steps(jnp.asarray(grads)))


# spec, shape, and the array's matrices as [batch..., rows, columns]
MATRICES = {
    "matrix": (Spec("", "D", "F", "matrix"), (12, 20), (12, 20)),
    "tall": (Spec("", "F", "D", "matrix"), (40, 12), (40, 12)),
    "heads out": (Spec("", "D", "NH", "matrix"), (12, 4, 6), (12, 24)),
    "heads in": (Spec("", "NH", "D", "matrix"), (4, 6, 12), (24, 12)),
    "layers": (Spec("L", "D", "KH", "matrix"), (3, 12, 2, 4), (3, 12, 8)),
    "experts": (Spec("LE", "M", "D", "matrix"), (2, 3, 8, 12), (2, 3, 8, 12)),
}


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("nesterov", [True, False])
def test_twenty_steps_equal_the_numpy_reading(name, nesterov):
    spec, shape, matrices = MATRICES[name]
    grads = np.random.default_rng(0).normal(size=(20, *shape)).astype(np.float32)
    ours = _directions(spec, grads, nesterov=nesterov).reshape(20, -1, *matrices[-2:])
    apart = grads.reshape(20, -1, *matrices[-2:])
    for i in range(apart.shape[1]):
        np.testing.assert_allclose(ours[:, i], _reading(apart[:, i], nesterov=nesterov), atol=1e-5)


@pytest.mark.parametrize("spec", [Spec("L", "D", "NH", "matrix"), Spec("L", "NH", "D", "matrix")])
def test_split_heads_orthogonalises_each_head_with_its_own_scale(spec):
    sizes = {"L": 2, "D": 12, "N": 3, "H": 4}
    grads = np.random.default_rng(1).normal(size=(2, *(sizes[x] for x in spec.dims))).astype(np.float32)
    ours, heads = _directions(spec, grads, split_heads=True), spec.dims.index("N") + 1
    for layer in range(2):
        for head in range(3):
            one = np.take(grads[:, layer], head, axis=heads - 1)
            np.testing.assert_allclose(np.take(ours[:, layer], head, axis=heads - 1), _reading(one), atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([(8, 24), (24, 8)]), st.floats(-3, 12), st.integers(0, 2**31))
def test_the_direction_does_not_depend_on_the_scale_of_the_gradient(shape, power, seed):
    x = jax.random.normal(jax.random.key(seed), shape)
    # 1e-7 beside a norm of 1e-2, and float32 rounding that five steps enlarge at most 3.44^5 times
    np.testing.assert_allclose(newton_schulz(x), newton_schulz(10.0**power * x), atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("aspect", [1, 2, 4, 8])
def test_singular_values_and_the_rms_of_an_update(aspect, dtype):
    """An update's RMS is not 0.2: the quintic leaves singular values in 0.68..1.21, wherever they stood before, and
    not at one. Random matrices come out at 0.158..0.191, lower where their singular values are alike (wide ones)."""
    x_BPQ = jax.random.normal(jax.random.key(aspect), (2, 96, 96 * aspect))
    y_BPQ = np.asarray(newton_schulz(x_BPQ, 5, dtype), np.float32)
    values = np.linalg.svd(y_BPQ, compute_uv=False)
    assert values.max() < 1.21
    if aspect > 1:  # a square random matrix has singular values too small to be lifted in five steps
        assert values.min() > 0.66
    rms = 0.2 * np.sqrt(96 * aspect) * np.sqrt((y_BPQ**2).mean())
    assert 0.155 < rms < 0.195


def test_the_scale_alone_gives_the_rms_asked_for():
    """On an exactly orthogonal factor sqrt(max(rows, cols)) sets the RMS to 1 (here to float32's rounding)."""
    for rows, cols in ((32, 32), (32, 64), (256, 32)):
        u, _, vt = np.linalg.svd(np.random.default_rng(0).normal(size=(rows, cols)), full_matrices=False)
        assert 0.2 * np.sqrt(max(rows, cols)) * np.sqrt(((u @ vt) ** 2).mean()) == pytest.approx(0.2, rel=1e-6)


def test_float16_and_bfloat16_stay_in_range_and_near_float32():
    x = 1e-6 * jax.random.normal(jax.random.key(0), (64, 128))  # below float16's smallest normal number
    exact = newton_schulz(x)
    for dtype, tolerance in (("float16", 0.02), ("bfloat16", 0.1)):  # about 30 units of rounding of each
        low = newton_schulz(x, 5, dtype)
        assert low.dtype == dtype
        assert float(jnp.linalg.norm(low.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)) < tolerance


def test_a_zero_gradient_gives_a_zero_update():
    spec = Spec("E", "D", "M", "matrix")
    assert not _directions(spec, np.zeros((2, 3, 4, 5), np.float32)).any()
