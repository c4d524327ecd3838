"""The TPU form of attention in the interpreter: against a loop over queries in float64, forward and gradients."""

from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import attention as kernels
from pallas_kernels.attention import tpu
from pallas_kernels.attention.tpu_tiles import visible_tiles

TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}  # unit normals; bfloat16 rounds probabilities and results to 8 bits
SMALL = tpu.Config(queries=128, keys=128, forward_part=64, backward_part=32)
NAMES = ("q_positions_BT", "k_positions_BS", "q_segments_BT", "k_segments_BS", "q_prefixes_BT")


@contextmanager
def interpreted(monkeypatch, config=SMALL, **params):
    """Small tiles; memory that nobody wrote holds NaN, and races are looked for."""
    monkeypatch.setattr(tpu, "_config", lambda: config)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan", **params)):
        yield


def arrays(B, T, S, N, K, H, seed=0, dtype="float32"):
    rng = np.random.default_rng(seed)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)
    return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


def packed(B, lengths, length):
    """Positions and segments of documents one after another, and padding behind them."""
    positions = np.concatenate([np.arange(0), *(np.arange(n) for n in lengths)])
    segments = np.repeat(np.arange(len(lengths)) + 1, np.array(lengths, int))
    rest = [0, length - len(positions)]
    return [np.broadcast_to(np.pad(z, rest), (B, length)).astype(np.int32) for z in (positions, segments)]


def value_and_gradients(q, k, v, dy, places, implementation="tpu"):
    def run(q, k, v):
        return kernels.attention(
            q,
            k,
            v,
            **dict(zip(NAMES, places, strict=True)),
            scale=0.7 * q.shape[-1] ** -0.5,
            implementation=implementation,
        )

    y, vjp = jax.vjp(run, q, k, v)
    return y, *vjp(dy)


def by_the_definition(q, k, v, dy, places):
    """Value and gradients in float64, head by head."""
    q, k, v, dy = (np.asarray(z, np.float64) for z in (q, k, v, dy))
    q_at, k_at, q_segment, k_segment = (np.asarray(z) for z in places[:4])
    prefix = q_segment if places[4] is None else np.asarray(places[4])
    y, dq, dk, dv = (np.zeros_like(z) for z in (q, q, k, v))
    scale = 0.7 * q.shape[-1] ** -0.5
    for b, n in np.ndindex(q.shape[0], q.shape[2]):
        head = n // (q.shape[2] // k.shape[2])
        own = (k_segment[b][None] == q_segment[b][:, None]) | (k_segment[b][None] == prefix[b][:, None])
        see = own & (k_at[b][None] <= q_at[b][:, None]) & (q_segment[b] != 0)[:, None]
        s = np.where(see, q[b, :, n] @ k[b, :, head].T * scale, -np.inf)
        p = np.exp(s - np.maximum(s.max(1, keepdims=True), -1e300))
        p /= np.maximum(p.sum(1, keepdims=True), 1e-300)
        y[b, :, n] = p @ v[b, :, head]
        dp = dy[b, :, n] @ v[b, :, head].T
        ds = p * (dp - (p * dp).sum(1, keepdims=True)) * scale
        dv[b, :, head] += p.T @ dy[b, :, n]
        dq[b, :, n] = ds @ k[b, :, head]
        dk[b, :, head] += ds.T @ q[b, :, n]
    return y, dq, dk, dv


def assert_as_defined(got, want, dtype="float32"):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        size = max(1.0, np.abs(b).max())  # gradients of keys sum over heads and queries
        np.testing.assert_allclose(np.asarray(a, np.float64), b, atol=TOLERANCE[dtype] * size)


