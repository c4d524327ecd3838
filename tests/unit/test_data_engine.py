"""Stages over shards: the same bytes from every engine, and after every death."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from glm_jax.data.document import DataError
from glm_jax.data.engine import Engine, Shard

# The work of these stages lies in a module of its own: other processes import it by name.
WORK = '''
import os, signal, time
from pathlib import Path

def upper(inputs, output, settings):
    """What a stage does; it leaves a trace of each call, and `die` ends the process in the middle of it."""
    with open(settings["trace"], "a") as trace:
        trace.write(inputs[0].name + "\\n")
    text = inputs[0].read_text()
    with output.open("w") as file:
        file.write(text[:3].upper())
        file.flush()
        if inputs[0].name == settings.get("die"):
            os.kill(os.getpid(), signal.SIGKILL)
        if inputs[0].name == settings.get("fail"):
            raise OSError(28, "No space left on device")
        time.sleep(settings.get("sleep", 0))
        file.write(text[3:].upper())
    return {"letters": len(text)}
'''


@pytest.fixture
def upper(tmp_path, monkeypatch):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "work_of_a_stage.py").write_text(WORK)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'modules'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.delitem(sys.modules, "work_of_a_stage", raising=False)
    import work_of_a_stage  # pyright: ignore[reportMissingImports]

    return work_of_a_stage.upper


@pytest.fixture
def shards(tmp_path) -> list[Shard]:
    found = []
    for number in range(6):
        path = tmp_path / f"in{number}"
        path.write_text(f"text of shard {number}")
        found.append(Shard(f"out{number}", (path,), key=str(number), size=number))
    return found


def _quiet(done: int, total: int) -> None:
    pass


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _settings(tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {"trace": str(tmp_path / "trace"), **more}


def _trace(tmp_path: Path) -> list[str]:
    return sorted((tmp_path / "trace").read_text().split())


def test_a_pool_and_one_process_write_the_same_bytes_and_tell_the_same(upper, shards, tmp_path):
    told = []
    settings = _settings(tmp_path)
    one = Engine("one").run(upper, shards, settings, tmp_path / "one", lambda *progress: told.append(progress))
    assert told[0] == (0, 15) and told[-1] == (15, 15)
    pool = Engine("pool", 2).run(upper, shards, settings, tmp_path / "pool", _quiet)
    assert one == pool and [facts["letters"] for facts in one] == [15] * 6
    assert _files(tmp_path / "one") == _files(tmp_path / "pool")
    assert (tmp_path / "one" / "out3").read_text() == "TEXT OF SHARD 3"


@pytest.mark.slow
def test_ray_writes_the_same_bytes(upper, shards, tmp_path):
    ray = pytest.importorskip("ray")
    settings = _settings(tmp_path)
    Engine("one").run(upper, shards, settings, tmp_path / "one", _quiet)
    try:
        Engine("ray", 2).run(upper, shards, settings, tmp_path / "ray", _quiet)
    finally:
        ray.shutdown()
    assert _files(tmp_path / "one") == _files(tmp_path / "ray")


def test_only_what_is_missing_damaged_or_changed_is_made_again(upper, shards, tmp_path):
    out, settings, engine = tmp_path / "out", _settings(tmp_path), Engine("one")
    first = engine.run(upper, shards, settings, out, _quiet)
    (tmp_path / "trace").write_text("")
    (out / "out0").write_text("TEX")  # half a shard
    (out / "out1.done.json").unlink()
    (out / "out2").unlink()
    (out / ".out4.77.tmp").write_text("of a killed process")
    assert engine.run(upper, shards, settings, out, _quiet) == first
    assert _trace(tmp_path) == ["in0", "in1", "in2"]
    assert not list(out.glob(".*"))
    (tmp_path / "trace").write_text("")
    other = [*shards[:5], Shard("out5", shards[5].inputs, key="changed", size=5)]
    engine.run(upper, other, settings, out, _quiet)
    assert _trace(tmp_path) == ["in5"]
    (tmp_path / "trace").write_text("")
    engine.run(upper, other, {**settings, "sleep": 0.0}, out, _quiet)
    assert len(_trace(tmp_path)) == 6


def test_a_worker_that_dies_is_a_message_and_the_next_run_goes_on(upper, shards, tmp_path):
    out = tmp_path / "out"
    settings = _settings(tmp_path, die="in1")
    with pytest.raises(DataError, match="same command again"):
        Engine("pool", 2).run(upper, shards, settings, out, _quiet)
    assert not (out / "out1").exists() and not (out / "out1.done.json").exists()
    Engine("one").run(upper, shards, _settings(tmp_path), out, _quiet)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        name for shard in shards for name in (shard.name, f"{shard.name}.done.json")
    )


def test_a_full_disk_ends_the_stage_and_leaves_no_half_shard(upper, shards, tmp_path):
    with pytest.raises(OSError, match="No space left"):
        Engine("pool", 2).run(upper, shards, _settings(tmp_path, fail="in3"), tmp_path / "out", _quiet)
    assert not (tmp_path / "out" / "out3").exists()


def test_fewer_workers_than_none_are_refused():
    with pytest.raises(DataError, match="workers=-1 must not be negative"):
        Engine("pool", -1)


def test_shards_of_one_name_are_refused(upper, shards, tmp_path):
    with pytest.raises(ValueError, match="out0"):
        Engine("one").run(upper, [*shards, shards[0]], {}, tmp_path / "out", _quiet)


def test_a_missing_ray_says_how_to_get_it(upper, shards, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DataError, match=r"\.\[ray\]"):
        Engine("ray").run(upper, shards, _settings(tmp_path), tmp_path / "out", _quiet)


RUN = """
import sys
from pathlib import Path
from glm_jax.data.engine import Engine, Shard
import work_of_a_stage
if __name__ == "__main__":
    root = Path(sys.argv[1])
    shards = [Shard(f"out{n}", (root / f"in{n}",), key=str(n), size=n) for n in range(6)]
    Engine("pool", 2).run(work_of_a_stage.upper, shards, {"trace": str(root / "trace"), "sleep": 0.15}, root / sys.argv[2], print)
"""


def test_killed_with_sigkill_it_ends_with_the_bytes_of_an_unkilled_run(upper, shards, tmp_path):
    (tmp_path / "run.py").write_text(RUN)
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": f"{Path.cwd()}{os.pathsep}{os.environ['PYTHONPATH']}"}
    subprocess.run([*command, "whole"], check=True, capture_output=True, env=environment)
    process = subprocess.Popen(
        [*command, "killed"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed" / "out5").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.4)  # its workers end with it
    done = {path.stem.split(".")[0] for path in (tmp_path / "killed").glob("*.done.json")}
    assert 0 < len(done) < 6
    subprocess.run([*command, "killed"], check=True, capture_output=True, env=environment)
    assert _files(tmp_path / "killed") == _files(tmp_path / "whole")
    assert all(
        json.loads((tmp_path / "killed" / f"out{n}.done.json").read_text())["facts"]["letters"] == 15 for n in range(6)
    )
