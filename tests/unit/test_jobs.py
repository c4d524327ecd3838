"""Jobs side by side: order, what is there already, failures, and that nothing goes on after its parent."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from experiments import jobs, recipes
from experiments.jobs import Job
from glm_jax.config import ConfigError, replace
from glm_jax.train import checkpoint


def write(path: Path, text: str = "") -> None:
    told = (time.monotonic(), os.getpid(), os.environ.get("PJRT_NPROC"), os.environ.get("JAX_NUM_CPU_DEVICES"))
    path.write_text(text or " ".join(map(str, told)))


def wait_for(own: Path, other: Path) -> None:
    """Both jobs of a pair can only end if they run at the same time."""
    write(own)
    deadline = time.monotonic() + 60
    while not other.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{other} never came")
        time.sleep(0.01)


def fail(error: Exception) -> None:
    raise error


def sleep_and_write(path: Path) -> None:
    path.with_suffix(".begun").write_text(str(os.getpid()))
    time.sleep(60)
    write(path)


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)


def job(folder: Path, name: str, *needs: str, work=None, whole: bool = False) -> Job:
    part = f"{name}.txt", work or partial(write, folder / f"{name}.txt")
    return Job(name, (part,), needs, whole, devices=2 if whole else 1)


def test_jobs_share_the_machine_and_wait_for_what_they_need(tmp_path, two_cores):
    pair = [partial(wait_for, tmp_path / f"{a}.txt", tmp_path / f"{b}.txt") for a, b in (("a", "b"), ("b", "a"))]
    plan = [
        job(tmp_path, "last", "a", "b", whole=True),
        job(tmp_path, "a", work=pair[0]),
        job(tmp_path, "b", work=pair[1]),
    ]
    ticks = []
    jobs.run(plan, tmp_path, lambda: ticks.append(jobs.memory_gb()))
    a, b, last = ((tmp_path / f"{name}.txt").read_text().split() for name in ("a", "b", "last"))
    assert float(last[0]) > max(float(a[0]), float(b[0]))
    assert len({os.getpid(), *(int(told[1]) for told in (a, b, last))}) == 4
    assert (a[2], b[2], last[2]) == ("1", "1", "2")  # threads
    assert (a[3], b[3], last[3]) == ("1", "1", "2")  # devices
    assert max(ticks) > min(ticks) > 0  # they count


def test_rows_are_split_over_devices_where_they_can_be():
    run = recipes.get("tiny")
    assert [jobs.cpu_devices(run, *rows) for rows in ((8, 4), (8, 3), (1,))] == [2, 1, 1]
    assert jobs.cpu_devices(replace(run, **{"mesh.expert": 4}), 8) == 1  # the run says how


def test_what_is_there_is_not_made_again(tmp_path, two_cores):
    write(tmp_path / "a.txt", "kept")
    jobs.run([job(tmp_path, "a"), job(tmp_path, "b", "a", whole=True)], tmp_path)
    assert (tmp_path / "a.txt").read_text() == "kept" and (tmp_path / "b.txt").exists()


def test_a_failing_job_ends_the_others_and_gives_its_exit_code(tmp_path, two_cores, capfd):
    plan = [
        job(tmp_path, "bad", work=partial(fail, ConfigError("E=3 is wrong; use 4"))),
        job(tmp_path, "slow", work=partial(sleep_and_write, tmp_path / "slow.txt")),
        job(tmp_path, "never", "bad"),
    ]
    begun = time.monotonic()
    with pytest.raises(SystemExit) as error:
        jobs.run(plan, tmp_path)
    assert error.value.code == 2 and time.monotonic() - begun < 50
    told = capfd.readouterr().err
    assert "bad | error: E=3 is wrong; use 4" in told and "bad ended with exit code 2" in told
    assert not (tmp_path / "never.txt").exists() and not (tmp_path / "slow.txt").exists()


def test_a_job_that_leaves_something_out_has_failed(tmp_path, two_cores, capfd):
    """As one does whose output nobody reads any more: its exit code is 0."""
    with pytest.raises(SystemExit) as error:
        jobs.run(
            [job(tmp_path, "lazy", work=partial(write, tmp_path / "other.txt")), job(tmp_path, "b", "lazy")], tmp_path
        )
    assert error.value.code == 1 and not (tmp_path / "b.txt").exists()
    assert "lazy ended with exit code 0, before all of it was there" in capfd.readouterr().err


def test_a_folder_has_one_run_at_a_time(tmp_path, two_cores):
    with checkpoint.sole_writer(tmp_path), pytest.raises(ConfigError, match="another process"):
        jobs.run([job(tmp_path, "a")], tmp_path)


def test_a_killed_parent_takes_its_jobs_with_it(tmp_path):
    script = (
        "import sys; sys.path[:0] = [sys.argv[2], sys.argv[3]]\n"
        "from pathlib import Path; from functools import partial; import test_jobs; from experiments import jobs\n"
        "folder = Path(sys.argv[1])\n"
        "jobs.run([test_jobs.job(folder, 'slow', work=partial(test_jobs.sleep_and_write, folder / 'slow.txt'))], folder)\n"
    )
    here = Path(__file__).parent
    command = [sys.executable, "-c", script, str(tmp_path), str(here.parents[1]), str(here)]
    parent = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parents[1]), str(here)])}
    )
    begun = tmp_path / "slow.begun"
    deadline = time.monotonic() + 60
    while not (begun.exists() and begun.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    child = int(begun.read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()
