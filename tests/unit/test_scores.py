"""Scores: their statistics against known numbers, and `measure` with a model whose answers are known."""

import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import evaluate, recipes
from glm_jax import model
from glm_jax.config import GRPO, ConfigError, Expert, Model, Stage, replace
from glm_jax.envs import get
from glm_jax.evals import scores
from glm_jax.rl.curriculum import held_out
from glm_jax.rl.rollout import Policy
from glm_jax.sample.engine import Sampling
from glm_jax.text import tokenizer as bpe
from glm_jax.train import checkpoint
from glm_jax.train.state import State

V = 384
CFG = Model(
    V=V, D=V, L=1, dense_layers=0, N=2, K=1, H=8, F=16, M=8, E=4, A=2, max_positions=1024, rope_theta=1e4,
    dtype="float32", remat="none", mtp_layers=0,
)  # fmt: skip
CERTAIN = 20.0  # logits differ by 20 sqrt(D)


@pytest.fixture(scope="module")
def tokenizer():
    return bpe.train(["some letters to count"] * 3, V)


@pytest.fixture(scope="module")
def weights(tokenizer):
    """A model that knows which token follows which: it thinks "a", answers 1 or 2, as likely as not, and ends its turn."""
    id_of = {name: tokenizer.encode(name)[0] for name in ("\n", "a", "1", "2")}
    id_of |= {name: tokenizer.id(name) for name in bpe.SPECIAL_TOKENS}
    head_DV = np.zeros((V, V), np.float32)
    for token, after in itertools.pairwise(("<|assistant|>", "\n", "<think>", "a", "</think>", "1")):
        head_DV[id_of[token], id_of[after]] = CERTAIN
    head_DV[id_of["</think>"], id_of["2"]] = CERTAIN
    head_DV[[id_of["1"], id_of["2"]], id_of["<|user|>"]] = CERTAIN
    params = jax.tree.map(lambda spec: jnp.full(spec.shape, float(spec.kind == "norm")), model.specs(CFG))
    params = dataclasses.replace(params, embed_VD=jnp.eye(V), head_DV=jnp.asarray(head_DV))
    return params, jnp.zeros((CFG.router_rows, CFG.E))


@pytest.fixture(scope="module")
def policy(weights, tokenizer):
    params, router_bias_LE = weights
    return Policy(CFG, params, router_bias_LE, tokenizer)


def measured(policy, thinking=True, **changes):
    how = Sampling(**{"max_new_tokens": 8, "seed": 1, **changes})
    return scores.measure(policy, "reasoning", 1, tasks=24, answers=8, how=how, tokens=256, thinking=thinking)


def worth(task, content):
    """What the environment gives for `content`, whoever says it."""
    message = {"reasoning_content": "a", "content": content, "tool_calls": [], "status": "ok"}
    return get("reasoning").start(task).step(message).reward


def test_every_answer_is_scored_with_its_own_task(policy):
    found = measured(policy)
    assert json.loads(json.dumps(found)) == found
    earned = []
    for task, row in zip(held_out("reasoning", 1, 24), found["tasks"], strict=True):
        assert (row["seed"], row["kind"], len(row["rewards"])) == (task.seed, task.kind, 8)
        possible = {worth(task, "1"), worth(task, "2")}
        assert set(row["rewards"]) <= possible
        earned += row["rewards"] if 1 in possible else []
    assert len(earned) >= 24 and 0.2 < np.mean(earned) < 0.8  # one of two answers is right: 0.5 +- 0.1 of 24
    rewards = [reward for row in found["tasks"] for reward in row["rewards"]]
    assert sum(found["reasons"].values()) == len(rewards) == 192
    assert found["reasons"]["solved"] == sum(rewards) and found["reasons"]["wrong"] == 192 - sum(rewards)
    assert (found["wellformed"], found["thought"], found["length"]) == (1, 1, 6)
    assert measured(policy) == found
    assert measured(policy, seed=2)["tasks"] != found["tasks"]