CASES = {
    "packed": ((1, 300, 300, 2, 1, 128), [130, 1, 1, 100, 50]),
    "every_token_its_own": ((1, 130, 130, 1, 1, 64), [1] * 130),
    "mha_rows": ((2, 260, 260, 2, 2, 64), [200, 40]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients(name, monkeypatch):
    shape, lengths = CASES[name]
    inputs = arrays(*shape)
    position, segment = packed(shape[0], lengths, shape[1])
    places = position, position, segment, segment, None
    with interpreted(monkeypatch):
        got = value_and_gradients(*inputs, places)
    assert_as_defined(got, by_the_definition(*inputs, places))


@pytest.mark.slow
def test_packed_rows_in_one_tile(monkeypatch):
    inputs = arrays(1, 100, 100, 2, 1, 64, dtype="bfloat16")
    position, segment = packed(1, [60, 1, 30], 100)
    places = position, position, segment, segment, None
    with interpreted(monkeypatch):
        got = value_and_gradients(*inputs, places)
    assert_as_defined(got, by_the_definition(*inputs, places), "bfloat16")


def zigzag(length, ranks):
    """The order in which context-parallel ranks hold a row: each one piece from the front and its mirror image."""
    pieces = np.split(np.arange(length), 2 * ranks)
    return np.concatenate([pieces[n] for rank in range(ranks) for n in (rank, 2 * ranks - 1 - rank)])


@pytest.mark.slow
def test_order_is_data(monkeypatch):
    """One rank's queries, of the front and the end, against all keys as the ranks hold them."""
    order = zigzag(512, 2)
    position, segment = (z[:, order] for z in packed(1, [200, 300], 512))
    q, k, v, dy = arrays(1, 512, 512, 1, 1, 64)
    mine = slice(0, 256)
    places = position[:, mine], position, segment[:, mine], segment, segment[:, mine]  # each its own prefix, told
    with interpreted(monkeypatch):
        got = value_and_gradients(q[:, mine], k, v, dy[:, mine], places)
    assert_as_defined(got, by_the_definition(q[:, mine], k, v, dy[:, mine], places))


@pytest.mark.slow
def test_continuations_of_a_prompt(monkeypatch):
    position = np.array([[*range(150), *range(150, 200), *range(150, 200)]], np.int32)
    segment = np.repeat([1, 2, 3], [150, 50, 50])[None].astype(np.int32)
    places = position, position, segment, segment, np.ones_like(segment)
    inputs = arrays(1, 250, 250, 2, 1, 64)
    with interpreted(monkeypatch):
        got = value_and_gradients(*inputs, places)
    assert_as_defined(got, by_the_definition(*inputs, places))


def assert_only_who_sees_it_is_spoiled(spoiled, run):
    """By token 10 of the second of three documents, and a token of padding."""
    names, values = (["q", "v"] if spoiled == "qv" else [spoiled]), {"q": np.inf}
    inputs = dict(zip(("q", "k", "v", "dy"), arrays(1, 150, 150, 1, 1, 64), strict=True))
    position, segment = packed(1, [60, 40, 30], 150)
    places = position, position, segment, segment, None
    bad = inputs | {n: inputs[n].at[0, np.array([70, 140]), 0, 3].set(values.get(n, np.nan)) for n in names}
    got = run(*bad.values(), places)
    want = by_the_definition(*inputs.values(), places)
    others, earlier = np.r_[0:60, 100:150], np.r_[60:70]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a[:, others], b[:, others], atol=TOLERANCE["float32"])
    np.testing.assert_allclose(got[0][:, earlier], want[0][:, earlier], atol=TOLERANCE["float32"])
    assert not np.isfinite(np.stack([z[0, 60:100] for z in got])).all()  # it is not hidden from those who see it


@pytest.mark.slow
@pytest.mark.parametrize("spoiled", ["qv", "k", "dy"])
def test_what_is_not_finite_reaches_only_who_sees_it(spoiled, monkeypatch):
    with interpreted(monkeypatch):
        assert_only_who_sees_it_is_spoiled(spoiled, value_and_gradients)


@pytest.mark.slow
def test_heads_in_turns(monkeypatch):
    position, segment = packed(1, [100, 30], 140)
    places = position, position, segment, segment, None
    inputs = arrays(1, 140, 140, 4, 2, 64)
    with interpreted(monkeypatch):
        monkeypatch.setattr(tpu, "TURN_BYTES", 1)
        in_turns = value_and_gradients(*inputs, places)
    assert_as_defined(in_turns, by_the_definition(*inputs, places))


@pytest.mark.slow
def test_no_races(monkeypatch):
    """Among the copies that add to dq: more tiles than one, and a head alone in its group."""
    position, segment = packed(1, [256], 256)
    places = position, position, segment, segment, None
    inputs = arrays(1, 256, 256, 1, 1, 64)
    with interpreted(monkeypatch, detect_races=True):
        got = value_and_gradients(*inputs, places)
    assert not interpret_pallas_call.races.races_found
    assert_as_defined(got, by_the_definition(*inputs, places))


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_tiles_hold_everything_visible_and_claim_nothing_else(seed):
    """Random places, not even in order: what no tile holds is invisible, and a full tile is visible throughout."""
    rng = np.random.default_rng(seed)
    size, T, S, most = 4, 16, 24, rng.integers(1, 5)
    q_at, k_at = rng.integers(0, 6, (2, 3, T)), rng.integers(0, 6, (2, 2, S))
    q_at[:, 1:] = np.sort(rng.integers(0, most + 1, (2, 2, T)), 2)
    q_at[:, 2] = np.minimum(q_at[:, 1], q_at[:, 2])  # a prefix comes before what continues it
    k_at[:, 1] = np.sort(rng.integers(0, most + 1, (2, S)), 1)
    q_at[:, 0] = np.where(q_at[:, 1] == 0, -tpu.LATEST, q_at[:, 0])
    k_at[:, 0] = np.where(k_at[:, 1] == 0, tpu.LATEST, k_at[:, 0])
    q_position, q_segment, prefix = (z[:, :, None] for z in q_at.swapaxes(0, 1))
    k_position, k_segment = (z[:, None] for z in k_at.swapaxes(0, 1))
    see = ((k_segment == q_segment) | (k_segment == prefix)) & (k_position <= q_position)
    see = see.reshape(2, T // size, size, S // size, size).swapaxes(2, 3)
    for keys_first in (False, True):
        tiles, count = visible_tiles(jnp.asarray(q_at), jnp.asarray(k_at), size, size, keys_first=keys_first)
        row, i, j, flags = (np.asarray(z)[: int(count)] for z in tiles)
        assert len({*zip(row, i, j, strict=True)}) == count
        held = np.zeros(see.shape[:3], bool)
        held[row, i, j] = True
        assert not see[~held].any()
        assert see[row, i, j][flags & tpu.FULL != 0].all()
        output = list(zip(row, j if keys_first else i, strict=True))
        assert output == sorted(output)
        assert (flags & tpu.FIRST != 0).tolist() == [n == 0 or output[n] != output[n - 1] for n in range(len(output))]
        assert (flags & tpu.LAST != 0).tolist() == [
            o != after for o, after in zip(output, [*output[1:], None], strict=True)
        ]
        assert set(output) == set(np.ndindex(2, (S if keys_first else T) // size))
        fresh = flags & tpu.FRESH != 0
        assert {*zip(row[fresh], i[fresh], strict=True)} == set(np.ndindex(2, T // size))
        assert fresh.sum() == 2 * T // size


def test_what_it_refuses():
    q, k, v, _ = arrays(1, 16, 16, 2, 1, 32)
    assert "head dim 32" in tpu.refusal("attention", q, k, v)
    q, k, v, _ = arrays(1, 4, 16, 2, 1, 64)
    assert "4 queries" in tpu.refusal("attention", q, k, v)
    with pytest.raises(NotImplementedError, match="None takes one that can"):
        value_and_gradients(q, k, v, q, [jnp.ones((1, n), "int32") for n in (4, 16, 4, 16, 4)])
