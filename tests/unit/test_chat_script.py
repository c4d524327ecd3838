"""`experiments.chat` on checkpoints of a real, very small model that has learnt one answer by heart: "<think>hm</think>",
and on a line of its own "cup"."""

import dataclasses
import io
import json
import sys
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import chat, cli, convert, evaluate, posttrain, recipes, sft, unify
from glm_jax import config, model
from glm_jax.config import SFT, ConfigError, Expert, Posttrain
from glm_jax.data.dialogues import Dialogue, prepare
from glm_jax.rl import rollout
from glm_jax.sample import engine
from glm_jax.text import tokenizer as tokenizers
from glm_jax.text.chat import render_tokens
from glm_jax.train import checkpoint
from glm_jax.train.state import State

CFG = config.Model(
    V=384, D=16, L=1, dense_layers=0, N=2, K=1, H=8, F=16, M=8, E=2, A=1, mtp_layers=0, max_positions=1024,
    rope_theta=1e4, dtype="float32", remat="none",
)  # fmt: skip
SAID = {"role": "assistant", "reasoning_content": "hm", "content": "cup"}
SCRIPT = ("<|assistant|>", "<think>", "hm", "</think>", "\n", "cup", "<|user|>")
OPTIONS = ("--temperature", "0", "--max_new_tokens", "16")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A run's folder with a pre-trained and a post-trained model in it."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    tokenizer = tokenizers.train(["hm", "cup"] * 500, CFG.V)
    asked = ({"role": "user", "content": "Where is it?"}, SAID)
    prepare(folder / "data", [Dialogue(asked)], tokenizer, "sft", 64)
    params = by_heart(tokenizer)
    run = config.replace(recipes.get("smoke"), model=CFG, post=Posttrain(experts=(Expert("reasoning"),)))
    after = None
    for stage, own, home in (
        ("stage1", run, folder / "stage1"),
        ("sft", sft.as_stage(run, SFT(seq_len=64), 64, 1e4)[0], folder / "unified" / "sft"),
    ):
        checkpoint.save_run(home, own, stage, folder / "data", after)
        checkpoints = checkpoint.Checkpoints(home)
        checkpoints.save(1, State(jnp.int32(1), params, model.router_bias(CFG), {}), {})
        checkpoints.close()
        after = home
    return folder


def by_heart(tokenizer) -> model.GLM:
    """Embedding and head spell each next token of the answer; the layers add noise."""
    noise = np.random.default_rng(0)
    params = jax.tree.map(
        lambda spec: jnp.asarray(0.02 * noise.normal(size=spec.shape) + (spec.kind == "norm"), jnp.float32),
        model.specs(CFG),
    )
    ids = [tokenizer.id(w) if w in tokenizers.SPECIAL_TOKENS else tokenizer.encode(w)[0] for w in SCRIPT]
    embed_VD, head_DV = np.array(params.embed_VD), np.array(params.head_DV)
    for place, (now, then) in enumerate(pairwise(ids)):
        embed_VD[now] = 3 * np.eye(CFG.D)[place]
        head_DV[place, then] += 3
    return dataclasses.replace(params, embed_VD=jnp.asarray(embed_VD), head_DV=jnp.asarray(head_DV))


def talk(*argv: object) -> None:
    chat.main(*cli.parse(chat.main, ["--checkpoint", *map(str, argv), *OPTIONS]))


@pytest.fixture
def typed(monkeypatch):
    """Type these bytes."""

    def type_in(text: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))

    return type_in


@pytest.fixture
def read(monkeypatch) -> list[list[int]]:
    """What the model was given to read, prompt by prompt."""
    prompts, generate = [], engine.generate

    def listening(cfg, params, router_bias_LE, given, **how):
        prompts.extend(given)
        return generate(cfg, params, router_bias_LE, given, **how)

    monkeypatch.setattr(engine, "generate", listening)
    return prompts


# ---- dialogue


def test_a_post_trained_run_thinks_and_answers(runs, capsys):
    talk(runs, "--prompt", "Where is it?")
    assert capsys.readouterr() == ("<think>hm</think>\ncup\n", "")


def test_it_answers_as_before_after_a_journey_through_hugging_faces_form(runs, tmp_path, capsys):
    convert.main(convert.Args(runs, tmp_path / "published"))
    convert.main(convert.Args(tmp_path / "published", tmp_path / "back"))
    capsys.readouterr()
    talk(tmp_path / "back", "--prompt", "Where is it?")
    assert capsys.readouterr() == ("<think>hm</think>\ncup\n", "")


