"""Post-training as jobs: which, what they need, and in what order their parts stand."""

import json

import pytest

from experiments import grpo, midtrain, posttrain, pretrain, recipes, sft, unify
from glm_jax import envs
from glm_jax.config import ConfigError, Evaluation, Unify, replace
from glm_jax.envs.reasoning import Reasoning
from glm_jax.text.chat import render
from glm_jax.text.tokenizer import train
from glm_jax.train import checkpoint


def names(run, folder):
    return [done for job in posttrain.plan(run, folder) for done, _ in job.parts]


@pytest.mark.parametrize("recipe", ["tiny", "smoke"])
def test_experts_come_first_and_the_unified_model_is_scored_in_both_modes(tmp_path, recipe):
    run = recipes.get(recipe)
    assert isinstance(run.post.unify, Unify) and isinstance(run.post.evaluation, Evaluation)
    assert run.post.self_distillation is False
    found = names(run, tmp_path)
    assert len(set(found)) == len(found)
    order = [name for name in found if name.endswith("result.json")]
    assert order[:2] == ["reasoning/sft/result.json", "reasoning/rl/result.json"]
    assert "reasoning/control/result.json" in order
    assert order[-2:] == ["unified/sft/result.json", "unified/rl/result.json"]
    assert {"scores/unified-rl.chat.1.thinking.json", "scores/unified-rl.chat.1.direct.json"} <= {*found}
    assert "scores/agent-control.agent.2.thinking.json" in found


def test_an_experts_jobs_need_the_base_and_unification_needs_the_experts(tmp_path):
    plan = {job.name: job for job in posttrain.plan(recipes.get("tiny"), tmp_path, needs=("base",))}
    experts = ("reasoning", "agent", "chat")
    assert all(plan[name].needs == ("base",) and not plan[name].whole for name in experts)
    assert all(plan[f"{name} {job}"].needs == (name,) for name in experts for job in ("scores", "control"))
    assert plan["unified"].needs == experts and plan["unified"].whole
    assert plan["unified rl scores"].needs == ("unified",)


def test_no_answers_are_asked_for_once_they_have_been_taught(tmp_path):
    assert "unified/answers/chat.json" in names(recipes.get("tiny"), tmp_path)
    (tmp_path / "unified" / "sft").mkdir(parents=True)
    (tmp_path / "unified" / "sft" / "result.json").write_text("{}")
    assert "unified/answers/chat.json" not in names(recipes.get("tiny"), tmp_path)


def test_answers_of_another_expert_are_refused(tmp_path):
    run = replace(recipes.get("tiny"), **{"post.experts": recipes.get("tiny").post.experts[:1]})
    (tmp_path / "reasoning" / "rl").mkdir(parents=True)
    (tmp_path / "reasoning" / "rl" / "result.json").write_text("{}")
    answers = {"from": "rl", "expert": "another", "accepted": 0, "answers": 0, "reasons": {}, "dialogues": []}
    checkpoint.write_json(tmp_path / "unified" / "answers" / "reasoning.json", answers)
    with pytest.raises(
        ConfigError, match=r"answers/reasoning.json is of another expert than reasoning now is; delete it"
    ):
        unify.fine_tune(run, tmp_path)


def test_nothing_is_asked_of_an_expert_whose_rl_has_not_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(unify, "answers", lambda *_: pytest.fail("sampled first"))
    with pytest.raises(ConfigError, match=r"reasoning/rl has no result\.json: its RL has not ended"):
        unify.ask(recipes.get("tiny"), recipes.get("tiny").post.experts[0], tmp_path)


def test_rl_does_not_begin_with_a_model_that_has_not_been_fine_tuned(tmp_path):
    with pytest.raises(
        ConfigError, match=r"agent/sft holds no checkpoint .*; run experiments\.sft --from .* --domain agent"
    ):
        grpo.main(grpo.Args(tmp_path, "agent"), recipes.get("tiny"))


def test_rl_does_not_begin_with_a_model_that_is_being_fine_tuned(tmp_path):
    run, folder = recipes.get("tiny"), tmp_path / "agent" / "sft"
    checkpoint.save_run(folder, run, "sft", tmp_path)
    (folder / "checkpoints" / "4").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"agent/sft has not ended; run its experiments\.sft again"):
        grpo.main(grpo.Args(tmp_path, "agent"), run)


