"""Linear cross-entropy: the chunked form against its definition, forward and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cross_entropy import linear_cross_entropy, linear_token_loss, xla


def inputs(X: int, D: int, V: int, dtype: str = "float32"):
    rng = np.random.default_rng(X + V)
    x_XD, w_DV = (jnp.asarray(rng.normal(size=s), dtype) for s in ((X, D), (D, V)))
    return x_XD, w_DV, jnp.asarray(rng.integers(0, V, X)), jnp.asarray(rng.random(X) * (rng.random(X) < 0.7), "float32")


def outcome(implementation: str, x_XD, w_DV, targets_X, weights_X):
    def loss(x_XD, w_DV):
        return linear_cross_entropy(x_XD, w_DV, targets_X, weights_X, implementation=implementation)

    (value, log_prob_X), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x_XD, w_DV)
    return value, log_prob_X, *gradients


@pytest.mark.parametrize("X,D,V", [(12, 8, 20), (7, 4, 33), (1, 4, 5), (30, 16, 64)])
def test_chunks_equal_the_definition(monkeypatch, X, D, V):
    monkeypatch.setattr(xla, "CHUNK_LOGITS", 4 * V)  # several chunks, whose size need not divide a power of two
    for got, want in zip(outcome("xla", *inputs(X, D, V)), outcome("reference", *inputs(X, D, V)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)  # float32 sums in another order


def test_bfloat16_inputs_keep_a_float32_loss():
    got = outcome("xla", *inputs(16, 8, 32, "bfloat16"))
    want = outcome("reference", *inputs(16, 8, 32, "bfloat16"))
    assert got[0].dtype == jnp.float32
    assert got[2].dtype == jnp.bfloat16
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(
        got[3].astype("float32"), want[3].astype("float32"), rtol=0.03, atol=0.05
    )  # bf16 logits' gradient


def test_a_weight_of_zero_gives_nothing_and_takes_nothing():
    x_XD, w_DV, targets_X, weights_X = inputs(8, 4, 16)
    weights_X = weights_X.at[3].set(0.0)
    _, _, dx_XD, _ = outcome("xla", x_XD, w_DV, targets_X, weights_X)
    np.testing.assert_array_equal(dx_XD[3], 0)


def test_shapes_and_names_that_do_not_fit_are_told():
    x_XD, w_DV, targets_X, weights_X = inputs(8, 4, 16)
    with pytest.raises(ValueError, match=r"\(7,\)"):
        linear_cross_entropy(x_XD, w_DV, targets_X, weights_X[:7])
    with pytest.raises(ValueError, match="known: reference, xla"):
        linear_cross_entropy(x_XD, w_DV, targets_X, weights_X, implementation="cuda")


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_any_loss_of_the_log_probability_has_the_gradient_of_its_chain_rule(implementation):
    x_XD, w_DV, targets_X, weights_X = inputs(12, 8, 20)

    def loss(x_XD, w_DV):
        square = lambda log_prob_X, weights_X: weights_X * log_prob_X**2  # noqa: E731
        return linear_token_loss(square, x_XD, w_DV, targets_X, weights_X, implementation=implementation)[0]

    def definition(x_XD, w_DV):
        log_prob_XV = jax.nn.log_softmax(x_XD @ w_DV)
        return jnp.sum(weights_X * log_prob_XV[jnp.arange(12), targets_X] ** 2)

    for got, want in zip(jax.grad(loss, (0, 1))(x_XD, w_DV), jax.grad(definition, (0, 1))(x_XD, w_DV), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)  # float32 sums in another order