def test_direct_answers_have_no_thought(policy):
    found = measured(policy, thinking=False, temperature=0)
    assert (found["mode"], found["wellformed"], found["thought"], found["length"]) == ("direct", 1, 0, 2)


def test_answers_without_an_end_are_not_well_formed(policy):
    found = measured(policy, max_new_tokens=3)
    assert found["reasons"] == {"too long": 192} and found["wellformed"] == 0


def test_samples_are_whole_dialogues_right_and_wrong(policy):
    samples = measured(policy)["samples"]
    assert {(s["kind"], s["reward"]) for s in samples} >= {("count", 1), ("count", 0)}
    for sample in samples:
        assert [message["role"] for message in sample["messages"]] == ["user", "assistant"]
        assert sample["messages"][-1]["content"] in "12" and sample["messages"][-1]["reasoning_content"] == "a"
        assert (sample["reason"] == "solved") == (sample["reward"] == 1)


def made_up(rewards, level=1, checkpoint="reasoning-rl"):
    tasks = [{"seed": 10 + i, "kind": "sum", "rewards": list(row)} for i, row in enumerate(rewards)]
    about = {"checkpoint": checkpoint, "domain": "reasoning", "level": level, "mode": "thinking"}
    return {**about, "answers": len(rewards[0]), "tasks": tasks}


def test_standard_error_is_over_tasks():
    # task means 1, 0.5, 0: mean 0.5, sample variance 0.25
    assert scores.pass_at_1(made_up([[1, 1], [1, 0], [0, 0]])) == pytest.approx((0.5, math.sqrt(0.25 / 3)))
    # answers that agree say no more than one of them
    assert scores.pass_at_1(made_up([[1] * 4, [0] * 4])) == pytest.approx(scores.pass_at_1(made_up([[1], [0]])))


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer():
    rewards = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0] * 5, [1] * 5, [1, 1, 1, 1, 0]]
    for k in range(1, 6):
        shares = [np.mean([max(subset) for subset in itertools.combinations(row, k)]) for row in rewards]
        assert scores.pass_at_k(made_up(rewards), k) == pytest.approx(np.mean(shares))
    assert scores.pass_at_k(made_up(rewards), 1) == pytest.approx(scores.pass_at_1(made_up(rewards))[0])
    for k in (0, 6):
        with pytest.raises(ConfigError, match=rf"pass@{k} of 5 answers"):
            scores.pass_at_k(made_up(rewards), k)


def test_difference_is_paired_by_task():
    before, after = made_up([[0, 0], [1, 0], [1, 1]]), made_up([[1, 0], [1, 1], [1, 1]])
    assert scores.difference(after, before) == pytest.approx((1 / 3, np.std([0.5, 0.5, 0], ddof=1) / math.sqrt(3)))
    same = {**before, "tasks": before["tasks"][::-1]}
    assert scores.difference(same, before) == (0, 0)  # whatever their order: without error, as unpaired it would not be


def test_scores_of_other_tasks_cannot_be_compared():
    before = made_up([[0], [1], [1]])
    with pytest.raises(ConfigError, match=r"reasoning-rl.reasoning.1.thinking has 2 tasks .* 3, 2 of them the same"):
        scores.difference(made_up([[0], [1]]), before)
    with pytest.raises(ConfigError, match="0 of them the same"):
        scores.difference(made_up([[0], [1], [1]], level=2), before)
    with pytest.raises(ConfigError, match=r"raise post.evaluation.tasks"):
        scores.pass_at_1(made_up([[1]]))


