"""Advantages, batches and problems over whatever rewards, answers and interruptions may come."""

import json
from collections import Counter
from itertools import chain

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.config import GRPO
from glm_jax.envs import ENVIRONMENTS, split
from glm_jax.rl.advantages import advantages, varies
from glm_jax.rl.batch import microbatches
from glm_jax.rl.curriculum import Problems
from glm_jax.rl.sample import Sample

END = 0
ROOM = {"max_new_tokens": 20, "max_tokens": 40}
TASK = ENVIRONMENTS["agent"].task(0, 1)
rewards = st.lists(st.sampled_from([0.0, 1.0]) | st.floats(-100, 100), min_size=2, max_size=16)
tokens = st.lists(st.integers(1, 50), min_size=1, max_size=6)
stretches = st.lists(st.tuples(tokens, tokens), max_size=2)  # a tool's result, and the turn after it


@st.composite
def groups(draw) -> list[list[Sample]]:
    """Groups of answers in turns, each token drawn with a log-probability of its own."""
    counter = 0
    made = []
    for _ in range(draw(st.integers(1, 4))):
        prompt, group = draw(tokens), []
        for _ in range(draw(st.integers(2, 4))):
            sample = Sample(TASK)
            sample.give(prompt)
            for result, turn in [([], draw(tokens)), *draw(stretches)]:
                sample.give(result)
                sample.draw(turn, [-(counter + i + 1) / 1024 for i in range(len(turn))])
                counter += len(turn)
            sample.end(draw(st.sampled_from([0.0, 1.0])), "over")
            group.append(sample)
        made.append(group)
    return made


@given(rewards)
def test_advantages_sum_to_zero_and_keep_the_order(given_rewards):
    worth = advantages(given_rewards).astype(np.float64)
    assert abs(worth.sum()) <= 1e-5 * max(1, np.abs(given_rewards).sum())  # float32
    order = np.argsort(given_rewards, kind="stable")
    assert (np.diff(worth[order]) >= 0).all()
    scaled = advantages(given_rewards, std_normalize=True).astype(np.float64)
    assert abs(scaled.sum()) <= 1e-4 and scaled.std() <= 1 + 1e-5
    if np.std(given_rewards) > 0.01:
        assert abs(scaled.std() - 1) < 1e-3


@given(st.floats(-100, 100), st.integers(2, 16))
def test_equal_rewards_teach_nothing(reward, count):
    group = [Sample(TASK, reward=reward) for _ in range(count)]
    assert not varies(group)
    assert np.abs(advantages([reward] * count)).max() < 1e-12  # what a mean of equal doubles may be off by


@given(groups(), st.integers(40, 80), st.integers(1, 3), st.sampled_from(["token", "sequence"]))
@settings(deadline=None)
def test_every_drawn_token_is_trained_exactly_once_with_what_belongs_to_it(made, seq_len, rows, aggregate):
    how = GRPO(**ROOM, seq_len=seq_len, microbatch_rows=rows, aggregate=aggregate)
    batches = microbatches(made, how, END)
    assert all(z.shape == (rows, seq_len) for batch in batches for z in batch.values())
    flat = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    trained = flat["weights"] != 0
    found = Counter(
        zip(
            *(flat[name][trained].tolist() for name in ("old_log_probs", "targets", "advantages", "weights")),
            strict=True,
        )
    )
    expected = Counter()
    for group in made:
        for sample, worth in zip(group, advantages([s.reward for s in group]), strict=True):
            weight = np.float32(1 if aggregate == "token" else 1 / sample.drawn)
            expected.update(
                (float(np.float32(log_prob)), token, float(worth), float(weight))
                for token, log_prob, drawn in zip(sample.ids, sample.log_probs, sample.sampled, strict=True)
                if drawn
            )
    assert found == expected and set(found.values()) == {1}
    total = sum(s.drawn for s in chain(*made)) if aggregate == "token" else sum(map(len, made))
    np.testing.assert_allclose(flat["weights"].sum(), total, rtol=1e-5)
    assert not (flat["advantages"][~trained].any() or flat["old_log_probs"][~trained].any())


@given(groups(), st.integers(40, 80))
@settings(deadline=None)
def test_before_every_trained_token_stands_its_own_answer(made, seq_len):
    """What a trained position can look at, by segments, prefixes and positions, is the answer so far and no more."""
    known = {}
    for sample in chain(*made):
        for place, log_prob in enumerate(sample.log_probs):
            if log_prob:
                known[float(np.float32(log_prob))] = sample.ids[:place]
    for batch in microbatches(made, GRPO(**ROOM, seq_len=seq_len, microbatch_rows=2), END):
        for row in range(2):
            ids, where, segments, prefixes = (batch[name][row] for name in ("ids", "positions", "segments", "prefixes"))
            for at in np.flatnonzero(batch["weights"][row]):
                seen = ((segments == segments[at]) | (segments == prefixes[at])) & (where <= where[at])
                order = np.argsort(where[seen], kind="stable")
                assert where[seen][order].tolist() == list(range(where[at] + 1))
                assert ids[seen][order].tolist() == known[float(batch["old_log_probs"][row, at])]


sources = st.lists(
    st.tuples(st.sampled_from(["agent", "chat"]), st.integers(1, 3)), min_size=1, max_size=3, unique=True
)


@given(sources, st.integers(0, 10**9), st.lists(st.integers(0, 5), max_size=4), st.integers(1, 4), st.booleans())
@settings(deadline=None)
def test_problems_interrupted_anywhere_go_on_alike(chosen, first_seed, takes, later, pooled):
    problems = Problems(chosen, first_seed, most_unsolved=5)
    given_out = [task for count in takes for task in problems.take(count)]
    problems.learn([[Sample(task)] for task in given_out])
    if pooled:
        problems.pool = problems.unsolved[:]
        problems.take(1)
    other = Problems([("chat", 1)])
    other.set_state(json.loads(json.dumps(problems.get_state())))
    assert other.take(later) == problems.take(later)
    assert other.get_state() == problems.get_state()
    assert not any(map(split.held_out, given_out))
    assert len({(task.env, task.level, task.seed) for task in given_out}) == len(given_out)
