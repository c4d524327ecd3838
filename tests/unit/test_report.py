"""The report from a run's folder: here a small one with made-up figures."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from experiments import quickstart, recipes
from glm_jax.config import ConfigError, Expert, Posttrain, Run, replace
from glm_jax.data.prepare import settings
from glm_jax.envs import get
from glm_jax.evals import bars, figures, posttraining, report, scores
from glm_jax.evals.told import SAMPLES_FILE, read
from glm_jax.optim import steps
from glm_jax.train import checkpoint
from glm_jax.train.loop import RESULT_FILE
from glm_jax.train.metrics import load_record

DOMAINS = ("general", "code", "math", "long", "stdlib", "code+math")


def a_run_folder(folder: Path, run: Run, stages: int = 3) -> Path:
    """What experiments.quickstart leaves behind, the checkpoints and rows aside."""
    rng = np.random.default_rng(0)
    checkpoint.write_json(folder / "data" / "manifest.json", _manifest(run))
    for number, stage in enumerate(run.stages[:stages]):
        out = folder / stage.name
        checkpoint.save_run(out, run, stage.name, folder / "data")
        plan = list(steps(run, stage))
        bits = {when: dict.fromkeys(DOMAINS, 4 - number - i) for i, when in enumerate(("start", "end"))}
        about = {"commit": "0123456789abcdef", "devices": ["cpu:0"], "jax": "0.10.2"}
        log = [{"kind": "run", "step": plan[0].index, **about}]
        log.append({"kind": "eval", "step": plan[0].index, "when": "start", "bits_per_byte": bits["start"]})
        log += [_step(run, rng, planned, i) for i, planned in enumerate(plan)]
        log.append({"kind": "eval", "step": plan[-1].index + 1, "when": "end", "bits_per_byte": bits["end"]})
        (out / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
        result = {"name": stage.name, "seconds": 100.0, "tokens": stage.tokens, "tokens_per_second": stage.tokens / 100}
        checkpoint.write_json(out / RESULT_FILE, {**result, "steps": len(plan), **bits})
    return folder


def _step(run: Run, rng: np.random.Generator, planned, i: int) -> dict:
    skew = np.where(np.arange(run.model.E) == 0, 0.5 + 2 * math.exp(-planned.tokens_before / 5e4), 1.0)
    load_LE = rng.poisson(planned.tokens * skew / run.model.E, (run.model.router_rows, run.model.E))
    loss = 3 + 4 * math.exp(-planned.tokens_before / 5e4) + 0.1 * rng.standard_normal()
    seen = planned.tokens_before + planned.tokens
    record = {
        "kind": "step",
        "step": planned.index + 1,
        "loss": loss,
        "mtp_loss": loss + 0.5,
        "gradient_norm": loss / 4,
        "lr": planned.lr,
    }
    return {
        **record, "batch_tokens": planned.tokens, "tokens_seen": seen, "seconds": 20 + 0.5 * i, **load_record(load_LE)
    }  # fmt: skip


def _manifest(run: Run) -> dict:
    domains, buckets = ("general", "code", "math"), range(len(run.data.bucket_epochs))
    count = {"documents": 1000, "bytes": 2_000_000, "tokens": 700_000}
    held_out = {name: {"documents": 10, "bytes": 100_000, "bytes_per_token": 2.9} for name in (*domains, "long")}
    return {
        "settings": json.loads(json.dumps(settings(run))),
        "training": dict.fromkeys(domains, count),
        "held_out": held_out,
        "buckets": {name: [{"documents": 200, "bytes": 400_000} for _ in buckets] for name in domains},
        "drops": {"near duplicate": 99, "<too short>": 5, "no such reason": 0},
        "stages": [
            {
                "name": stage.name, "rows": stage.tokens // stage.seq_len, "seq_len": stage.seq_len, "tokens": stage.tokens,
                "packing": stage.packing, "padding": 0.01, "tokens_by_domain": dict.fromkeys(domains, 100),
                "epochs_by_bucket": {name: {str(b): 0.5 for b in buckets} for name in domains},
            }
            for stage in run.stages
        ],
    }  # fmt: skip


def finish(folder: Path, run: Run) -> None:
    """What comes after training."""
    paid = {"model": 1.9, "zlib": 2.1, "order3": 2.2}
    checkpoint.write_json(folder / report.EVALUATION_FILE, {"bits_per_byte": paid, "documents": 13, "bytes": 347_418})
    process = {"seconds": 600.5, "peak_rss_gb": 1.9, "diff": {"schedule.peak_lr": [0.01, 0.02]}}
    checkpoint.write_json(folder / report.PROCESS_FILE, process)
    samples = [
        {"source": "held-out code", "prompt": "if a < b:", "continuation": "</pre><script>", "truth": "\n  pass", "ended": True},
        {"source": "a prompt of ours", "prompt": "def f(", "continuation": "self):", "truth": None, "ended": False},
    ]  # fmt: skip
    for stage in (run.stages[0], run.stages[-1]):
        described = {"temperature": 0.7, "top_p": 0.95, "samples": samples}
        checkpoint.write_json(folder / stage.name / SAMPLES_FILE, described)


SOLVED = {  # checkpoint -> domain -> how many of 3 answers to each of 4 tasks are right; "direct" of the unified model
    **{f"{domain}-{name}": {domain: solved} for domain in ("reasoning", "agent") for name, solved in (
        ("sft", (0, 1, 2, 1)), ("control", (1, 1, 2, 1)), ("rl", (2, 3, 3, 2)),
    )},
    "unified-sft": {"reasoning": (2, 2, 2, 2), "agent": (2, 2, 2, 2)},
    "unified-rl": {"reasoning": (3, 3, 3, 3), "agent": (0, 1, 1, 1)},
}  # fmt: skip


def post_train(folder: Path) -> None:
    """What SFT, RL, unification and evaluation leave behind, with scores of `SOLVED`."""
    for number, (domain, name) in enumerate((d, n) for d in ("reasoning", "agent", "unified") for n in ("sft", "rl")):
        out = folder / domain / name
        checkpoint.write_json(out / RESULT_FILE, {"name": name, "seconds": 50.0 + number})
        log = _rl_log(number) if name == "rl" else _sft_log(2.0)
        (out / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    (folder / "agent" / "control").mkdir()
    (folder / "agent" / "control" / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in _sft_log(1.0)))
    for name, domains in SOLVED.items():
        for domain, solved in domains.items():
            levels = (1, 2) if domain == "reasoning" and not name.startswith("unified") else (1,)
            for level in levels:
                _write_score(folder, name, domain, level, "thinking", solved)
            if name.startswith("unified"):
                _write_score(folder, name, domain, 1, "direct", (1, 1, 1, 1))
    row = {"asked": 10, "answers": 40, "accepted": 30, "reasons": {"accepted": 30, "wrong": 6, "<repeated>": 4}}
    checkpoint.write_json(folder / "unified" / posttraining.REJECTION_FILE, {"reasoning": row})


def _sft_log(first: float) -> list[dict]:
    whens = ("start", "during", "end")
    losses = [{"loss": {"dialogues": first / (1 + i)}, "step": 40 * i, "when": w} for i, w in enumerate(whens)]
    return [{"kind": "eval", **record} for record in losses]


def test_rollouts_in_8_bits_are_not_judged_by_what_equal_bits_reach(tmp_path, run):
    run = replace(run, **{"post.experts": (Expert("reasoning"), Expert("agent"))})
    folder = a_run_folder(tmp_path, run)
    post_train(folder)
    for log in folder.rglob("rl*/log.jsonl"):
        steps = [json.loads(line) for line in log.read_text().splitlines()]
        steps = [step | ({"rollouts_in_8_bits": True} if "reward" in step else {}) for step in steps]
        log.write_text("".join(json.dumps(step) + "\n" for step in steps))
    after = report.write(folder)
    assert "mismatch" not in after and after["experts"]


def _rl_log(number: int) -> list[dict]:
    """Thirty steps; the mismatch grows with `number`, and step 5 had nothing to learn from."""
    rng, log = np.random.default_rng(number), []
    for i in range(30):
        told = {"reward": 0.3 + 0.015 * i, "length": 40 + rng.normal(), "sampled_tokens": 1000, "groups": 8}
        told |= {"groups_varying": 0 if i == 5 else 4, "rounds": 1, "reasons": {"solved": 3}}
        learnt = {"loss": 0.1, "lr": 1e-3, "entropy": 0.5 - 0.01 * i, "seconds": 2.0 * i}
        learnt |= {"mismatch_mean": 1e-7 * (number + 1), "mismatch_max": 1e-6 * (number + 1), "k3": 1e-12}
        log.append({"kind": "step", "step": i + 1, **told, **learnt, **({} if i == 5 else {"clipped": 0.02})})
    return [*log[:20], {"kind": "curriculum", "step": 20, "unsolved": 9, "probed": 99, "kept": 4}, *log[20:]]


def _write_score(folder: Path, name: str, domain: str, level: int, mode: str, solved: tuple[int, ...]) -> None:
    env = get(domain)
    tasks = [env.task(seed, level) for seed in range(len(solved))]
    rows = [
        {"seed": task.seed, "kind": task.kind, "rewards": [1.0] * n + [0.0] * (3 - n)}
        for task, n in zip(tasks, solved, strict=True)
    ]
    samples = [
        {"kind": t.kind, "tools": t.tools and list(t.tools), "reward": reward, "reason": reason,
         "messages": [*t.messages, *env.solve(t, mode == "thinking")]}
        for t, reward, reason in ((tasks[0], 0.0, "wrong"), (tasks[1], 1.0, "solved"))
    ]  # fmt: skip
    score = {"checkpoint": name, "domain": domain, "level": level, "mode": mode, "answers": 3, "temperature": 1.0}
    shares = {"wellformed": 0.99 if domain == "agent" else 1.0, "thought": float(mode == "thinking"), "length": 40.0}
    score |= {"tasks": rows, "reasons": {"solved": sum(solved)}, **shares, "samples": samples}
    checkpoint.write_json(folder / scores.FOLDER / f"{scores.name(score)}.json", score)


class _Page(HTMLParser):
    """Text and every address that a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.tags, self.fetched, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def run() -> Run:
    """Without post-training."""
    return replace(recipes.get("smoke"), **{"post": Posttrain()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory, run) -> Path:
    made = a_run_folder(tmp_path_factory.mktemp("run"), run)
    finish(made, run)
    return made


@pytest.fixture(scope="module")
def found(folder) -> dict:
    return report.write(folder)


def test_json_has_what_it_must(folder, found, run):
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads((folder / report.JSON_FILE).read_text(), parse_constant=refuse) == found
    for name in (
        "stages",
        "bits_per_byte",
        "expert_load",
        "tokens_per_second",
        "peak_rss_gb",
        "seconds",
        "fingerprint",
    ):
        assert found[name] is not None
    assert [stage["domain"] for stage in found["stages"]] == ["general", "code+math", "long"]
    assert [(stage["start"], stage["end"]) for stage in found["stages"]] == [(4, 3), (3, 2), (2, 1)]
    assert found["seconds"] == 600.5 and found["peak_rss_gb"] == 1.9 and found["bits_per_byte"]["zlib"] == 2.1
    assert found["tokens_per_second"] == pytest.approx(found["tokens"] / 300, abs=0.1)
    typical = [2 * np.median([step.tokens for step in steps(run, stage)]) for stage in run.stages]  # half a second each
    assert [stage["tokens_per_second_median"] for stage in found["stages"]] == pytest.approx(typical, abs=0.1)


def test_bars_compare_values_with_bounds(found):
    bars = {bar["what"]: bar for bar in found["bars"]}
    assert len(bars) == 7
    assert all(bar["met"] == (bar["value"] < bar["below"]) for bar in bars.values())
    assert bars["seconds in all"]["met"]
    for bar in bars:
        assert bar in report.summary(found)


def test_page_stands_alone_and_shows_everything(folder, found, run):
    page = _Page()
    page.feed((folder / report.HTML_FILE).read_text())
    assert all(address.startswith(("#", "data:")) for address in page.fetched)
    assert page.tags.count("svg") == 9 and "script" not in page.tags and "link" not in page.tags
    for text in (found["fingerprint"], "</pre><script>", "<too short>", "schedule.peak_lr", "MTP layer", "midtrain"):
        assert text in page.text
    assert "no such reason" not in page.text


def test_expert_load_is_of_summed_counts():
    steps = [load_record(np.array([[4, 0], [1, 3]])), load_record(np.array([[0, 4], [1, 3]]))]
    assert report.expert_load(steps) == [1.0, 1.5]
    without_counts = [{"load_max_over_mean": step["load_max_over_mean"]} for step in steps]
    assert report.expert_load(without_counts) == [2.0, 1.5]
    assert report.expert_load([{"load": [[9, 1]], "load_max_over_mean": [1.8]}] + steps * 25) == [1.0, 1.5]


def test_unfinished_run_still_has_a_report(tmp_path, run):
    folder = a_run_folder(tmp_path, run, stages=1)
    (folder / "stage1" / RESULT_FILE).unlink()
    found = report.write(folder)
    assert found["bits_per_byte"] is None and found["peak_rss_gb"] is None
    assert found["stages"][0]["start"] == 4 and found["stages"][0]["tokens"] == run.stages[0].tokens
    assert report.summary(found)


def test_folder_without_a_log_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no training log; give the --out folder"):
        read(tmp_path)


def test_active_parameters_are_a_share_of_the_experts(run):
    total, active = report.parameters(run.model)
    experts = run.model.router_rows * 3 * run.model.E * run.model.D * run.model.M
    assert total - active == experts * (run.model.E - run.model.A) // run.model.E


def test_quickstart_goes_on_in_the_folder_of_an_equal_run(folder, run):
    quickstart._check(folder, replace(run, **{"optim.clip_norm": 1}))


def test_quickstart_refuses_the_folder_of_another_run(folder, run):
    other = replace(run, **{"schedule.peak_lr": 0.02})
    with pytest.raises(ConfigError, match=r"schedule.peak_lr 0.008 there, 0.02 now; give another --out"):
        quickstart.main(quickstart.Args(out=folder), other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, run) -> tuple[Path, dict]:
    """(folder, report.json) of a run with two experts and a unified model."""
    run = replace(run, **{"post.experts": (Expert("reasoning"), Expert("agent"))})
    folder = a_run_folder(tmp_path_factory.mktemp("whole"), run)
    finish(folder, run)
    post_train(folder)
    return folder, report.write(folder)


def test_json_has_what_post_training_bought(whole, found):
    folder, after = whole
    assert json.loads((folder / report.JSON_FILE).read_text()) == after
    added = {"scores", "experts", "unified", "wellformed", "thought", "mismatch"}
    assert after.keys() - found.keys() == added and not added & found.keys()
    # sft: thirds 0 1 2 1, mean 1/3; rl: 2 3 3 2; so differences of 2 2 1 1 thirds, mean 1/2
    error = float(np.std([2 / 3, 2 / 3, 1 / 3, 1 / 3], ddof=1) / 2)
    expected = {"sft": 1 / 3, "rl": 5 / 6, "more_sft": 5 / 12, "gain": 1 / 2, "stderr": error, "n": 4}
    for row, (domain, level) in zip(after["experts"], (("reasoning", 1), ("reasoning", 2), ("agent", 1)), strict=True):
        assert (row["domain"], row["level"]) == (domain, level)
        assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-5)
        assert row["more_sft_gain"] == pytest.approx(1 / 12, abs=1e-5)
    assert after["unified"]["reasoning"] == pytest.approx({"score": 1, "ratio": 1.2, "sft": 1 / 3}, abs=1e-5)
    assert after["unified"]["agent"] == pytest.approx({"score": 0.25, "ratio": 0.3, "sft": 1 / 3}, abs=1e-5)
    assert after["wellformed"] == {"thinking": 0.995, "direct": 0.995}
    assert after["thought"] == {"thinking": 1, "direct": 0}
    assert after["mismatch"] == {"mean": 6e-7, "max": pytest.approx(6e-6), "k3": 1e-12}
    table = {(row["checkpoint"], row["domain"], row["level"], row["mode"]): row["score"] for row in after["scores"]}
    assert len(table) == 17 and table["unified-sft", "agent", 1, "direct"] == pytest.approx(1 / 3, abs=1e-5)


