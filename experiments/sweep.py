"""Run a baseline over a grid, run by run, and compare: a table with means and standard errors, and a plot.

    python -m experiments.sweep muon --out runs/sweeps

A sweep is a file in experiments/sweeps. Every run has its own folder, named by its configuration's fingerprint; a
finished one is never run again, and an interrupted one goes on, so the same command resumes the sweep. A run's result
is results/<fingerprint>.json (configuration, what it changes, commit, device, metrics); tables and plots are made
from these files alone.
"""

import itertools
import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments import cli, pretrain, sweeps
from glm_jax.config import ConfigError, Run, canonical, fingerprint, nearest

METRICS = ("general", "code", "math", "code+math", "stdlib", "long", "expert_load", "seconds")


@dataclass(frozen=True)
class Args:
    """Options of a sweep."""

    sweep: Annotated[str, tyro.conf.Positional]
    """Name of a file in experiments/sweeps."""
    out: Path = Path("runs/sweeps")
    """Folder of the runs, their data and the figures."""
    results: Path = field(default=Path("experiments/results"))
    """Folder of the results."""
    most: int = 0
    """Runs to make now, of those that have not been made; 0 is all."""
    metric: str = "general"
    """What the table and the plot show: a held-out domain's bits per byte at the end, or expert_load."""


def main(args: Args) -> None:
    """Run what has not run yet, then print the table and draw the plot."""
    sweep = sweeps.get(args.sweep)
    if args.metric not in METRICS:
        raise ConfigError(f"unknown metric {args.metric!r}; {nearest(args.metric, list(METRICS))}")
    if args.most < 0:
        raise ConfigError(f"--most {args.most} must be at least 0, which makes all")
    runs = list(sweep.runs())
    left = sum(not (args.results / f"{fingerprint(run)}.json").exists() for _, run in runs)
    print(f"{args.sweep}: {len(runs) - left} of {len(runs)} runs are done", flush=True)
    records, made, began = [], 0, time.monotonic()
    for i, (changes, run) in enumerate(runs):
        told = ", ".join(f"{name}={value}" for name, value in changes.items())
        path = args.results / f"{fingerprint(run)}.json"
        if not path.exists() and args.most and made == args.most:
            continue
        rest = f", {(time.monotonic() - began) / made * (left - made) / 60:.0f} minutes to go" if made else ""
        print(f"[{i + 1}/{len(runs)}] {told}: {'done before' if path.exists() else 'running' + rest}", flush=True)
        made += not path.exists()
        record = json.loads(path.read_text()) if path.exists() else _run(sweep, run, args, path)
        records.append({**record, "changes": changes})  # a run of two sweeps is one file; what it changes is each one's
    rows = table(records, args.metric)
    print(f"\n{args.sweep}: {args.metric}, mean and standard error over {len(sweep.seeds)} seeds\n" + markdown(rows))
    figure = args.out / f"{args.sweep}_{args.metric}.svg"
    plot(rows, args.metric, figure)
    print(f"plot: {figure}")


def table(records: list[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """One row per point of the grid: its changes, and mean, standard error and values of the metric over seeds."""

    def point(record: dict[str, Any]) -> tuple:
        return tuple((name, value) for name, value in record["changes"].items() if name != "loop.seed")

    rows = []
    for changes, group in itertools.groupby(sorted(records, key=lambda r: str(point(r))), key=point):
        values = [record["metrics"][metric] for record in group]
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        rows.append({"changes": dict(changes), "mean": statistics.fmean(values), "stderr": error, "values": values})
    return sorted(rows, key=lambda row: row["mean"])


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table as Markdown, best first."""
    lines = ["| change | mean | standard error | runs |", "|---|---|---|---|"]
    for row in rows:
        changes = ", ".join(f"{name}={value}" for name, value in row["changes"].items())
        lines.append(f"| {changes} | {row['mean']:.4f} | {row['stderr']:.4f} | {len(row['values'])} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], metric: str, path: Path) -> None:
    """Means with error bars of two standard errors, and every run as a dot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 0.5 * len(rows) + 1.2), layout="constrained")
    for y, row in enumerate(rows):
        axes.errorbar(row["mean"], y, xerr=2 * row["stderr"], fmt="o", color="C0", capsize=3)
        axes.plot(row["values"], [y] * len(row["values"]), ".", color="C1", alpha=0.7)
    labels = [", ".join(f"{name.split('.')[-1]}={value}" for name, value in row["changes"].items()) for row in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.set_xlabel(f"{metric} (mean, two standard errors, runs)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def _run(sweep: sweeps.Sweep, run: Run, args: Args, path: Path) -> dict[str, Any]:
    """Train one point and write its result, once, whole."""
    import jax

    from glm_jax.evals.report import expert_load
    from glm_jax.train import checkpoint, metrics

    folder = args.out / fingerprint(run)
    data = args.out / f"data-{fingerprint((run.data, run.model.V, run.stages))}"
    stages = {stage.name: stage for stage in run.stages}
    start = None
    for name in sweep.stages:
        result = pretrain.train(run, stages[name], folder, start, data)
        start = folder
    last = folder / sweep.stages[-1]
    worst = max(expert_load(metrics.read(last / "log.jsonl", "step")))
    record = {
        "fingerprint": fingerprint(run), "config": canonical(run),
        "commit": metrics.read(last / "log.jsonl", "run")[0]["commit"], "device": str(jax.devices()[0]),
        "metrics": {**result["end"], "expert_load": worst, "seconds": result["seconds"]},
    }  # fmt: skip
    checkpoint.write_json(path, record)
    return record


if __name__ == "__main__":
    cli.main(main)
