"""The door of every script: a script's own options, a recipe by name, and any of the recipe's fields by its dotted path.

    python -m experiments.pretrain --recipe tiny --stage 1 --out runs/a --model.E 32 --pretrain.0.tokens 1000000

A script has a frozen dataclass of options (docstrings below the fields become help), a function
`main(args: Args, run: Run)`, and ends in `cli.main(main)`. A script without a recipe leaves the second parameter out.
jax is imported inside such functions, not at the top of a script: `--help` and mistakes must answer at once.
"""

import argparse
import contextlib
import dataclasses
import errno
import os
import resource
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_type_hints

import tyro

from experiments import recipes
from glm_jax.config import ConfigError, Run, canonical

USER_ERROR, FAILURE, INTERRUPTED = 2, 1, 130  # exit codes: fix the command; the machine stopped it; Ctrl-C

DEFAULT_RECIPE = "tiny"
# Options of a script that name a checkpoint folder: without --recipe, the run is the one that made the folder.
FOLDER_OPTIONS = ("from", "checkpoint")
# Variables that make a process one of several: where the first one listens, how many there are, this one's number.
PROCESSES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

From = Annotated[
    Path | None, tyro.conf.arg(name="from", metavar="DIR")
]  # the type of a field `from_`: the option --from


def main(script: Callable[..., Any], argv: Sequence[str] | None = None) -> NoReturn:
    """Parse the command line for `script`, call it, and leave with an exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)

    def work() -> None:
        configure_jax()
        parsed = parse(script, argv)
        join_processes()
        script(*parsed)

    leave_after(work)


def leave_after(work: Callable[[], Any]) -> NoReturn:
    """Call `work`, and leave with an exit code; a user's error is one message."""
    try:
        work()
    except BrokenPipeError:  # `... --help | head`: whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        _leave(INTERRUPTED, "interrupted; continue with the same command")
    except Exception as error:
        code, message = _explain(error)
        if code is None:
            raise
        _leave(code, message)
    sys.exit(0)


def parse(script: Callable[..., Any], argv: Sequence[str]) -> tuple[Any, ...]:
    """The arguments of `script` from the command line: (args,) or (args, run).

    Prints help or a tyro message with the nearest option and exits (0 or 2); raises ConfigError for an unknown recipe.
    """
    hints = {name: hint for name, hint in get_type_hints(script).items() if name != "return"}
    takes_run = Run in hints.values()
    options = next(hint for hint in hints.values() if hint is not Run)
    module = sys.modules[script.__module__]
    spec = module.__spec__
    settings = {"prog": f"python -m {spec.name if spec else module.__name__}", "use_underscores": True}
    if not takes_run:
        return (tyro.cli(options, args=argv, description=module.__doc__, **settings),)
    base = _base(options, argv)
    if "-h" in argv or "--help" in argv:
        with contextlib.suppress(SystemExit):
            tyro.cli(_combine(options, None), args=["--help"], description=module.__doc__, **settings)
        print(_fields_of(base))
        sys.exit(0)
    parsed = tyro.cli(
        _combine(options, base),
        args=["--help" if arg == "--help-fields" else arg for arg in argv],
        description=f"Every option, the fields of recipe {base.name!r} among them.",
        **settings,
    )
    return parsed.options, parsed.run


def given(folder: Path | None, what: str) -> Path:
    """The folder that --from names; ConfigError, with `what` it should be, without one."""
    if folder is None:
        raise ConfigError(f"--from is missing: give the folder of {what}, e.g. --from runs/a")
    return folder


def configure_jax(cache: Path | None = None) -> None:
    """Where compiled programs are kept between processes. Sets variables that jax reads when first imported.

    JAX's own variables win: JAX_COMPILATION_CACHE_DIR for the folder, JAX_ENABLE_COMPILATION_CACHE=0 for none.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache or home / "glm_jax" / "compiled"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def join_processes() -> None:
    """Become one of a run's processes where the environment names several; without one, nothing happens.

    JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID say so on plain hosts. jax finds
    out itself under Slurm's srun, on TPU pods that tell their hosts' names, and wherever JAX_COORDINATOR_ADDRESS is auto
    (TPU machines without Kubernetes, MPI). ConfigError where the three are incomplete or no numbers.
    """
    told = {name: os.environ[name] for name in PROCESSES if os.environ.get(name)}
    auto = told.get(PROCESSES[0]) == "auto"
    if told and not auto and len(told) < len(PROCESSES):
        missing = ", ".join(name for name in PROCESSES if name not in told)
        raise ConfigError(f"{', '.join(told)} is set, but {missing} is not; set all three in every process, or none")
    if told and not auto:
        address, *numbers = told.values()
        if not (all(n.isdigit() for n in numbers) and int(numbers[1]) < int(numbers[0]) and ":" in address):
            raise ConfigError(
                f"{', '.join(f'{name}={value}' for name, value in told.items())}: give host:port of the first process, how many "
                "there are, and the number of this one, from 0"
            )
        import jax

        count, index = map(int, numbers)
        jax.distributed.initialize(address, count, index)
    elif (
        auto or int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    ):
        import jax

        os.environ.pop(PROCESSES[0], None)  # jax reads it too
        jax.distributed.initialize()


def peak_rss_gb() -> float:
    """The most memory that this process or one of its children has had, GB of 10^9 bytes; of several at once see `jobs.memory_gb`.

    Not their sum: a child that is forked counts its parent's pages as its own. This process is read from /proc
    where there is one: `getrusage` remembers the parent's pages too, across the exec that began this process.
    """
    status = Path("/proc/self/status")
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = [resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit]
    if status.exists():
        peaks += [int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    else:
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    return max(peaks) / 1e9


def _combine(options: type, base: Run | None) -> type:
    """One dataclass for tyro: --recipe, the script's options without a prefix, and the fields of `base`."""
    known = f"Named run to start from: {', '.join(recipes.RECIPES)}."
    folders = [f"--{name}" for name in FOLDER_OPTIONS if name in _flags(options)]
    known += f" Without it, the run that made the folder of {' or '.join(folders)}." if folders else ""
    default = base.name if base else DEFAULT_RECIPE
    fields: list[Any] = [
        ("recipe", Annotated[str, tyro.conf.arg(help=known)], dataclasses.field(default=default)),
        ("options", Annotated[options, tyro.conf.arg(name="")]),
    ]
    if base:
        overrides = Annotated[tyro.conf.FlagConversionOff[Run], tyro.conf.arg(name="")]
        fields.append(("run", overrides, dataclasses.field(default=base)))
    return dataclasses.make_dataclass("Everything", fields, frozen=True, kw_only=True)


