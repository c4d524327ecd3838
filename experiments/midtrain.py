"""Mid-train: longer rows, a larger RoPE base, whole repositories in dependency order, best-fit packing.

    python -m experiments.midtrain --from runs/a

Goes on from the last pre-training stage in runs/a with its settings, optimizer state and learning-rate schedule
(one cosine spans pre- and mid-training). A recipe with several mid-training stages runs them in order.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import cli, pretrain
from glm_jax.config import Run


@dataclass(frozen=True)
class Args:
    """Options of mid-training."""

    from_: cli.From = None
    """The run's folder, or its last pre-training stage's. Its settings are taken over; overrides apply on top."""
    out: Path | None = None
    """Another run's folder to write to; by default the one of --from."""
    data_folder: Path | None = None
    """Rows made by experiments.data; by default those that the earlier stages used."""


def main(args: Args, run: Run) -> list[dict[str, Any]]:
    """Train every mid-training stage of the run; returns their results. One that has ended is passed over on the way to another,
    whose settings may be others."""
    from glm_jax.train import checkpoint, loop

    start, data = pretrain.run_folder(args.from_) if args.from_ else args.out, pretrain.given_rows(args.data_folder)
    found = [(args.out or start or Path()) / stage.name / loop.RESULT_FILE for stage in run.midtrain]
    results, left = [], not all(result.exists() for result in found)
    for stage, result in zip(run.midtrain, found, strict=True):
        if left and result.exists():
            results.append(checkpoint.read_json(result))
        else:
            results.append(pretrain.train(run, stage, args.out, start, data))
        start = args.out or start
    return results


if __name__ == "__main__":
    cli.main(main)
