"""Measure a checkpoint on the held-out documents: bits per byte of every domain, beside zlib and an order-3 byte model.

    python -m experiments.evaluate --checkpoint runs/quickstart
    python -m experiments.evaluate --checkpoint runs/quickstart/stage1 --out stage1.json

DIR is a run's folder (its latest stage is measured) or a stage's. Windows are as long as the stage's rows, for the
domain "long" as the last stage's; the document's own end counts as one more token to predict. The modules of the
standard library are measured whole, beyond `loop.eval_bytes`, for the comparison with the two compressors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import cli


@dataclass(frozen=True)
class Args:
    """Options of the evaluation."""

    checkpoint: Path
    """Folder of a run or of one of its stages."""
    out: Path | None = None
    """Write the figures here too, as JSON."""


def main(args: Args) -> None:
    from glm_jax.train import checkpoint

    figures = measure(args.checkpoint)
    if args.out:
        checkpoint.write_json(args.out, figures)
    print(f"held-out bits per byte after {figures['stage']}\n")
    for name, value in figures["domains"].items():
        print(f"  {name:<10} {value:.3f}")
    print(f"\n{figures['documents']} modules of the standard library, {figures['bytes'] / 1e6:.2f} MB\n")
    for name, value in figures["bits_per_byte"].items():
        print(f"  {name:<10} {value:.3f}")


def measure(path: Path) -> dict[str, Any]:
    """`domains` {name: bits per byte}, and what `compare` says."""
    from glm_jax.evals.bits_per_byte import evaluator

    return _with_model(
        path, lambda run, stage, data, *weights: {"domains": evaluator(data, run, stage)(run.model, *weights)}
    ) | compare(path)


def compare(path: Path) -> dict[str, Any]:
    """`stage`, and on held-out modules of the standard library `bits_per_byte` {model, zlib, order3}, `documents`
    and `bytes`."""
    from glm_jax.evals import baselines

    return _with_model(
        path, lambda run, stage, data, *weights: {"stage": stage.name, **baselines.compare(data, run, stage, *weights)}
    )


def _with_model(path: Path, call: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """`call(run, stage, data folder, params, router_bias_LE)` of the checkpoint in `path`, on the mesh of its run."""
    import jax

    from glm_jax import mesh
    from glm_jax.train import checkpoint

    folder = checkpoint.stage_folder(path)
    run, name, _ = checkpoint.load_run(folder)
    with jax.set_mesh(mesh.make(run.mesh)):
        run, params, router_bias_LE, data = checkpoint.load_params(folder)
        return call(run, next(s for s in run.stages if s.name == name), data, params, router_bias_LE)


if __name__ == "__main__":
    cli.main(main)
