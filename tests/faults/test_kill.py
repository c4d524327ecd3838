"""Killed with SIGKILL at any moment and started again by the same command, a run ends in the same bits.

`KILLS=10 pytest tests/faults/test_kill.py` is the long form; by default three runs are killed.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from glm_jax.train import checkpoint, metrics

KILLS = int(os.environ.get("KILLS", 3))
STEPS = 30
SETTINGS = (
    f"--recipe smoke --pretrain.0.tokens {STEPS * 512} --schedule.batch_tokens_start 512 --schedule.batch_tokens 512 "
    "--schedule.warmup_tokens 2048 --pretrain.0.seq_len 64 --pretrain.0.microbatch_rows 8 --pretrain.1.seq_len 64 "
    "--pretrain.1.microbatch_rows 8 --midtrain.0.seq_len 128 --midtrain.0.microbatch_rows 4 --model.D 32 --model.F 64 "
    "--model.M 16 --model.N 2 --model.K 1 --model.H 16 --model.V 512 --loop.checkpoint_every 4 --loop.eval_bytes 4000"
).split()

ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """A run that nobody killed."""
    out = tmp_path_factory.mktemp("unkilled") / "run"
    assert _start(out).wait() == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_run_ends_in_the_same_bits(reference: Path, tmp_path: Path, number: int):
    out = tmp_path / "run"
    if number != 1:  # all but the one killed while it prepares its data read the reference's
        shutil.copytree(reference / "data", out / "data")
    interrupted = number == 2  # by Ctrl-C, behind which there is a checkpoint
    _kill_when(out, _moment(out, number), signal.SIGINT if interrupted else signal.SIGKILL)
    assert not (out / "stage1" / "result.json").exists(), "the run ended before it was killed"
    if interrupted:
        steps = metrics.read(out / "stage1" / "log.jsonl", "step")
        assert checkpoint.committed(out / "stage1")[-1] == steps[-1]["step"]
    assert _start(out).wait() == 0

    _, ours, our_bias, _ = checkpoint.load_params(out)
    _, theirs, their_bias, _ = checkpoint.load_params(reference)
    jax.tree.map(np.testing.assert_array_equal, (ours, our_bias), (theirs, their_bias))
    steps = [record["step"] for record in metrics.read(out / "stage1" / "log.jsonl", "step")]
    assert steps == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_another_command_is_refused_and_changes_nothing_that_is_there(reference: Path, tmp_path: Path):
    stage = tmp_path / "run" / "stage1"
    shutil.copytree(reference, tmp_path / "run")
    before = (stage / "run.json").read_bytes()
    told = _refusal(tmp_path / "run", "--schedule.peak_lr", "0.5")
    assert "has ended: schedule.peak_lr" in told and "another folder" in told
    (stage / "result.json").unlink()
    shutil.rmtree(stage / "checkpoints" / str(STEPS))
    told = _refusal(tmp_path / "run", "--schedule.batch_tokens", "1024", "--schedule.batch_tokens_start", "1024")
    assert "has read 28 microbatches by step 28, where these settings would have read 30" in told
    assert (stage / "run.json").read_bytes() == before


def _refusal(out: Path, *options: str) -> str:
    """What a command that must not run says."""
    done = subprocess.run(_command(out, *options), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    return done.stderr


def _moment(out: Path, number: int) -> Callable[[], bool]:
    """When to kill: inside a checkpoint's commit, inside data preparation, or after a random number of steps."""
    checkpoints = out / "stage1" / "checkpoints"
    if number == 0:
        return lambda: any("tmp" in p.name for p in checkpoints.glob("*"))
    if number == 1:
        return lambda: any((out / "data" / "done").glob("*.json"))
    after = random.Random(number).randrange(1, STEPS - 2)
    log = out / "stage1" / "log.jsonl"
    return lambda: log.exists() and log.read_text().count('"kind": "step"') >= after


def _command(out: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "experiments.pretrain", "--stage", "1", "--out", str(out), *SETTINGS, *options]


def _start(out: Path) -> subprocess.Popen:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(_command(out), env=ENVIRONMENT, preexec_fn=_listen, **quiet)


def _listen() -> None:
    """To Ctrl-C, whatever began the tests: a shell lets what it puts in the background ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _kill_when(out: Path, now: Callable[[], bool], how: signal.Signals) -> None:
    run = _start(out)
    deadline = time.monotonic() + 900
    while not now() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    run.send_signal(how)
    run.wait()