def test_bars_of_post_training_have_directions(whole, found):
    bars_of = {bar["what"]: bar for bar in whole[1]["bars"]}
    gain = bars_of["reasoning, level 1: gain of RL, 0.15 and two errors"]
    error = whole[1]["experts"][0]["stderr"]
    assert gain == {"what": gain["what"], "value": 0.5, "at_least": 2 * error, "met": True} and error > 0.075
    more = bars_of["agent, level 1: gain of more SFT, half of RL's"]
    assert (more["below"], more["met"]) == (0.25, True)
    missed = {what for what, bar in bars_of.items() if not bar["met"]}
    assert missed == {
        "agent: unified over the expert's score", "agent: unified, above the expert's SFT",
    }  # fmt: skip
    assert (bars_of["seconds in all"]["below"], found["bars"][-2]["below"]) == (1500, 720)
    assert bars_of["sampler against trainer: k3 of the worst RL step"]["at_most"] == 1e-10
    summary = report.summary(whole[1])
    assert all(what in summary for what in bars_of) and "at least 0.98" in summary and "+0.500 ± 0.096" in summary


@pytest.mark.parametrize(
    ("rule", "below", "equal", "above"),
    [("below", True, False, False), ("at_most", True, True, False), ("at_least", False, True, True), ("above", False, False, True)],
)  # fmt: skip
def test_a_bar_is_met_on_its_side(rule, below, equal, above):
    judged = bars._judged([bars.Bar("x", value, rule, 2.0) for value in (1.0, 2.0, 3.0, None)])
    assert [bar["met"] for bar in judged] == [below, equal, above]
    assert bars.rule_and_bound(judged[0]) == (rule.replace("_", " "), 2.0)


