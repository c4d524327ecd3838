"""The story to its end, killed with SIGKILL in every stage of post-training and started again, ends as if nobody had.

A run with one expert: SFT, RL, the control, scores, rejection sampling, unification. What two whole runs of one seed must
have in common is held on the way. What lies before post-training both have of the first.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from glm_jax.train import checkpoint, metrics

SCRIPT = """
import sys
from pathlib import Path
from experiments import cli, quickstart, recipes
from glm_jax.config import replace

cli.configure_jax()
run = recipes.get("smoke")
quickstart.main(quickstart.Args(out=Path(sys.argv[1])), replace(run, **{"post.experts": run.post.experts[:1]}))
"""
BEFORE = ("data", "stage1", "stage2", "midtrain")  # killed elsewhere: test_kill.py, test_data_prepare.py
MOMENTS = ("reasoning/sft", "reasoning/rl", "reasoning/control", "scores", "unified/sft", "unified/rl")
TIMES = {
    "seconds",
    "tokens_per_second",
    "tokens_per_second_median",
    "peak_rss_gb",
    "bars",
}  # what may differ; bars repeat it


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_in_every_stage_it_ends_with_the_same_weights_and_figures(tmp_path: Path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert _start(whole).wait() == 0
    for name in BEFORE:
        shutil.copytree(whole / name, killed / name)
    for moment in MOMENTS:
        _kill_in(killed, moment)
    assert _start(killed).wait() == 0

    stages = sorted(path.parent.relative_to(whole) for path in whole.rglob("checkpoints"))
    assert {str(stage) for stage in stages} >= {moment for moment in MOMENTS if "/" in moment}
    for stage in stages:
        ours, theirs = (checkpoint.load_params(folder / stage)[1:3] for folder in (killed, whole))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
        steps = [record["step"] for record in metrics.read(killed / stage / "log.jsonl", "step")]
        assert len(steps) == len(set(steps)), f"{stage}: a step stands twice in the log"
    ours, theirs = (_without_times(checkpoint.read_json(folder / "report.json")) for folder in (killed, whole))
    assert ours == theirs


def _start(out: Path) -> subprocess.Popen:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    with (out.parent / f"{out.name}.log").open("a") as log:
        return subprocess.Popen([sys.executable, "-c", SCRIPT, str(out)], env=environment, stdout=log, stderr=log)


def _kill_in(out: Path, moment: str) -> None:
    """Start the run, and kill it once it is at work in the stage (after its first step, or its first score)."""

    def there() -> bool:
        if moment == "scores":
            return any((out / moment).glob("*.json"))
        log = out / moment / "log.jsonl"
        return log.exists() and '"kind": "step"' in log.read_text()

    run = _start(out)
    deadline = time.monotonic() + 1500
    while not there() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert there() and run.poll() is None, f"{moment} was not reached, or the run was over before it could be killed"
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (out / moment / "result.json").exists(), f"{moment} was over when the run was killed"


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(part) for key, part in value.items() if key not in TIMES}
    return [_without_times(part) for part in value] if isinstance(value, list) else value
