"""The door of the scripts: what the command line becomes, and what a user's mistake looks like."""

import errno
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from experiments import cli, evaluate, recipes
from glm_jax.config import ConfigError, Run, diff


@dataclass(frozen=True)
class Args:
    """Options of a script."""

    out: Path
    """Where to write."""
    stage: Literal[1, 2] = 1
    """Which stage."""
    from_: cli.From = None
    """The folder to start from."""


def script(args: Args, run: Run) -> None:
    """Does nothing."""


def plain(args: Args) -> None:
    """Knows no recipe."""


def parse(*argv: str) -> tuple[Args, Run]:
    return cli.parse(script, ["--out", "x", *argv])


def test_own_options_and_overrides():
    args, run = parse(
        "--stage", "2", "--model.E", "32", "--pretrain.0.tokens", "1000000", "--data.paths", "a", "b",
        "--mesh.fsdp", "4", "--model.qk_norm", "False", "--schedule.peak_lr", "3e-3",
    )  # fmt: skip
    assert args == Args(out=Path("x"), stage=2)
    assert {path: new for path, (_, new) in diff(run, recipes.tiny()).items()} == {
        "model.E": 32,
        "pretrain.0.tokens": 1_000_000,
        "data.paths": ("a", "b"),
        "mesh.fsdp": 4,
        "model.qk_norm": False,
        "schedule.peak_lr": 3e-3,
    }


@pytest.mark.parametrize("argv", [["--recipe", "air"], ["--recipe=air"]])
def test_a_recipe_is_the_start(argv):
    assert parse(*argv)[1] == recipes.air()


def test_overrides_are_applied_together():
    # neither half of this change is allowed alone
    assert parse("--model.A", "32", "--model.E", "64")[1].model.A == 32


def test_the_run_of_a_folder_is_the_start(tmp_path):
    from glm_jax.train import checkpoint

    made = parse("--model.E", "32")[1]
    checkpoint.save_run(tmp_path, made, "stage1", tmp_path / "data")
    assert parse("--from", str(tmp_path))[1] == made
    assert parse("--from", str(tmp_path), "--model.E", "64")[1].model.E == 64
    assert parse("--from", str(tmp_path), "--recipe", "smoke")[1] == recipes.smoke()


def test_a_script_without_a_recipe():
    assert cli.parse(plain, ["--out", "x"]) == (Args(out=Path("x")),)


def test_options_of_the_evaluation(capsys):
    argv = ["--checkpoint", "x", "--domain", "agent", "chat", "--level", "1", "2", "--mode", "direct", "--tasks", "8"]
    expected = {"domain": ("agent", "chat"), "level": (1, 2), "mode": ("direct",), "tasks": 8}
    assert cli.parse(evaluate.main, argv) == (evaluate.Args(Path("x"), **expected),)
    with pytest.raises(SystemExit) as left:
        cli.parse(evaluate.main, ["--checkpoint", "x", "--mode", "quick"])
    assert left.value.code == cli.USER_ERROR
    assert "invalid choice" in capsys.readouterr().err


def test_an_unknown_recipe_offers_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'tiny'"):
        parse("--recipe", "tinny")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--model.EE", "32"], "--model.E"),
        (["--schedule.peek_lr", "1"], "--schedule.peak_lr"),
        (["--stag", "1"], "--stage"),
        (["--model.A", "17"], "A=17 active experts of E=16; use at most 16"),
        (["--stage", "3"], "invalid choice"),
    ],
)
def test_a_mistake_is_a_message_and_exit_code_2(argv, told, capsys):
    with pytest.raises(SystemExit) as left:
        parse(*argv)
    assert left.value.code == cli.USER_ERROR
    message = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert told in message
    assert "Traceback" not in message


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as left:
        parse("--recipe", "air", "--help")
    assert left.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    order = (
        __doc__.strip(),
        "--recipe",
        "--out PATH",
        "Where to write",
        "--from DIR",
        "Fields of recipe 'air'",
        "E=128",
    )
    assert "mixture.general=" in told  # as its option is spelt
    places = [told.rfind(part) for part in order]
    assert -1 not in places
    assert places == sorted(places)