@pytest.fixture
def folder(tmp_path, weights, tokenizer):
    """RUN/reasoning/rl as experiments.grpo leaves it."""
    experts = tuple(Expert(d, grpo=GRPO(max_new_tokens=8, max_tokens=256, seq_len=256)) for d in ("reasoning", "chat"))
    stage = Stage("rl", 4096, 512, CFG.rope_theta, microbatch_rows=8)
    run = replace(
        recipes.get("smoke"),
        **{
            "schedule.batch_tokens": 4096, "schedule.batch_tokens_start": 4096,
            "model": CFG, "pretrain": (), "midtrain": (stage,), "post.experts": experts, "post.evaluation.tasks": 24,
            "post.evaluation.answers": 8,
        },
    )  # fmt: skip
    (tmp_path / "data").mkdir()
    tokenizer.save(tmp_path / "data" / "tokenizer.json")
    out = tmp_path / "run" / "reasoning" / "rl"
    checkpoint.save_run(out, run, "rl", tmp_path / "data")
    params, router_bias_LE = weights
    state = State(jnp.int32(3), params, router_bias_LE, optax.sgd(0.1).init(params))
    checkpoints = checkpoint.Checkpoints(out)
    checkpoints.save(3, state, {})
    checkpoints.wait()
    checkpoints.close()
    return out


@pytest.mark.slow
def test_a_checkpoint_is_scored_once(folder, policy):
    path = folder.parents[1] / "scores" / "reasoning-rl.reasoning.1.thinking.json"
    found = evaluate.score(folder, "reasoning", 1, True)
    assert checkpoint.read_json(path) == found
    assert found["tasks"] == measured(policy, seed=0)["tasks"] and found["checkpoint"] == "reasoning-rl"
    kept = {**found, "length": -1}
    checkpoint.write_json(path, kept)
    assert evaluate.score(folder, "reasoning", 1, True) == kept
    for spoilt in (json.dumps({**kept, "step": 2}), json.dumps({**kept, "tasks": kept["tasks"][:5]}), "{", "{}"):
        path.write_text(spoilt)
        assert evaluate.score(folder, "reasoning", 1, True) == found
    assert evaluate.score(folder, "reasoning", 1, True, out=folder)["tasks"] == found["tasks"]
    assert (folder / path.name).exists()
    with pytest.raises(ConfigError, match=r"no expert for domain 'chatt' in this run; did you mean 'chat'"):
        evaluate.score(folder, "chatt", 1, True)


@pytest.mark.slow
def test_the_command_prints_scores_of_an_expert(folder, capsys, tmp_path):
    out = tmp_path / "figures.json"
    evaluate.main(evaluate.Args(folder, level=(1,), mode=("thinking", "direct"), out=out))
    table = capsys.readouterr().out
    figures = checkpoint.read_json(out)
    kept = sorted(path.name for path in (folder.parents[1] / "scores").iterdir())
    assert kept == ["reasoning-rl.reasoning.1.direct.json", "reasoning-rl.reasoning.1.thinking.json"]
    for row, mode in zip(figures["scores"], ("thinking", "direct"), strict=True):
        assert (row["domain"], row["level"], row["mode"]) == ("reasoning", 1, mode)
        line = next(line for line in table.splitlines() if line.split()[:3] == ["reasoning", "1", mode])
        assert f"{row['pass@1']:.3f} ± {row['stderr']:.3f}" in line and f"{row['pass@2']:.3f}" in line
        assert row["pass@2"] >= row["pass@1"]
    evaluate.main(evaluate.Args(folder, level=(2,), tasks=3, answers=6, out=out))
    assert "pass@2    pass@4    pass@6" in capsys.readouterr().out
    assert len(checkpoint.read_json(out)["scores"][0]["tasks"]) == 3
    assert sorted(path.name for path in (folder.parents[1] / "scores").iterdir()) == kept


def test_documents_and_tasks_are_not_mixed_up(tmp_path):
    run = replace(recipes.get("smoke"), **{"post.experts": (Expert("reasoning"),)})
    checkpoint.save_run(tmp_path / "stage1", run, "stage1", tmp_path / "data")
    with pytest.raises(ConfigError, match=r"--domain, --tasks: .*stage1 is a pre-training stage"):
        evaluate.main(evaluate.Args(tmp_path / "stage1", domain=("reasoning",), tasks=3))
