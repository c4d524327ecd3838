"""The report from a run's folder: here a small one with made-up figures."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from experiments import quickstart, recipes
from glm_jax.config import ConfigError, Run, replace
from glm_jax.data.prepare import settings
from glm_jax.evals import report
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
    skew = np.where(np.arange(run.model.E) == 0, 0.5 + 2 * math.exp(-planned.tokens_before / 2e5), 1.0)
    load_LE = rng.poisson(planned.tokens * skew / run.model.E, (run.model.router_rows, run.model.E))
    loss = 3 + 4 * math.exp(-planned.tokens_before / 1e5) + 0.1 * rng.standard_normal()
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
    return recipes.get("smoke")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, run) -> Path:
    made = a_run_folder(tmp_path_factory.mktemp("run"), run)
    finish(made, run)
    return made


@pytest.fixture(scope="module")
def found(folder) -> dict:
    return report.write(folder)


def test_json_has_what_it_must(folder, found):
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
    assert [stage["tokens_per_second_median"] for stage in found["stages"]] == pytest.approx([16384] * 3, abs=0.1)


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
    assert found["stages"][0]["start"] == 4 and found["stages"][0]["tokens"] == 163_840
    assert report.summary(found)


def test_folder_without_a_log_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no training log; give the --out folder"):
        read(tmp_path)


def test_active_parameters_are_a_share_of_the_experts(run):
    total, active = report.parameters(run.model)
    experts = run.model.router_rows * 3 * run.model.E * run.model.D * run.model.M
    assert total - active == experts * (run.model.E - run.model.A) // run.model.E


def test_quickstart_refuses_the_folder_of_another_run(folder, run):
    other = replace(run, **{"schedule.peak_lr": 0.02})
    with pytest.raises(ConfigError, match=r"schedule.peak_lr 0.01 there, 0.02 now; give another --out"):
        quickstart.main(quickstart.Args(out=folder), other)