@pytest.mark.slow
def test_a_published_model_learns_dialogues_of_ones_own_and_is_exported_again(runs, tmp_path, capsys):
    convert.main(convert.Args(runs, tmp_path / "published"))
    convert.main(convert.Args(tmp_path / "published", tmp_path / "run"))
    said = {"messages": [{"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "hm"}]}
    (tmp_path / "my.jsonl").write_text(10 * (json.dumps(said) + "\n"))
    small = {"seq_len": 64, "batch_rows": 1, "microbatch_rows": 1, "peak_lr": 0.1, "epochs": 10, "optim.name": "adamw"}
    options = [part for name, value in small.items() for part in (f"--post.unify.sft.{name}", str(value))]
    tune = ["--from", str(tmp_path / "run"), "--dialogues", str(tmp_path / "my.jsonl"), *options]
    (tmp_path / "run" / "published" / "hf" / "generation_config.json").write_text('{"temperature": 0.6}')
    sft.main(*cli.parse(sft.main, [*tune, "--out", str(tmp_path / "run" / "mine")]))
    capsys.readouterr()
    talk(tmp_path / "run" / "mine", "--prompt", "Where is it?", "--no_thinking")
    assert capsys.readouterr().out == "hm\n"
    with pytest.raises(ConfigError, match=r"mine was fine-tuned in a run without experts, .* stands in .*result\.json"):
        evaluate.main(evaluate.Args(tmp_path / "run" / "mine"))
    assert checkpoint.stage_folder(tmp_path / "run").name == "published"  # not what was fine-tuned beside it
    convert.main(convert.Args(tmp_path / "run" / "mine", tmp_path / "exported"))
    assert json.loads((tmp_path / "exported" / "generation_config.json").read_text()) == {"temperature": 0.6}
    convert.main(convert.Args(tmp_path / "exported", tmp_path / "back"))
    capsys.readouterr()
    talk(tmp_path / "back", "--prompt", "Where is it?")
    assert capsys.readouterr().out == "<think></think>\nhm\n"
    with pytest.raises(
        ConfigError, match=r"recipe 'published' has no experts to train; it has none: give a recipe post\.experts"
    ):
        posttrain.main(posttrain.Args(tmp_path / "run"), convert.described(CFG))
    with pytest.raises(ConfigError, match="recipe 'published' has no experts to unify"):
        unify.main(unify.Args(tmp_path / "run"), convert.described(CFG))
    with pytest.raises(ConfigError, match=r"published came without documents to measure it on; .* with --documents"):
        evaluate.main(evaluate.Args(tmp_path / "run" / "published"))


@pytest.mark.parametrize("flag", ["--no_thinking", "--no-thinking"])
def test_directly_it_answers_without_a_thought(runs, capsys, read, flag):
    talk(runs / "unified", "--prompt", "Where is it?", flag, "--system", "Be brief.")
    assert capsys.readouterr() == ("cup\n", "")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is it?"}]
    assert read == [render_tokens(rollout.load_policy(runs / "unified").tokenizer, messages, None, False).ids]


@pytest.mark.slow
def test_it_remembers_what_was_said_less_the_thoughts_until_an_empty_line(runs, capsys, read, typed):
    typed(b"One?\nTwo?\n\nThree?\n")
    talk(runs)
    told = capsys.readouterr()
    assert told.out == 3 * "<think>hm</think>\ncup\n" and told.err == "(a new dialogue)\n"
    tokenizer = rollout.load_policy(runs / "unified").tokenizer
    one, two, three = ({"role": "user", "content": text} for text in ("One?", "Two?", "Three?"))
    assert [read[0], read[2]] == [render_tokens(tokenizer, [message]).ids for message in (one, three)]
    sampled = tokenizer.encode("<think></think>\ncup", special=True)  # as sampled, less the thought: no line before it
    assert read[1] == [*read[0], *sampled, *render_tokens(tokenizer, [two]).ids[2:]]
    assert read[1] != render_tokens(tokenizer, [one, SAID, two]).ids


def test_on_a_terminal_the_thought_is_dimmed(runs, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    talk(runs, "--prompt", "Where is it?")
    assert screen.getvalue() == f"{chat.DIM}hm{chat.BRIGHT}\ncup{chat.BRIGHT}\n"


def test_a_turn_that_is_cut_off_says_so(runs, capsys):
    chat.main(chat.Args(runs, prompt="Where is it?", temperature=0, max_new_tokens=2))
    assert capsys.readouterr() == ("<think>hm\n", "(cut off after 2 tokens; raise --max_new_tokens)\n")


# ---- continuing text


@pytest.mark.parametrize("where", [("stage1",), ("unified", "sft", "--plain")])
def test_a_pre_trained_model_or_a_plain_one_continues_the_text(runs, capsys, read, where):
    names = [name for name in where if not name.startswith("--")]
    talk(runs.joinpath(*names), "--prompt", "hm", *where[len(names) :])
    tokenizer = rollout.load_policy(runs / "stage1").tokenizer
    assert read == [[tokenizer.end, *tokenizer.encode("hm")]]
    out, err = capsys.readouterr()
    assert out.startswith("hm") and "<think>" not in out and not err


@pytest.mark.parametrize("argv", [("--system", "Be brief."), ("--no_thinking",)])
def test_what_belongs_to_a_dialogue_is_refused_elsewhere(runs, argv):
    with pytest.raises(ConfigError, match=r"belong to a dialogue, but .*stage1 is of stage1, which knows no dialogue"):
        talk(runs / "stage1", "--prompt", "hm", *argv)
    with pytest.raises(ConfigError, match="belong to a dialogue, but --plain continues text; leave them out"):
        talk(runs, "--plain", "--prompt", "hm", *argv)


# ---- mistakes


@pytest.mark.parametrize("where", ["stage1", "unified"])
def test_a_line_that_is_too_long_costs_that_line_alone(runs, capsys, typed, where):
    typed(b"hm\n" + 1024 * b"x " + b"\nhm\n")
    talk(runs / where)
    out, err = capsys.readouterr()
    assert err.startswith("error: 2") and "more exceed the model's 1024; " in err and err.count("\n") == 1
    assert out == 2 * out[: len(out) // 2] != "" and "x x" not in out  # its neighbours are answered, and alike


@pytest.mark.slow
def test_a_dialogue_that_has_grown_too_long_says_how_to_go_on(runs, capsys, typed):
    typed(900 * b"x" + b"\n" + 100 * b"x" + b"\n\nWhere?\n")
    talk(runs)
    out, err = capsys.readouterr()
    assert out == 2 * "<think>hm</think>\ncup\n"
    assert "begin a new dialogue with an empty line\n(a new dialogue)\n" in err


@pytest.mark.parametrize("where", ["stage1", "unified"])
def test_bytes_that_are_no_utf8_cost_their_line_alone(runs, capsys, typed, where):
    typed(b"caf\xe9 no\nhm\n")
    talk(runs / where)
    out, err = capsys.readouterr()
    assert err == (
        "error: the line holds a byte that is no UTF-8 behind 'caf'; type it again, or convert it with iconv\n"
    )
    assert out.strip() and "caf" not in out


@pytest.mark.parametrize("option", ["--prompt", "--system"])
def test_a_prompt_is_checked_before_anything_is_loaded(option):
    with pytest.raises(ConfigError, match=f"{option} holds a byte that is no UTF-8 behind 'caf'"):
        talk("nowhere", option, "caf\udce9")


def test_one_prompt_that_is_wrong_ends_the_program(runs):
    with pytest.raises(ConfigError, match="more exceed the model's 1024; ask something shorter"):
        talk(runs, "--prompt", 1024 * "x ")
    with pytest.raises(ConfigError, match="--prompt is empty"):
        talk(runs, "--prompt", " ")


# ---- printing


def test_no_half_characters_and_nothing_is_lost(capsys):
    tokenizer = tokenizers.train(["x"], 384)
    show = chat.Stream(tokenizer, {"<think>": "<think>"})
    printed = []
    for token in [*tokenizer.encode(" \n"), tokenizer.id("<think>"), *tokenizer.encode("é–"), tokenizer.id("<sop>")]:
        show(0, token)
        printed.append(capsys.readouterr().out)
    assert "".join(printed) == "<think>é–" and not any(chat.UNFINISHED in text for text in printed)
    show(0, tokenizer.encode("é")[0])
    show.end("!")
    assert capsys.readouterr().out == f"{chat.UNFINISHED}!"
