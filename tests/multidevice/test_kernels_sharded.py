"""The kernels' doors on an Explicit mesh of eight devices that the CPU pretends to have, in a process of their own."""

from functools import partial

import fake_devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import attention, cross_entropy, grouped_matmul


@pytest.mark.slow
def test_kernels_on_eight_devices():
    fake_devices.run(__file__)


def value_and_gradients(f, dy, *inputs):
    y, vjp = jax.vjp(f, *inputs)
    return y, *vjp(dy)


def assert_all_close(got, want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)  # float32 sums in another order


def place(mesh, z, spec):
    return jax.device_put(z, NamedSharding(mesh, spec))


def check_expert_mlp(mesh):
    """Experts over one axis and tokens over another, scanned and rematerialised, as the model has it."""
    X, D, M, E, A = 160, 16, 8, 4, 2
    rng = np.random.default_rng(0)
    x, gate, up, down, dy = (
        jnp.asarray(rng.normal(size=s), "float32") for s in ((X, D), (E, D, M), (E, D, M), (E, M, D), (X, D))
    )
    experts, weights = (
        jnp.asarray(np.argsort(rng.random((X, E)))[:, :A], jnp.int32),
        jnp.asarray(rng.random((X, A)), "float32"),
    )
    tokens, homes = P("data"), P("expert")

    @jax.shard_map(in_specs=(tokens, homes, homes, homes, tokens, tokens), out_specs=tokens)
    def local(x, gate, up, down, weights, experts):
        x, weights, experts = lax.pcast((x, weights, experts), "expert", to="varying")
        gate, up, down = lax.pcast((gate, up, down), "data", to="varying")
        first = lax.axis_index("expert") * gate.shape[0]
        return lax.psum(grouped_matmul.expert_mlp(x, gate, up, down, experts - first, weights), "expert")

    def sharded(x, gate, up, down, weights, experts):
        layer = jax.checkpoint(lambda x, _: (local(x, gate, up, down, weights, experts), None))
        return lax.scan(layer, x, jnp.arange(1))[0]

    def whole(x, gate, up, down, weights, experts):
        return grouped_matmul.expert_mlp(x, gate, up, down, experts, weights, implementation="reference")

    layouts = tokens, tokens, homes, homes, homes, tokens, tokens
    arrays = dy, x, gate, up, down, weights, experts
    got, want = (
        jax.jit(lambda dy, *a, f=f: value_and_gradients(lambda *b: f(*b, a[-1]), dy, *a[:-1]))(*inputs)
        for f, inputs in ((sharded, [place(mesh, *z) for z in zip(arrays, layouts, strict=True)]), (whole, arrays))
    )
    assert_all_close(got, want)


def check_cross_entropy(mesh):
    """Tokens over one axis and the vocabulary over another: x's gradient is the sum over the vocabulary's shards."""
    X, D, V = 24, 8, 40
    rng = np.random.default_rng(2)
    x, w = (jnp.asarray(rng.normal(size=s), "float32") for s in ((X, D), (D, V)))
    targets, weights = jnp.asarray(rng.integers(0, V, X), jnp.int32), jnp.asarray(rng.random(X), "float32")
    temperature = jnp.asarray(0.5 + rng.random(X), "float32")

    def scored(x, w, targets, weights, temperature, **options):
        return cross_entropy.linear_softmax(
            cross_entropy.negative_log_likelihood, x, w, targets, weights, temperature_X=temperature, **options
        )

    tokens = P("data")

    @jax.shard_map(in_specs=(tokens, P(None, "expert"), tokens, tokens, tokens), out_specs=(P(), tokens, tokens))
    def local(x, w, *rows):
        x, *rows = lax.pcast((x, *rows), "expert", to="varying")
        score = scored(x, lax.pcast(w, "data", to="varying"), *rows, vocabulary_axis="expert")
        return lax.psum(score.loss, "data"), score.log_prob_X, score.lse_X

    def whole(*inputs):
        return tuple(scored(*inputs, implementation="reference"))

    def outcome(f):
        def run(x, w, *rows):
            (loss, *rest), gradients = jax.value_and_grad(lambda *a: ((z := f(*a, *rows))[0], z), (0, 1), has_aux=True)(
                x, w
            )
            return loss, *rest[0], *gradients

        return run

    layouts = tokens, P(None, "expert"), tokens, tokens, tokens
    arrays = x, w, targets, weights, temperature
    got = jax.jit(outcome(local))(*[place(mesh, *z) for z in zip(arrays, layouts, strict=True)])
    assert_all_close(got, jax.jit(outcome(whole))(*arrays))


def check_gmm(mesh):
    """Rows over all devices and one set of weights: its gradient is the sum over devices."""
    rng = np.random.default_rng(1)
    x, w = jnp.asarray(rng.normal(size=(8, 24, 16)), "float32"), jnp.asarray(rng.normal(size=(4, 16, 8)), "float32")
    sizes = jnp.asarray([rng.multinomial(20, [0.4, 0.0, 0.3, 0.3]) for _ in range(8)], jnp.int32)
    over = ("data", "expert")

    @jax.shard_map(in_specs=(P(over), P(), P(over)), out_specs=P(over))
    def local(x, w, sizes):
        return grouped_matmul.gmm(x[0], lax.pcast(w, over, to="varying"), sizes[0])[None]

    def whole(x, w, sizes):
        return jnp.stack(
            [grouped_matmul.gmm(*a, implementation="reference") for a in zip(x, [w] * 8, sizes, strict=True)]
        )

    dy = jnp.cos(jnp.arange(8 * 24 * 8.0)).reshape(8, 24, 8)
    here = place(mesh, sizes, P(over))
    inputs = place(mesh, dy, P(over)), place(mesh, x, P(over)), place(mesh, w, P())
    got = jax.jit(partial(value_and_gradients, lambda x, w: local(x, w, here)))(*inputs)
    assert_all_close(got, jax.jit(partial(value_and_gradients, lambda x, w: whole(x, w, sizes)))(dy, x, w))


def check_attention(mesh, T):
    """Rows over all devices, without shard_map and within it."""
    rng = np.random.default_rng(2)
    q, k, v, dy = (
        jnp.asarray(rng.normal(size=(8, *s)), "float32") for s in ((T, 4, 8), (300, 2, 8), (300, 2, 8), (T, 4, 8))
    )
    at = np.arange(300)
    positions, segments = (np.broadcast_to(z, (8, 300)).astype("int32") for z in (at % 150, at // 150 + 1))
    where = {"q_positions_BT": positions[:, -T:], "k_positions_BS": positions}
    where |= {"q_segments_BT": segments[:, -T:], "k_segments_BS": segments}

    def run(q, k, v, where, implementation=None):
        return attention.attention(q, k, v, **where, scale=0.3, implementation=implementation)

    over = P(("data", "expert"))
    want = jax.jit(partial(value_and_gradients, lambda *a: run(*a, where, "reference")))(dy, q, k, v)
    *inputs, here = jax.tree.map(lambda z: place(mesh, z, over), (dy, q, k, v, where))
    for f in (run, jax.shard_map(run, in_specs=over, out_specs=over)):
        assert_all_close(jax.jit(partial(value_and_gradients, lambda *a, f=f: f(*a, here)))(*inputs), want)


if __name__ == "__main__":
    eight = jax.make_mesh((4, 2), ("data", "expert"))
    with jax.set_mesh(eight):
        check_expert_mlp(eight)
        check_gmm(eight)
        check_cross_entropy(eight)
        check_attention(eight, T=1)
        check_attention(eight, T=30)