def test_mid_training_passes_over_what_has_ended_on_its_way_to_another_stage(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(pretrain, "train", lambda run, stage, out, start, data: trained.append(stage.name))
    run = recipes.get("glm45")
    names = [stage.name for stage in run.midtrain]
    for ended in range(len(names)):
        midtrain.main(midtrain.Args(tmp_path), run)
        assert trained == names[ended:]
        trained.clear()
        (tmp_path / names[ended]).mkdir()
        checkpoint.write_json(tmp_path / names[ended] / "result.json", {})
    midtrain.main(midtrain.Args(tmp_path), run)  # each checks its settings
    assert trained == names


def test_fine_tuning_is_checkpointed_as_often_as_its_run():
    run = replace(recipes.get("tiny"), **{"loop.checkpoint_every": 7})
    assert sft.as_stage(run, run.post.unify.sft, 100, 1e6)[0].loop.checkpoint_every == 7


ASKED, SAID = {"role": "user", "content": "Where\u2028is it?"}, {"role": "assistant", "content": "Here."}


@pytest.fixture(scope="module")
def tokenizer():
    return train([render([ASKED, SAID])], 512)


def test_dialogues_are_read_line_by_line_whatever_ends_a_line_within_them(tmp_path, tokenizer):
    lines = [{"messages": [ASKED, SAID]}, {"messages": [ASKED, SAID], "enable_thinking": False}]
    (tmp_path / "my.jsonl").write_text(
        "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8"
    )
    found = sft.read(tmp_path / "my.jsonl", tokenizer)
    assert [(dialogue.messages, dialogue.enable_thinking) for dialogue in found] == [
        ((ASKED, SAID), True),
        ((ASKED, SAID), False),
    ]
    assert found[1].ids and found[1].trained and found[1].ids != found[0].ids


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "Expecting property name"),
        ("[1]", "is no dialogue; a line is"),
        ('{"messages": null}', "is no dialogue; a line is"),
        ('{"messages": [], "tools": 5}', "is no dialogue; a line is"),
        ('{"messages": [], "enable_thinking": "false"}', "is no dialogue; a line is"),
        ('{"messages": [{"role": "human", "content": "x"}]}', "role='human'"),
        ('{"messages": [7]}', r"messages\[0\]"),
        ('{"messages": [{"role": "assistant", "tool_calls": 5}]}', r"messages\[0\] has tool_calls=5"),
    ],
)
def test_a_line_that_is_no_dialogue_is_named(tmp_path, tokenizer, line, told):
    (tmp_path / "my.jsonl").write_text(json.dumps({"messages": [ASKED, SAID]}) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"my\.jsonl, line 2: .*{told}"):
        sft.read(tmp_path / "my.jsonl", tokenizer)


def test_a_second_round_stands_between_an_expert_and_unification(tmp_path):
    run = replace(recipes.get("tiny"), **{"post.self_distillation": True})
    found = names(run, tmp_path)
    again = ["agent/sft2/result.json", "agent/rl2/result.json", "scores/agent-rl2.agent.2.thinking.json"]
    places = [found.index(name) for name in ["agent/rl/result.json", *again, "unified/sft/result.json"]]
    assert places == sorted(places)
    assert {*names(recipes.get("tiny"), tmp_path)} < {*found}


def test_no_experts_no_parts(tmp_path):
    assert names(replace(recipes.get("tiny"), **{"post.experts": ()}), tmp_path) == []


def test_slips_are_asked_only_of_environments_that_have_them(monkeypatch, tmp_path):
    class Flawless(Reasoning):
        slip = envs.Environment.slip

    run = recipes.get("tiny")
    monkeypatch.setitem(envs.ENVIRONMENTS, "reasoning", Flawless())
    with pytest.raises(ConfigError, match=r"slips=0.3, but environment reasoning has no slip"):
        names(run, tmp_path)
    sft.check_slips(replace(run.post.experts[0], **{"sft.slips": 0.0}))
    with pytest.raises(ConfigError, match="its teachers are the experts"):
        replace(run, **{"post.unify.sft.slips": 0.1})


def test_an_expert_without_prompts_is_refused():
    with pytest.raises(ConfigError, match=r"unify_share=0.0 of expert chat must be positive"):
        replace(recipes.get("tiny"), **{"post.experts.2.unify_share": 0.0})
