import numpy as np
import pytest

from glm_jax.config import ConfigError, Stage
from glm_jax.data import mixture
from glm_jax.data.document import DataError

EPOCHS = (0.0, 1.0, 3.2)


def _pool(seed=0, documents=300):
    random = np.random.default_rng(seed)
    domains = [("general", "code", "math")[i] for i in random.integers(0, 3, documents)]
    tokens = random.integers(10, 2000, documents).astype(np.int64)
    return mixture.Pool(
        [f"{i:04}" for i in range(documents)], domains, random.integers(0, 3, documents).tolist(), tokens
    )


def _stage(tokens, mixture=None, **fields):
    return Stage("s", tokens, 128, 1e4, 1, mixture=mixture or {}, **fields)


def _tokens(pool, found, **where):
    keep = [all(getattr(pool, key)[i] == value for key, value in where.items()) for i in found[:, 0]]
    return int(found[keep, 2].sum())


@pytest.mark.parametrize("tokens", [20_000, 128_000, 1_280_000])
def test_domains_get_their_shares_and_buckets_their_epochs(tokens):
    pool, shares = _pool(), {"general": 0.5, "code": 0.3, "math": 0.2}
    stage = _stage(tokens, shares)
    found = mixture.instances(pool, mixture.epochs(pool, stage, EPOCHS), 0, "s")
    needed = -(-tokens // 128) * 128 + 2
    assert needed <= found[:, 2].sum() <= needed + 9  # one token for each bucket at most
    for name, share in shares.items():
        assert abs(_tokens(pool, found, domains=name) - share * needed) <= 3
        size = {
            b: sum(t for t, d, k in zip(pool.tokens, pool.domains, pool.buckets, strict=True) if (d, k) == (name, b))
            for b in range(3)
        }
        rate = {b: _tokens(pool, found, domains=name, buckets=b) / size[b] for b in range(3)}
        assert rate[0] == 0
        assert rate[2] / rate[1] == pytest.approx(3.2, rel=0.01)


def test_a_document_is_read_whole_in_each_pass_but_the_sampled_one():
    pool = _pool()
    found = mixture.instances(pool, mixture.epochs(pool, _stage(600_000), EPOCHS), 0, "s")
    assert len({(d, k) for d, k, _ in found.tolist()}) == len(found)
    assert (found[:, 2] < pool.tokens[found[:, 0]]).sum() <= 6  # domains times buckets that are read


def test_a_bucket_at_3_2_epochs_is_read_three_or_four_times_and_3_2_on_average():
    tokens = np.random.default_rng(0).lognormal(6, 1.2, 1000).astype(np.int64) + 1
    pool = mixture.Pool([f"{i:04}" for i in range(1000)], ["code"] * 1000, [0] * 1000, tokens)
    found = mixture.instances(pool, np.full(1000, 3.2), 0, "s")
    times = np.bincount(found[:, 0], minlength=1000)
    assert set(times.tolist()) == {3, 4}
    assert found[:, 2].sum() == np.ceil(3.2 * tokens.sum())
    # of the documents a fifth within a few standard errors: the quota is of tokens
    assert abs(times.mean() - 3.2) < 4 * 0.4 / np.sqrt(1000)


def test_order_is_a_pure_function_of_the_seed():
    pool = _pool()
    wanted = mixture.epochs(pool, _stage(100_000), EPOCHS)
    first, again, other = (mixture.instances(pool, wanted, seed, "s") for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_long_documents_count_twice_where_a_stage_wants_them():
    pool = mixture.Pool(["a", "b"], ["code", "code"], [0, 0], np.array([100, 10], np.int64))
    plain, long = (mixture.epochs(pool, _stage(100_000, long_documents=flag), (1.0,)) for flag in (False, True))
    assert plain[0] == plain[1]
    assert long[0] == 2 * long[1]


def test_a_domain_without_documents_and_an_unknown_one_are_refused():
    pool = mixture.Pool(["a"], ["code"], [0], np.array([100]))
    with pytest.raises(DataError, match="no document of it"):
        mixture.epochs(pool, _stage(1000, {"math": 1.0}), (1.0,))
    with pytest.raises(ConfigError, match="did you mean 'math'"):
        mixture.epochs(pool, _stage(1000, {"maths": 1.0}), (1.0,))
