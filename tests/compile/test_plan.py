"""The planner from the command line to plan.json, with the real train step and TPU's compiler. Skipped without libtpu."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pallas_kernels import analysis

SMALL = {
    "dense_layers": 2, "L": 4, "D": 256, "F": 256, "M": 128, "E": 4, "A": 2, "V": 1024, "N": 2, "K": 1, "mtp_layers": 0,
}  # fmt: skip


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not analysis.can_compile("tpu"), reason="needs the libtpu wheel that jax pins"),
]


def planned(out: Path, *more: str) -> dict[str, Any]:
    """plan.json of a small model on four chips."""
    wanted = ["--recipe", "glm45_4k", "--topology", "v5p:2x2x1", "--mesh", "fsdp=2,expert=2", "--seq", "256"]
    sizes = [word for name, value in SMALL.items() for word in (f"--model.{name}", str(value))]
    command = [sys.executable, "-m", "experiments.plan", *wanted, *sizes, *more, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "compiling" in done.stdout
    return json.loads(out.read_text())


def test_a_small_step_on_four_chips(tmp_path):
    plan = planned(tmp_path / "plan.json", "--batch", "4")
    assert plan["devices"] == 4
    assert plan["fits"]
    assert 0 < plan["peak_rss_gb"] < 6
    assert plan["flops"] == pytest.approx(plan["flops_analytic"], rel=0.15)  # so few matrices leave homes idle
    traffic = plan["collectives"]
    for key in ("expert all-gather", "fsdp all-gather", "fsdp all-to-all", "fsdp+expert all-to-all"):
        assert traffic[key]["bytes"] == pytest.approx(traffic[key]["minimum"], rel=0.01), key
    for axis in ("fsdp", "expert"):  # sums as small as some of these become all-reduces: twice the bytes
        scattered, reduced = traffic[f"{axis} reduce-scatter"], traffic[f"{axis} all-reduce"]
        assert scattered["bytes"] + reduced["bytes"] / 2 == pytest.approx(scattered["minimum"], rel=0.01), axis
    assert not [key for key in traffic if not key.startswith(("fsdp", "expert")) and traffic[key]["bytes"] > 1e4]


def test_a_small_step_on_two_slices(tmp_path):
    """Gradients are summed over the slower network, which `data` crosses: their shards, small ones padded to whole tiles."""
    plan = planned(tmp_path / "plan.json", "--batch", "8", "--slices", "2", "--mesh", "data=2,fsdp=2,expert=2")
    assert plan["devices"] == 8
    sums = plan["collectives"]["data all-reduce"]
    assert sums["minimum"] <= sums["bytes"] < 1.5 * sums["minimum"]  # whole, they would be twice as much
    assert plan["roofline_s"]["dcn"] == pytest.approx(sums["bytes"] / 6.25e9, rel=0.05)


def test_a_small_sampler_on_four_chips(tmp_path):
    plan = planned(tmp_path / "plan.json", "--batch", "4", "--step", "sample")
    assert list(plan["programs"]) == ["prefill", "decode"]
    assert plan["fits"] and plan["tokens_per_second_bound"] > 0
    prefill, decode = plan["programs"].values()
    assert prefill["flops"] == pytest.approx(prefill["flops_analytic"], rel=0.1)
    for kind in ("all-gather", "reduce-scatter"):
        assert prefill["collectives"][f"expert {kind}"]["bytes"] == prefill["collectives"][f"expert {kind}"]["minimum"]
    weights, cache = prefill["memory_analytic_gib"].values()
    assert prefill["args_gib"] == pytest.approx(weights, rel=0.05)
    assert prefill["results_gib"] == pytest.approx(cache, rel=0.05)
    assert decode["args_gib"] == pytest.approx(weights + cache, rel=0.05)


def test_a_small_update_of_rl_on_four_chips(tmp_path):
    plan = planned(tmp_path / "plan.json", "--batch", "4", "--step", "grpo")
    assert plan["fits"]
    assert plan["flops"] == pytest.approx(plan["flops_analytic"], rel=0.15)
    assert not [
        key for key in plan["collectives"] if key.endswith("all-to-all")
    ]  # AdamW leaves matrices where they lie