def _flags(options: type) -> list[str]:
    """Names of a script's options as typed; a field called `from_` is the option --from."""
    return [f.name.rstrip("_") for f in dataclasses.fields(options)]


def _base(options: type, argv: Sequence[str]) -> Run:
    """The run to override: --recipe if given, else the run that made the folder given, else the default recipe."""
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    folders = [name for name in FOLDER_OPTIONS if name in _flags(options)]
    for name in ("recipe", *folders):
        scan.add_argument(f"--{name}", nargs="?")
    given = vars(scan.parse_known_args(argv)[0])
    if given["recipe"]:
        return recipes.get(given["recipe"])
    folder = next((given[name] for name in folders if given[name]), None)
    if folder is None:
        return recipes.get(DEFAULT_RECIPE)
    from glm_jax.train import checkpoint

    return checkpoint.load_run(checkpoint.stage_folder(Path(folder)))[0]


def _fields_of(run: Run) -> str:
    """The closing part of --help: how to override, and each field of `run` with its value."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    lines = [
        f"Fields of recipe {run.name!r}. Each is an option by its dotted path: --model.E 32 --schedule.peak_lr 3e-3",
        "--pretrain.0.tokens 1000000 --data.paths a b. Their meanings and choices: --help-fields.",
        "",
    ]
    for path, values in _groups(run):
        text = "  ".join(shown for name, value in values.items() for shown in _shown(name, value))
        lines += textwrap.wrap(
            text, width, initial_indent=f"{path:<11} ", subsequent_indent=" " * 12, break_on_hyphens=False
        )
    return "\n".join(lines)


def _groups(config: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(dotted path, {field: value}) of every dataclass in `config`, in its order."""
    if isinstance(config, tuple):
        for i, item in enumerate(config):
            yield from _groups(item, f"{path}.{i}")
        return
    plain, nested = {}, []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        below = dataclasses.is_dataclass(value) or (
            isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0])
        )
        if below:
            nested.append((f"{path}.{f.name}".lstrip("."), value))
        else:
            plain[f.name] = value
    yield path, plain
    for name, value in nested:
        yield from _groups(value, name)


def _shown(name: str, value: Any) -> list[str]:
    """A field as its option is spelt, or one for each key of a dictionary."""
    value = canonical(value)
    if isinstance(value, dict) and value:
        return [f"{name}.{key}={below}" for key, below in value.items()]
    return [f"{name}={','.join(map(str, value)) or '()' if isinstance(value, list) else value}"]


def _explain(error: Exception) -> tuple[int | None, str]:
    """(exit code, message) of an error that the user can act on; (None, "") of one that needs its traceback."""
    if isinstance(error, ConfigError):
        return FAILURE if _disk_full(error) else USER_ERROR, str(error)
    if told := _disk_full(error):
        intact = "the last checkpoint that was complete is intact; free space and continue with the same command"
        return FAILURE, f"disk full: {told}; {intact}"
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)):
        return USER_ERROR, f"{error.strerror}: {error.filename}" if error.filename else str(error)
    if isinstance(error, FloatingPointError):
        return FAILURE, str(error)
    return None, ""


def _disk_full(error: BaseException | None) -> str:
    """What `error`, or what caused it, says of a full disk, "" if it is something else; tensorstore and orbax report it as
    text inside a ValueError."""
    while error is not None:
        if getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error):
            return str(error)
        error = error.__cause__ or error.__context__
    return ""


def _leave(code: int, message: str) -> NoReturn:
    print(f"\n{message}" if code == INTERRUPTED else f"error: {message}", file=sys.stderr)
    sys.exit(code)