def test_page_shows_post_training(whole):
    folder, after = whole
    page = _Page()
    html = (folder / report.HTML_FILE).read_text()
    page.feed(html)
    assert all(page.tags.count(tag) == html.count(f"</{tag}>") for tag in ("div", "table", "tr", "td", "pre", "span"))
    assert all(address.startswith(("#", "data:")) for address in page.fetched)
    assert page.tags.count("svg") == 9 + 7 and "script" not in page.tags
    text = " ".join(page.text.split())
    for told in (
        "unified-sft", "0.833 ± 0.096", "+0.500 ± 0.096", "wrong 15.0 %, <repeated> 10.0 %", "75.0 %",
        "4 of 9", "agent, thinking · unified-rl · solved",
        'find(item="', "reasoning, direct", "at least0.9",
    ):  # fmt: skip
        assert told in text
    task = get("agent").task(1, 1)
    turns = get("agent").solve(task)
    assert task.messages[-1]["content"] in text and turns[0]["reasoning_content"] in text
    assert after["unified"]["agent"]["ratio"] == 0.3 and "30.0 %" in text


@pytest.mark.slow
def test_half_a_post_training_still_has_a_report(tmp_path, run):
    run = replace(run, **{"post.experts": (Expert("reasoning"), Expert("agent"))})
    folder = a_run_folder(tmp_path, run)
    assert "experts" not in report.write(folder)
    post_train(folder)
    for gone in ("unified-rl.agent.1.thinking", "reasoning-sft.reasoning.1.thinking", "agent-control.agent.1.thinking"):
        (folder / scores.FOLDER / f"{gone}.json").unlink()
    (folder / "unified" / posttraining.REJECTION_FILE).unlink()
    (folder / "unified" / "rl" / "log.jsonl").write_text("")
    after = report.write(folder)
    assert [(row["domain"], row["level"], row["more_sft"] is None) for row in after["experts"]] == [
        ("reasoning", 2, False), ("agent", 1, True)
    ]  # fmt: skip
    assert "unified" not in after and after["mismatch"]["mean"] == 4e-7
    assert report.summary(after)


@pytest.mark.parametrize("count", [1, 2, 3, 50])
def test_an_average_is_as_long_as_its_values(count):
    np.testing.assert_allclose(figures.average(np.full(count, 2.0), 4), np.full(count, 2.0))
