"""Grouped matmul: every implementation against a loop over groups in float64, forward and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import grouped_matmul
from pallas_kernels.grouped_matmul import routed as layer
from pallas_kernels.grouped_matmul import tpu, xla
from pallas_kernels.grouped_matmul.cases import GMM, MLP, Gmm, Mlp

IMPLEMENTATIONS = ["reference", "xla"]  # of any width; "tpu" is simulated here, for the cases named "lanes"
# Products of unit normals summed over at most 256 terms in float32; bfloat16 rounds the result once, to 8 bits.
TOLERANCE = {"float32": 2e-4, "bfloat16": 2e-2}


def problem(case, dtype="float32", seed=0):
    """x, w and the gradient of y, tail rows poisoned with NaN."""
    rng = np.random.default_rng(seed)
    x, w, dy = (
        jnp.asarray(rng.normal(size=s), dtype)
        for s in ((case.R, case.D), (len(case.sizes), case.D, case.M), (case.R, case.M))
    )
    tail = sum(case.sizes)
    return x.at[tail:].set(jnp.nan), w, jnp.asarray(case.sizes, jnp.int32), dy.at[tail:].set(jnp.nan)


def by_group(x, w, sizes, dy):
    """y, dx, dw: one product per group, in float64."""
    x, w, dy = (np.asarray(z, np.float64) for z in (x, w, dy))
    y, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros_like(x), np.zeros_like(w)
    start = 0
    for e, size in enumerate(np.asarray(sizes)):
        rows = slice(start, start + size)
        y[rows], dx[rows], dw[e] = x[rows] @ w[e], dy[rows] @ w[e].T, x[rows].T @ dy[rows]
        start += size
    return y, dx, dw


def assert_close(got, want, dtype):
    scale = max(1.0, float(np.abs(want).max()))
    np.testing.assert_allclose(np.asarray(got, np.float64) / scale, want / scale, atol=TOLERANCE[dtype])


@partial(jax.jit, static_argnames="implementation")
def gmm_and_gradients(x, w, sizes, dy, implementation=None):
    y, vjp = jax.vjp(lambda x, w: grouped_matmul.gmm(x, w, sizes, implementation=implementation), x, w)
    return y, *vjp(dy)


def cases(table):
    """(name, dtype, implementation): every case in float32, and one in bfloat16."""
    names = [name for name, case in table.items() if "test" in case.tags]
    of_lanes = [name for name in names if name.startswith("lanes")]
    any_width = [(name, "float32", one) for one in IMPLEMENTATIONS for name in names if name not in of_lanes]
    slow = [*((name, "float32", "tpu") for name in of_lanes if name != "lanes_ones"), ("lanes", "bfloat16", "tpu")]
    quick = [("lanes_ones", "float32", "tpu")] if "lanes_ones" in of_lanes else []
    return [
        *any_width,
        *(("ragged", "bfloat16", one) for one in IMPLEMENTATIONS),
        *quick,
        *(pytest.param(*one, marks=pytest.mark.slow) for one in slow),
    ]


@pytest.mark.parametrize(("name", "dtype", "implementation"), cases(GMM))
def test_forward_and_gradients_equal_a_loop_over_groups(name, dtype, implementation):
    inputs = problem(GMM[name], dtype)
    for got, want in zip(gmm_and_gradients(*inputs, implementation), by_group(*inputs), strict=True):
        assert got.dtype == dtype
        assert_close(got, want, dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_pieces_of_the_gradient_are_public(implementation):
    x, w, sizes, dy = problem(GMM["ragged"], "bfloat16")
    _, dx, dw = by_group(x, w, sizes, dy)
    assert_close(grouped_matmul.gmm_t(dy, w, sizes, implementation=implementation), dx, "bfloat16")
    sums = grouped_matmul.tgmm(x, dy, sizes, implementation=implementation)
    assert sums.dtype == jnp.float32
    assert_close(sums, dw, "float32")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["uint8", "uint32"])
def test_group_sizes_of_any_integer_type_are_the_same(dtype, implementation):
    x, w, sizes, dy = problem(Gmm(600, 8, 4, (100, 100, 0, 200, 150)))
    other = sizes.astype(dtype)
    pairs = zip(*(gmm_and_gradients(x, w, z, dy, implementation) for z in (other, sizes)), strict=True)
    for got, want in pairs:
        np.testing.assert_array_equal(got, want)
    for door, arrays in ((grouped_matmul.gmm_t, (dy, w)), (grouped_matmul.tgmm, (x, dy))):
        run = partial(door, *arrays, implementation=implementation)
        np.testing.assert_array_equal(run(other), run(sizes))


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "tpu"])
def test_a_weights_gradient_is_added_to_sums_in_their_type(implementation, monkeypatch):
    monkeypatch.setattr(tpu, "block_width", lambda *_: 128)  # two blocks of x's columns
    x, w, sizes, dy = problem(Gmm(600, 256, 128, (0, 300, 0, 1, 200, 0)), "bfloat16")  # two tiles, a tail
    want = by_group(x, w, sizes, dy)[2] + np.asarray(w, np.float64)
    for dtype in ("bfloat16", "float32"):
        add = jax.jit(partial(grouped_matmul.tgmm, implementation=implementation))
        sums = add(x, dy, sizes, w.astype(dtype))
        assert sums.dtype == dtype
        assert_close(sums, want, dtype)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 200), min_size=4, max_size=4))
def test_any_group_sizes_on_a_simulated_tpu(sizes):
    case = Gmm(R=800, D=128, M=128, sizes=tuple(sizes))  # two tiles
    inputs = problem(case, seed=sum(sizes))
    for z, want in zip(gmm_and_gradients(*inputs, "tpu"), by_group(*inputs), strict=True):
        assert_close(z, want, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"depth_step": 64, "row_step": 32}, {"column_step": 128, "work": 1 << 24}])
def test_every_way_to_cut_up_a_visit_gives_the_same(changes, monkeypatch):
    config = tpu.Config(tile=96, **changes)
    monkeypatch.setattr(tpu, "chip", lambda: tpu.Chip(gmm=config, gmm_t=config, tgmm=config))
    inputs = problem(Gmm(300, 256, 384, (0, 100, 0, 1, 150, 0)))
    run = partial(gmm_and_gradients.__wrapped__, implementation="tpu")
    for z, want in zip(jax.jit(run)(*inputs), by_group(*inputs), strict=True):
        assert_close(z, want, "float32")


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 90), min_size=5, max_size=5), st.integers(0, 40))
def test_any_group_sizes(sizes, tail):
    rows = 5 * 90 + 40  # one shape, so that one compilation serves all examples
    case = Gmm(R=rows, D=16, M=24, sizes=tuple(sizes))
    x, w, sizes, dy = problem(case, seed=tail)
    for z, want in zip(gmm_and_gradients(x, w, sizes, dy), by_group(x, w, sizes, dy), strict=True):
        assert_close(z, want, "float32")


def routed(case, seed=0, dtype="float32"):
    """Inputs of expert_mlp. Some choices name an expert that is not here."""
    rng = np.random.default_rng(seed)
    experts = np.argsort(rng.random((case.X, case.E + 2)) ** case.skew, axis=1)[:, : case.A]
    arrays = (rng.normal(size=s) for s in ((case.X, case.D), *2 * [(case.E, case.D, case.M)], (case.E, case.M, case.D)))
    x, gate, up, down = (jnp.asarray(z / (1 if z.ndim == 2 else z.shape[1] ** 0.5), dtype) for z in arrays)
    return x, gate, up, down, jnp.asarray(experts, jnp.int32), jnp.asarray(rng.random((case.X, case.A)), dtype)


def gradient_of_result(x):
    return jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape).astype(x.dtype)


@partial(jax.jit, static_argnames=("implementation", "wrap"))
def value_and_gradients(inputs, implementation, wrap=lambda f: f):
    x, gate, up, down, experts, weights = inputs
    dy = gradient_of_result(x)

    def run(x, gate, up, down, weights):
        return wrap(lambda *a: grouped_matmul.expert_mlp(*a, experts, weights, implementation=implementation))(
            x, gate, up, down
        )

    y, vjp = jax.vjp(run, x, gate, up, down, weights)
    return y, *vjp(dy)


@pytest.mark.parametrize(("name", "dtype", "implementation"), [one for one in cases(MLP) if "reference" not in one])
def test_expert_mlp_equals_its_definition(name, dtype, implementation):
    inputs = routed(MLP[name], dtype=dtype)
    values = (value_and_gradients(inputs, one) for one in (implementation, "reference"))
    for got, want in zip(*values, strict=True):
        assert got.dtype == want.dtype
        assert_close(got, np.asarray(want, np.float64), dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_experts_of_any_integer_type_are_the_same(dtype, implementation):
    x, gate, up, down, _, weights = routed(Mlp(X=64, D=8, M=4, E=128, A=1))
    experts = 2 * jnp.arange(64)[:, None]
    values = (
        value_and_gradients((x, gate, up, down, z, weights), implementation) for z in (experts.astype(dtype), experts)
    )
    for got, want in zip(*values, strict=True):
        assert want.any()
        np.testing.assert_array_equal(got, want)
    sums, dy = tuple(map(jnp.zeros_like, (gate, up, down))), gradient_of_result(x)
    run = partial(grouped_matmul.expert_mlp_grad, x, (gate, up, down), implementation=implementation)
    both = (run(z, weights, dy, sums) for z in (experts.astype(dtype), experts))
    for got, want in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "tpu"])
def test_gradients_of_pieces_add_up_to_the_whole(implementation):
    inputs = routed(MLP["lanes"])
    *_, experts, weights = inputs
    x, layer_weights = inputs[0], inputs[1:4]
    _, dx, *dlayer, dweights = value_and_gradients(inputs, "reference")
    dy = gradient_of_result(x)
    sums, got = jax.tree.map(jnp.ones_like, layer_weights), []
    for piece in (slice(0, 120), slice(120, None)):
        grad = jax.jit(partial(grouped_matmul.expert_mlp_grad, implementation=implementation))
        *of_tokens, sums = grad(x[piece], layer_weights, experts[piece], weights[piece], dy[piece], sums)
        got.append(of_tokens)
    got = [jnp.concatenate(z) for z in zip(*got, strict=True)] + [s - 1 for s in sums]
    for z, want in zip(got, (dx, dweights, *dlayer), strict=True):
        assert_close(z, np.asarray(want, np.float64), "float32")


@pytest.mark.parametrize("at_once", [48, 200, 10_000])
@pytest.mark.parametrize("name", ["ragged", "skewed"])
def test_rows_in_passes_give_the_same(name, at_once):
    inputs = routed(MLP[name])
    x, gate, up, down, experts, weights = inputs
    dy = gradient_of_result(x)
    y, hidden = jax.jit(partial(layer.expert_mlp, xla, at_once=at_once))(*inputs)
    assert (hidden is None) == (at_once < experts.size)
    grad = jax.jit(partial(layer.expert_mlp_grad, xla, at_once=at_once))
    dx, dweights, dlayer = grad(*inputs, hidden, dy)
    want = value_and_gradients(inputs, "reference")
    for got, expected in zip((y, dx, *dlayer, dweights), want, strict=True):
        assert_close(got, np.asarray(expected, np.float64), "float32")
    nobody = jnp.full_like(experts, -1)
    y, _ = jax.jit(partial(layer.expert_mlp, xla, at_once=at_once))(x, gate, up, down, nobody, weights)
    assert not y.any()


def test_rows_in_passes_on_a_simulated_tpu():
    inputs = routed(MLP["lanes"])
    run = partial(grouped_matmul.expert_mlp, at_once=256, implementation="tpu")
    x, *_ = inputs
    dy = gradient_of_result(x)

    @jax.jit
    def values(x, gate, up, down, experts, weights):
        y, back = jax.vjp(lambda x, g, u, d, w: run(x, g, u, d, experts, w), x, gate, up, down, weights)
        return y, *back(dy)

    for got, want in zip(values(*inputs), value_and_gradients(inputs, "reference"), strict=True):
        assert_close(got, np.asarray(want, np.float64), "float32")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"depth_step": 64}])
def test_the_layers_own_products_in_several_blocks_and_tiles_have_no_race(changes, monkeypatch):
    config = tpu.Config(tile=32, row_step=16, **changes)
    monkeypatch.setattr(tpu, "chip", lambda: tpu.Chip(gmm=config, gmm_t=config, tgmm=config))
    monkeypatch.setattr(tpu, "block_width", lambda *_: 128)
    inputs = routed(Mlp(X=60, D=128, M=256, E=3, A=2))
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)):
        got = jax.jit(partial(value_and_gradients.__wrapped__, implementation="tpu"))(inputs)
        jax.block_until_ready(got)
    assert not interpret_pallas_call.races.races_found
    for z, want in zip(got, value_and_gradients(inputs, "reference"), strict=True):
        assert_close(z, np.asarray(want, np.float64), "float32")


def test_choices_are_summed_a_few_tokens_at_a_time(monkeypatch):
    monkeypatch.setattr(layer, "SUM_TOKENS", 40)
    inputs = routed(MLP["lanes"])
    run = jax.jit(partial(value_and_gradients.__wrapped__, implementation="tpu"))
    for got, want in zip(run(inputs), value_and_gradients(inputs, "reference"), strict=True):
        assert_close(got, np.asarray(want, np.float64), "float32")


def test_expert_mlp_is_the_weighted_sum_of_plain_networks():
    inputs = routed(MLP["ragged"])
    x, gate, up, down, experts, weights = (np.asarray(z) for z in inputs)
    want = np.zeros_like(x)
    for t in range(len(x)):
        for e, weight in zip(experts[t], weights[t], strict=True):
            if e < len(gate):
                h = x[t] @ gate[e]
                want[t] += weight * (h / (1 + np.exp(-h)) * (x[t] @ up[e])) @ down[e]
    for implementation in IMPLEMENTATIONS:
        assert_close(grouped_matmul.expert_mlp(*inputs, implementation=implementation), want, "float32")


@pytest.mark.parametrize("tokens", [8, 100])
def test_nan_in_one_token_stays_there(tokens):
    case = Mlp(X=tokens, D=32, M=16, E=6, A=2)
    x, *rest = routed(case)
    y = grouped_matmul.expert_mlp(x.at[3].set(jnp.nan), *rest)
    np.testing.assert_array_equal(jnp.isnan(y).any(1), np.arange(tokens) == 3)


def test_works_under_checkpoint_and_scan():
    inputs = routed(MLP["ragged"])
    plain = value_and_gradients(inputs, None)

    def wrap(f):
        return lambda x, *w: jax.lax.scan(lambda c, _: (jax.checkpoint(f)(x, *w), None), x, jnp.arange(2))[0]

    for got, want in zip(value_and_gradients(inputs, None, wrap), plain, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"implementation": "cuda"}, "known: reference, xla, tpu, gpu"),
        ({"w": jnp.zeros((3, 5, 4))}, "do not fit"),
        ({"w": jnp.zeros((3, 8, 4), jnp.bfloat16)}, "cast one"),
        ({"s": jnp.zeros(3)}, "integers"),
    ],
)
def test_bad_input_names_the_rule(change, words):
    arguments = {"w": jnp.zeros((3, 8, 4)), "s": jnp.zeros(3, jnp.int32), "implementation": None} | change
    with pytest.raises(ValueError, match=words):
        grouped_matmul.gmm(
            jnp.zeros((6, 8)), arguments["w"], arguments["s"], implementation=arguments["implementation"]
        )


def test_a_tpu_takes_whole_lanes():
    with pytest.raises(NotImplementedError, match=r"shapes \(6, 8\) and \(3, 8, 4\): widths must be multiples of 128"):
        grouped_matmul.gmm(jnp.zeros((6, 8)), jnp.zeros((3, 8, 4)), jnp.zeros(3, jnp.int32), implementation="tpu")
    with pytest.raises(NotImplementedError, match="float16 is neither"):
        grouped_matmul.tgmm(*2 * [jnp.zeros((6, 128), jnp.float16)], jnp.zeros(3, jnp.int32), implementation="tpu")


def test_expert_mlp_refuses_shapes_that_do_not_fit():
    x, gate, up, down, experts, weights = routed(MLP["ragged"])
    with pytest.raises(ValueError, match=r"dy \(99, 32\) must be as x \(100, 32\)"):
        grouped_matmul.expert_mlp_grad(x, (gate, up, down), experts, weights, x[:99], (gate, up, down))
    with pytest.raises(ValueError, match=r"sums \(6, 24, 32\) of x .* must be \(6, 32, 24\)"):
        grouped_matmul.tgmm(x, x[:, :24], jnp.full(6, 10), down)
    with pytest.raises(ValueError, match="at_once=0 must be at least 1"):
        grouped_matmul.expert_mlp(x, gate, up, down, experts, weights, at_once=0)
    with pytest.raises(ValueError, match=r"gate and up are \[E,D,M\]"):
        grouped_matmul.expert_mlp(x, gate, up, up, experts, weights)
    with pytest.raises(ValueError, match=r"experts and weights are \[X,A\]"):
        grouped_matmul.expert_mlp(x, gate, up, down, experts[:5], weights)
