"""Post-training as a list of parts: which, in what order, and that what is there is not made again."""

from experiments import posttrain, recipes
from glm_jax.config import replace


def names(run, folder):
    return [done for done, _ in posttrain.parts(run, folder)]


def test_experts_come_first_and_the_unified_model_is_scored_in_both_modes(tmp_path):
    found = names(recipes.get("tiny"), tmp_path)
    assert len(set(found)) == len(found)
    order = [name for name in found if name.endswith("result.json")]
    assert order[:3] == ["reasoning/sft/result.json", "reasoning/rl/result.json", "reasoning/control/result.json"]
    assert order[-2:] == ["unified/sft/result.json", "unified/rl/result.json"]
    assert {"scores/unified-rl.chat.1.thinking.json", "scores/unified-rl.chat.1.direct.json"} <= {*found}
    assert "scores/agent-control.agent.2.thinking.json" in found


def test_a_second_round_stands_between_an_expert_and_unification(tmp_path):
    run = replace(recipes.get("tiny"), **{"post.self_distillation": True})
    found = names(run, tmp_path)
    again = ["agent/sft2/result.json", "agent/rl2/result.json", "scores/agent-rl2.agent.2.thinking.json"]
    places = [found.index(name) for name in ["agent/rl/result.json", *again, "unified/sft/result.json"]]
    assert places == sorted(places)
    assert {*names(recipes.get("tiny"), tmp_path)} < {*found}


def test_no_experts_no_parts(tmp_path):
    assert names(replace(recipes.get("tiny"), **{"post.experts": ()}), tmp_path) == []
