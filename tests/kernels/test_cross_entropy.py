"""Linear cross-entropy: the chunked form against its definition, forward and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cross_entropy import (
    linear_cross_entropy,
    linear_softmax,
    linear_token_loss,
    negative_log_likelihood,
    xla,
)


def inputs(X: int, D: int, V: int, dtype: str = "float32"):
    rng = np.random.default_rng(X + V)
    x_XD, w_DV = (jnp.asarray(rng.normal(size=s), dtype) for s in ((X, D), (D, V)))
    return x_XD, w_DV, jnp.asarray(rng.integers(0, V, X)), jnp.asarray(rng.random(X) * (rng.random(X) < 0.7), "float32")


def outcome(implementation: str, x_XD, w_DV, targets_X, weights_X):
    def loss(x_XD, w_DV):
        return linear_cross_entropy(x_XD, w_DV, targets_X, weights_X, implementation=implementation)

    (value, log_prob_X), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x_XD, w_DV)
    return value, log_prob_X, *gradients


@pytest.mark.parametrize(
    "X,D,V",
    [(13, 8, 20), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in [(7, 4, 33), (1, 4, 5), (30, 16, 64)])],
)
def test_chunks_equal_the_definition(monkeypatch, X, D, V):
    monkeypatch.setitem(xla.CHUNK_LOGITS, "cpu", 4 * V)  # several chunks, and some tokens left over
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


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_targets_of_any_integer_type_are_the_same_tokens(implementation):
    x_XD, w_DV, targets_X, weights_X = inputs(13, 8, 300)
    targets_X = targets_X % 256
    want = outcome(implementation, x_XD, w_DV, targets_X, weights_X)
    for dtype in ("uint8", "uint32"):
        for got, expected in zip(
            outcome(implementation, x_XD, w_DV, targets_X.astype(dtype), weights_X), want, strict=True
        ):
            np.testing.assert_array_equal(got, expected)


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


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_temperature_divides_a_tokens_logits(implementation):
    x_XD, w_DV, targets_X, weights_X = inputs(12, 8, 20)
    temperature_X = jnp.linspace(0.5, 2, 12)

    def loss(x_XD, w_DV, temperature_X):
        scored = linear_softmax(
            negative_log_likelihood, x_XD, w_DV, targets_X, weights_X,
            temperature_X=temperature_X, implementation=implementation,
        )  # fmt: skip
        return scored.loss, scored

    def definition(x_XD, w_DV):
        logits_XV = (x_XD @ w_DV) / temperature_X[:, None]
        log_prob_X = jax.nn.log_softmax(logits_XV)[jnp.arange(12), targets_X]
        return -jnp.sum(weights_X * log_prob_X), (log_prob_X, jax.nn.logsumexp(logits_XV, axis=1))

    (value, scored), got = jax.value_and_grad(loss, (0, 1), has_aux=True)(x_XD, w_DV, temperature_X)
    (wanted, (log_prob_X, lse_X)), want = jax.value_and_grad(definition, (0, 1), has_aux=True)(x_XD, w_DV)
    pairs = (value, wanted), (scored.log_prob_X, log_prob_X), (scored.lse_X, lse_X), *zip(got, want, strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # float32 sums in another order


def test_nan_in_a_row_of_weight_zero_reaches_nothing():
    x_XD, w_DV, targets_X, weights_X = inputs(8, 4, 16)
    weights_X = weights_X.at[0].set(0.0)
    clean = outcome("xla", x_XD.at[0].set(0.0), w_DV, targets_X, weights_X)
    loss, log_prob_X, dx_XD, dw_DV = outcome("xla", x_XD.at[0].set(jnp.nan), w_DV, targets_X, weights_X)
    assert np.isnan(log_prob_X[0])
    for got, want in zip((loss, log_prob_X[1:], dx_XD, dw_DV), (clean[0], clean[1][1:], *clean[2:]), strict=True):
        np.testing.assert_array_equal(got, want)


def test_the_reference_holds_the_whole_vocabulary():
    options = {"vocabulary_axis": "model", "implementation": "reference"}
    with pytest.raises(NotImplementedError, match="leave vocabulary_axis out"):
        linear_softmax(negative_log_likelihood, *inputs(8, 4, 16), **options)


def test_chunks_are_large_and_few_tokens_are_left_over(monkeypatch):
    assert xla.chunk_tokens(4096, 4096) == 256
    assert xla.chunk_tokens(16381, 2**15) == 32  # prime
    monkeypatch.setattr(xla, "platform", lambda: "tpu")
    assert xla.chunk_tokens(16384, 151552) == 1024
    assert xla.chunk_tokens(8, 151552) == 8
