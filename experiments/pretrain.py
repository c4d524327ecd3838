"""Pre-train a GLM on documents: stage 1 on general text, stage 2 with code and reasoning up-sampled.

    python -m experiments.pretrain --recipe tiny --stage 1 --out runs/a
    python -m experiments.pretrain --stage 2 --from runs/a

A run's folder holds `data` (made once, by experiments.data's code) and a folder per stage: settings, checkpoints,
log.jsonl, TensorBoard events. The same command continues what was interrupted and ends in the same bits.
`python -m experiments.report --run runs/a` draws what there is so far; `python -m experiments.chat --checkpoint runs/a` asks it.
After stage 2: `python -m experiments.midtrain --from runs/a`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments import cli
from glm_jax.config import ConfigError, Run, Stage


@dataclass(frozen=True)
class Args:
    """Options of pre-training."""

    stage: Literal[1, 2] = 1
    """Stage 1 starts from fresh weights, stage 2 from stage 1's last checkpoint."""
    out: Path | None = None
    """The run's folder. Needed for stage 1; later stages write beside the one they start from."""
    from_: cli.From = None
    """The run's folder, or a stage's, to start from. Its settings are taken over; overrides apply on top."""
    data_folder: Path | None = None
    """Rows made by experiments.data, for stages of as many tokens; by default `data` in the run's folder, made now if missing."""


def main(args: Args, run: Run) -> dict[str, Any]:
    """Train one pre-training stage; returns its result."""
    if args.stage > len(run.pretrain):
        raise ConfigError(
            f"recipe {run.name!r} has {len(run.pretrain)} pre-training stages; --stage {args.stage} is none of them"
        )
    return train(run, run.pretrain[args.stage - 1], args.out, args.from_, given_rows(args.data_folder))


def given_rows(folder: Path | None) -> Path | None:
    """What --data_folder names, which is not made: a mistyped one would be filled with other documents."""
    if folder is not None and not folder.is_dir():
        raise ConfigError(
            f"--data_folder {folder} does not exist; make it by experiments.data, or leave the option out"
        )
    return folder


def train(run: Run, stage: Stage, out: Path | None, start: Path | None, data: Path | None) -> dict[str, Any]:
    """Make the data if need be, and train `stage` in `out`/<stage name> from the stage before it."""
    from experiments import data as data_script
    from glm_jax.evals.bits_per_byte import evaluator
    from glm_jax.train import checkpoint, loop, processes

    before = [s.name for s in run.stages[: run.stages.index(stage)]]
    start_folder = None
    if before:
        start = start or out
        if start is None:
            raise ConfigError(f"stage {stage.name} starts from {before[-1]}; give --from, the folder that holds it")
        start_folder = run_folder(start) / before[-1]
        data = data or checkpoint.load_run(start_folder)[2]
        out = out or run_folder(start)
    elif out is None:
        raise ConfigError("--out is missing: give the run's folder, e.g. --out runs/a")
    data = data or out / "data"
    loop.check_layout(run, stage)
    processes.in_turn(lambda: data_script.make(run, data))
    folder = out / stage.name
    result = loop.train_stage(run, stage, folder, data, start=start_folder, evaluate=evaluator(data, run, stage))
    if not processes.writer():
        return result
    ended = ", ".join(f"{name} {result['start'][name]:.3f} -> {value:.3f}" for name, value in result["end"].items())
    print(f"{folder}: {result['tokens']:,} tokens; held-out bits per byte: {ended}", flush=True)
    return result


def run_folder(path: Path) -> Path:
    """The run's folder, given it or one of its stages'."""
    from glm_jax.train import checkpoint

    return path.resolve().parent if (path / checkpoint.RUN_FILE).exists() else path


if __name__ == "__main__":
    cli.main(main)
