"""RL on eight fake devices against one: the same draws in a session of two turns, the same policy step. In a process of its
own."""

import itertools
import math

import fake_devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest

BEGINNING = [21, 22, 23, 24]  # of all rows, and so kept once
OWN = [[1, 2, 3], [1, 2, 3], [4], [1, 2, 3], [5, 6, *range(30, 40)]]
TURNS = [[[*BEGINNING, *ids] for ids in OWN] * 2, [[7], [8, 9], [], [10], [11, 12, 13]] * 2]


@pytest.mark.slow
def test_eight_devices_sample_and_learn_as_one():
    fake_devices.run(__file__)


def on(in_8_bits: bool = False, **sizes: int):
    """(ids and log-probabilities of each turn, metrics of two policy steps on them) over a mesh."""
    from glm_jax import config, losses, mesh, model
    from glm_jax.optim import optimizer
    from glm_jax.sample import engine
    from glm_jax.sample.engine import Sampling, Session
    from glm_jax.sample.weights import prepare
    from glm_jax.train import state
    from glm_jax.train.step import Knobs, train_step

    cfg = config.Model(
        V=64, D=32, L=2, dense_layers=1, N=4, K=2, H=8, F=32, M=16, E=8, A=2, mtp_layers=0, init_std=0.2,
        dtype="float32", max_positions=64,
    )  # fmt: skip
    tx = optimizer(config.Optim(name="adamw"), model.specs(cfg))
    here = mesh.make(config.Mesh(**sizes), jax.devices()[: math.prod(sizes.values())])
    with jax.set_mesh(here):
        now = state.create(cfg, tx, 0)
        rows = len(TURNS[0])
        session = Session(cfg, prepare(cfg, now.params, in_8_bits), now.router_bias_LE, range(rows), 32)
        engine.SHARED_TOKENS = len(BEGINNING)
        said = [session.turn(given, Sampling(max_new_tokens=6, seed=3)) for given in TURNS]
        assert session._cache is not None and session._cache.shared_tokens == len(BEGINNING)
        batch = as_batch(said, session.experts(), rows=16, length=32)
        batch = {name: jax.device_put(z[None], mesh.batch_sharding(here)) for name, z in batch.items()}
        knobs = Knobs(*(jnp.float32(value) for value in (1e-3, 0, 0)), microbatches=jnp.int32(1))
        told = []
        for _ in range(2):
            now, metrics = train_step(now, batch, knobs, cfg=cfg, tx=tx, policy=losses.Policy())
            told.append({name: np.asarray(z) for name, z in metrics.items()})
    drawn = [[(done.ids, done.logprobs) if done else None for done in turn] for turn in said]
    return drawn, told


def as_batch(said, experts: list[np.ndarray], rows: int, length: int) -> dict[str, np.ndarray]:
    """Every row of the session as a row of its own; advantages alternate."""
    ints = {name: np.zeros((rows, length), np.int32) for name in ("ids", "targets", "positions", "segments")}
    batch = ints | {name: np.zeros((rows, length), np.float32) for name in ("weights", "advantages", "old_log_probs")}
    batch["experts"] = np.full((rows, length, *experts[0].shape[1:]), -1, np.int16)
    for row in range(len(said[0])):
        ids, old = [], []
        for given, turn in zip(TURNS, said, strict=True):
            done = turn[row]
            if done is not None:
                ids += [*given[row], *done.ids]
                old += [*[0.0] * len(given[row]), *done.logprobs]
        count = len(ids)
        batch["ids"][row, :count], batch["targets"][row, : count - 1] = ids, ids[1:]
        batch["positions"][row, :count], batch["segments"][row, :count] = np.arange(count), 1
        batch["old_log_probs"][row, : count - 1] = old[1:]
        batch["weights"][row, : count - 1] = np.array(old[1:]) != 0
        assert len(experts[row]) == count - 1
        batch["experts"][row, : count - 1] = experts[row]
        batch["advantages"][row] = (-1) ** row * batch["weights"][row]
    return batch


if __name__ == "__main__":
    (drawn, told), (drawn_by_8, told_by_8) = on(fsdp=1), on(fsdp=2, expert=2, tensor=2)
    for one, eight in zip(itertools.chain(*drawn), itertools.chain(*drawn_by_8), strict=True):
        assert (one is None) == (eight is None)
        if one:
            assert one[0] == eight[0]
            np.testing.assert_allclose(eight[1], one[1], atol=1e-5)  # float32 sums in another order
    for metrics, metrics_by_8 in zip(told, told_by_8, strict=True):
        for name in ("loss", "gradient_norm", "entropy_sum", "sampled_tokens", "load_LE"):
            np.testing.assert_allclose(metrics_by_8[name], metrics[name], rtol=1e-4, atol=1e-6, err_msg=name)
    for first in (told[0], told_by_8[0]):  # sampler and trainer agree on either mesh
        assert first["mismatch_max"] <= 5e-5 and first["mismatch_sum"] / first["sampled_tokens"] <= 5e-6
        assert first["k3_sum"] / first["sampled_tokens"] <= 1e-10 and first["clipped_sum"] == 0
    (drawn, told_in_8), (drawn_by_8, told_in_8_by_8) = on(True, fsdp=1), on(True, fsdp=2, expert=4)
    for one, eight in zip(drawn[0], drawn_by_8[0], strict=True):
        # a number next to the middle of two may be rounded to either
        np.testing.assert_allclose(eight[1][:1], one[1][:1], atol=0.02)
    one, eight = (first["mismatch_sum"] / first["sampled_tokens"] for (first, *_) in (told_in_8, told_in_8_by_8))
    np.testing.assert_allclose(eight, one, rtol=0.05)
    assert 1e-3 < one < 0.3
    assert told[1]["loss"] < told[0]["loss"] - 1e-3 and told[1]["mismatch_max"] > 1e-3, told  # and the step moved it