def test_help_fields_lists_meanings(capsys):
    with pytest.raises(SystemExit):
        parse("--help-fields")
    told = capsys.readouterr().out
    assert "--pretrain.0.tokens INT" in told
    assert "decoder layers, dense ones included" in " ".join(told.split())


def raised(error: BaseException) -> BaseException:
    """`error` as it reaches the door when something below wrapped it."""
    try:
        try:
            raise error
        except BaseException as inner:
            raise ValueError("could not write the array") from inner
    except ValueError as outer:
        return outer


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ConfigError("E=8 is wrong; use 9"), 2, "error: E=8 is wrong; use 9"),
        (FileNotFoundError("no checkpoint in x; train first"), 2, "error: no checkpoint in x; train first"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x/y"), 2, "No such file or directory: x/y"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "disk full"),
        (raised(OSError(errno.ENOSPC, "No space left on device")), 1, "disk full"),
        (
            ValueError("RESOURCE_EXHAUSTED: write of x/y: No space left on device"),
            1,
            "disk full: RESOURCE_EXHAUSTED: write of x/y",
        ),
        (FloatingPointError("step 12: loss is nan"), 1, "error: step 12: loss is nan"),
        (KeyboardInterrupt(), 130, "interrupted; continue with the same command"),
    ],
)
def test_what_a_user_can_act_on_is_one_message(error, code, told, capsys, monkeypatch):
    monkeypatch.setattr(cli, "configure_jax", lambda: None)

    def failing(args: Args) -> None:
        raise error

    with pytest.raises(SystemExit) as left:
        cli.main(failing, ["--out", "x"])
    assert left.value.code == code
    assert told in capsys.readouterr().err


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "configure_jax", lambda: None)

    def failing(args: Args) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(failing, ["--out", "x"])


def test_the_compilation_cache_is_where_the_user_says(tmp_path):
    program = """
        import os
        from pathlib import Path
        from experiments import cli
        cli.configure_jax()
        assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(Path(os.environ["XDG_CACHE_HOME"]) / "glm_jax" / "compiled")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = "elsewhere"
        cli.configure_jax()
        assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "elsewhere"
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={"XDG_CACHE_HOME": str(tmp_path), "PATH": ""},
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0


# ---- several processes


@pytest.fixture
def joined(monkeypatch):
    """What `jax.distributed.initialize` is called with, in an environment that names no processes yet."""
    import jax

    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given: calls.append(given))
    for name in (*cli.PROCESSES, "SLURM_STEP_NUM_TASKS", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.mark.parametrize(
    ("environment", "calls"),
    [
        ({}, []),
        (dict(zip(cli.PROCESSES, ("host:1234", "16", "3"), strict=True)), [("host:1234", 16, 3)]),
        ({"SLURM_STEP_NUM_TASKS": "1"}, []),
        ({"SLURM_STEP_NUM_TASKS": "4"}, [()]),
        ({"JAX_COORDINATOR_ADDRESS": "auto"}, [()]),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, []),
        ({"TPU_WORKER_HOSTNAMES": "t-0,t-1"}, [()]),
    ],
)
def test_the_environment_says_whether_a_process_is_one_of_several(joined, monkeypatch, environment, calls):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    cli.join_processes()
    assert joined == calls


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (("host:1234", "2", ""), "JAX_PROCESS_ID is not; set all three"),
        (("host:1234", "2", "2"), "JAX_PROCESS_ID=2: give host:port"),
        (("host:1234", "two", "0"), "JAX_NUM_PROCESSES=two"),
        (("host", "2", "0"), "JAX_COORDINATOR_ADDRESS=host,"),
    ],
)
def test_processes_that_are_named_in_part_or_wrongly(joined, monkeypatch, values, told):
    for name, value in zip(cli.PROCESSES, values, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as error:
        cli.join_processes()
    assert told in str(error.value)
    assert not joined
