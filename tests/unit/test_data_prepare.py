"""The whole preparation, on a corpus of a few seconds: user folders in place of the built-in sources."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from glm_jax.config import Data, Model, Run, Schedule, Stage, replace
from glm_jax.data import document, packing, prepare, report, sources, stages
from glm_jax.data.document import DataError
from glm_jax.data.heldout import read_held_out
from glm_jax.data.input import Microbatches, Rows

LIBRARY = Path(os.__file__).parent
SHAPES = Model(V=512, D=8, L=1, dense_layers=1, N=2, K=1, H=4, F=8, M=8, E=2, A=1, max_positions=512)
SMALL_BATCH = Schedule(batch_tokens_start=1024, batch_tokens=1024)


def quiet(step: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    root = tmp_path_factory.mktemp("sources") / "library"
    for name in ("json", "html", "tomllib", "wsgiref", "concurrent", "logging", "zoneinfo", "dbm"):
        shutil.copytree(LIBRARY / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for number, topic in enumerate((LIBRARY / "pydoc_data" / "topics.py").read_text().split("\n '")[:60]):
        (root / f"topic{number}.txt").write_text(topic)
    stages = [
        Stage("one", 20_000, 64, 1e4, 4, {"general": 0.5, "code": 0.5}),
        Stage("two", 10_000, 128, 1e4, 2, {"code": 1.0}, packing="best_fit", isolate=True, long_documents=True),
    ]
    data = Data(paths=(str(root),), held_out=0.2)
    return Run("test", SHAPES, tuple(stages[:1]), tuple(stages[1:]), schedule=SMALL_BATCH, data=data)


@pytest.fixture(autouse=True)
def no_builtin_sources(monkeypatch):
    monkeypatch.setattr(sources, "PARTS", ())


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PARTS", ())
        return prepare.prepare(run, out, quiet)


def _files(folder: Path) -> dict[str, str]:
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def test_stages_have_their_tokens_mixture_fim_and_repositories(run, folder):
    one, two = prepare.read_manifest(folder)["stages"]
    assert one["rows"] == -(-20_000 // 64)
    assert one["tokens"] == one["rows"] * 64
    assert one["padding"] == 0
    assert abs(one["tokens_by_domain"]["code"] - 10_000) < 100
    assert one["readings_with_fim"] > 0
    assert two["tokens"] >= 10_000
    assert two["padding"] < 0.05
    tokenizer = prepare.load_tokenizer(folder)
    text = tokenizer.decode(np.load(folder / "two" / "tokens.npy"))
    assert re.search(r"^# library/\w+/\w+\.py$", text, re.MULTILINE)
    fim = np.load(folder / "one" / "tokens.npy")
    assert (fim == tokenizer.id("<|code_middle|>")).sum() == (fim == tokenizer.id("<|code_suffix|>")).sum() > 0


def test_a_finished_folder_is_left_alone_and_does_not_ask_what_is_installed_now(run, folder, monkeypatch):
    before = _files(folder)
    monkeypatch.setattr(sources, "environment", lambda: {"python": "9.9"})
    prepare.prepare(run, folder, lambda *_: pytest.fail("nothing was left to do"))
    assert _files(folder) == before


def test_what_does_not_decide_the_data_may_change_and_what_does_is_refused_by_name(run, folder):
    prepare.prepare(
        replace(run, **{"loop.seed": 7, "pretrain.0.microbatch_rows": 8, "midtrain.0.isolate": False}), folder, quiet
    )
    with pytest.raises(DataError, match=r"data.seed: 0 there, 5 now\n  stages.0.tokens: 20000 there, 20001 now"):
        prepare.prepare(replace(run, **{"data.seed": 5, "pretrain.0.tokens": 20_001}), folder, quiet)


def test_input_files_that_change_under_an_unfinished_folder_are_refused(run, folder, tmp_path):
    root = tmp_path / "library"
    shutil.copytree(run.data.paths[0], root)
    changed = replace(run, **{"data.paths": (str(root),)})
    out = prepare.prepare(changed, tmp_path / "out", quiet)
    (root / "new.txt").write_text("one more page of text\n" * 9)
    assert prepare.prepare(changed, out, quiet) == out  # finished: a run goes on with what it has
    (out / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"inputs\.folders"):
        prepare.prepare(changed, out, quiet)


def test_a_folder_with_other_files_is_refused(run, tmp_path):
    (tmp_path / "thesis.doc").write_text("precious")
    with pytest.raises(DataError, match="is no data folder"):
        prepare.prepare(run, tmp_path, quiet)


@pytest.mark.parametrize("name", ["documents", "../x"])
def test_a_stage_cannot_take_the_folder_of_something_else(run, tmp_path, name):
    with pytest.raises(DataError, match="choose another"):
        prepare.prepare(replace(run, **{"pretrain.0.name": name}), tmp_path / "out", quiet)


def test_killed_between_any_two_renames_it_ends_with_the_same_bytes(run, folder, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    real, left = os.replace, 0

    def replace_or_die(source, target):
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        real(source, target)

    monkeypatch.setattr(os, "replace", replace_or_die)
    out, deaths, left = tmp_path / "out", 0, 3
    while True:
        try:
            prepare.prepare(run, out, quiet)
            break
        except Killed:
            deaths += 1
            left = 4 + 3 * deaths
    assert deaths >= 4
    assert _files(out) == _files(folder)


def test_a_full_disk_is_a_message_and_the_next_run_goes_on(run, folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(document.Path, "write_text", _no_space)
        with pytest.raises(DataError, match="disk is full"):
            prepare.prepare(run, out, quiet)
    prepare.prepare(run, out, quiet)
    assert _files(out) == _files(folder)


def _no_space(path, *args, **kwargs):
    raise OSError(28, "No space left on device", str(path))


def test_nothing_held_out_is_trained_on(folder):
    held_out = read_held_out(folder)
    assert {d.domain for d in held_out} >= {"general", "code"}
    training = [d for name in document.DOMAINS for d in document.read_documents(folder / "documents" / f"{name}.jsonl")]
    assert not {d.group for d in training} & {d.group for d in held_out}
    lines = {line for d in held_out for line in d.text.splitlines() if len(line) > 60}
    seen = {line for d in training for line in d.text.splitlines()}
    assert len(lines & seen) < 0.05 * len(lines)


def test_held_out_prefixes_are_by_domain_and_bytes(folder):
    code = read_held_out(folder, "code")
    assert read_held_out(folder, "code", max_bytes=1) == code[:1]
    with pytest.raises(DataError, match=r"experiments\.data"):
        read_held_out(folder / "nowhere")


@pytest.mark.parametrize("index", [0, 1])
def test_microbatches_resume_exactly_and_every_row_comes_once_a_pass(run, folder, index):
    stage = run.stages[index]
    batches = Microbatches(folder, stage, seed=3)
    first = [next(batches) for _ in range(5)]
    state = batches.get_state()
    after = [next(batches) for _ in range(3)]
    again = Microbatches(folder, stage, seed=3)
    again.set_state(state)
    for a, b in zip(after, again, strict=False):
        assert all(np.array_equal(a[name], b[name]) for name in a)
    assert first[0]["ids"].shape == (stage.microbatch_rows, stage.seq_len)
    rows = len(batches.rows)
    one_pass = Microbatches(folder, dataclasses.replace(stage, microbatch_rows=1), seed=3)
    seen = [next(one_pass)["ids"].tobytes() for _ in range(rows)]
    assert sorted(seen) == sorted(batches.rows[i]["ids"].tobytes() for i in range(rows))
    with pytest.raises(DataError, match="seed"):
        Microbatches(folder, stage, seed=4).set_state(state)
    for iterator in (batches, again, one_pass):
        iterator.close()


def _global(folder: Path, stage: Stage, count: int, microbatches: int, workers: int = 0, state=None):
    """(microbatches put together from the shares of `count` hosts, the position after them)."""
    hosts = [Microbatches(folder, stage, 3, (index, count), workers) for index in range(count)]
    for host in hosts if state else ():
        host.set_state(state)
    parts = [[next(host) for host in hosts] for _ in range(microbatches)]
    states = [host.get_state() for host in hosts]
    for host in hosts:
        host.close()
    assert all(one == states[0] for one in states)
    assert len(json.dumps(states[0])) < 1000
    return [{name: np.concatenate([part[name] for part in row]) for name in row[0]} for row in parts], states[0]


def _same(got, expected) -> bool:
    return len(got) == len(expected) and all(
        np.array_equal(a[name], b[name]) for a, b in zip(got, expected, strict=True) for name in a
    )


@pytest.mark.parametrize("count", [1, 2, 4])
def test_one_two_and_four_hosts_read_the_same_global_batches_and_go_on_for_each_other(run, folder, count):
    stage = run.stages[0]
    expected, _ = _global(folder, stage, 1, 100)  # more than one pass
    first, state = _global(folder, stage, count, 41)
    assert _same(first, expected[:41])
    for others in (1, 2, 4):
        assert _same(_global(folder, stage, others, 59, state=state)[0], expected[41:])


def test_a_microbatch_that_hosts_cannot_share_is_refused(run, folder):
    with pytest.raises(DataError, match="multiple of 3"):
        Microbatches(folder, run.stages[0], 0, (0, 3))


@pytest.mark.slow
def test_workers_change_neither_what_comes_nor_what_a_position_means(run, folder):
    stage = run.stages[0]
    expected, _ = _global(folder, stage, 1, 20)
    first, state = _global(folder, stage, 1, 7, workers=2)
    assert _same(first, expected[:7])
    assert _same(_global(folder, stage, 1, 13, state=state)[0], expected[7:])


@pytest.mark.parametrize("index", [0, 1])
def test_rows_of_shards_are_the_rows_of_flat_arrays(run, folder, tmp_path, index):
    stage = run.stages[index]
    facts = json.loads((folder / stage.name / "stage.json").read_text())
    tokens, there = stages.Tokens.load(folder / stage.name), folder / stage.name
    plan = packing.Plan(np.load(there / "segments.npy"), np.load(there / "row_starts.npy"))
    out = tmp_path / stage.name
    out.mkdir()
    stages.Prepared(tokens, plan, facts).save(out, shard_tokens=3000)
    for name in (f"{stage.name}/stage.json", "manifest.json"):
        shutil.copy(folder / name, tmp_path / name)
    assert len(list(out.glob("tokens-*.array_record"))) > 1
    assert np.load(out / "rows.npy", mmap_mode="r")[0].nbytes == 16
    flat, sharded = Rows(folder, stage), Rows(tmp_path, stage)
    assert _same([sharded[i] for i in range(len(sharded))], [flat[i] for i in range(len(flat))])


def test_dialogues_that_are_made_become_rows_with_the_templates_tags(run, tmp_path):
    stages_ = {"midtrain.0.mixture": {"reasoning": 0.5, "agent": 0.25, "code": 0.25}, "midtrain.0.fim_rate": 0.0}
    made = replace(run, **{"data.dialogues": 60, **stages_})
    folder = prepare.prepare(made, tmp_path / "data", quiet)
    facts = json.loads((folder / "two" / "stage.json").read_text())
    shares = {
        name: count / sum(facts["tokens_by_domain"].values()) for name, count in facts["tokens_by_domain"].items()
    }
    assert shares == pytest.approx({"general": 0, "math": 0, "reasoning": 0.5, "agent": 0.25, "code": 0.25}, abs=0.01)
    tokenizer = prepare.load_tokenizer(folder)
    ids = np.concatenate([Rows(folder, made.stage("two"))[i]["ids"] for i in range(facts["rows"])])
    for tag in ("<|user|>", "<think>", "<tool_call>", "<|observation|>"):
        assert (ids == tokenizer.id(tag)).any()
    manifest = prepare.read_manifest(folder)
    assert manifest["training"]["reasoning"]["documents"] > 40 and "reasoning" not in manifest["held_out"]
    report.write_report(folder)


def test_another_row_length_or_stage_is_refused(run, folder):
    with pytest.raises(DataError, match="seq_len=64"):
        Microbatches(folder, replace(run, **{"pretrain.0.seq_len": 128}).stages[0])
    with pytest.raises(DataError, match="it has one, two"):
        Microbatches(folder, replace(run, **{"pretrain.0.name": "three"}).stages[0])


@pytest.mark.slow
def test_kill_9_at_random_moments_ends_with_the_bytes_of_an_unkilled_run(tmp_path):
    command = [sys.executable, "-m", "experiments.data", "--recipe", "smoke", "--out"]
    subprocess.run([*command, tmp_path / "whole"], check=True, capture_output=True)
    for seconds in (3, 9, 6, 6):
        process = subprocess.Popen(
            [*command, tmp_path / "killed"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        time.sleep(seconds)
        process.kill()
        process.wait()
    subprocess.run([*command, tmp_path / "killed"], check=True, capture_output=True)
    assert _files(tmp_path / "killed") == _files(tmp_path / "whole")
