"""What a run's folder tells: the logs, results and samples of its stages."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm_jax.config import ConfigError, Run, Stage
from glm_jax.evals.bits_per_byte import CODE_AND_MATH
from glm_jax.train import checkpoint, metrics
from glm_jax.train.loop import RESULT_FILE

SAMPLES_FILE = "samples.json"


@dataclass(frozen=True)
class Told:
    """What a stage has written."""

    stage: Stage
    domain: str  # the one that the stage is for
    about: dict[str, Any]  # first record of the log: commit, devices
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]  # with the tokens seen by then
    result: dict[str, Any]
    samples: dict[str, Any] | None


def read(folder: Path) -> tuple[Run, list[Told], Path]:
    """(run, what each stage wrote, data folder). ConfigError where no stage has begun."""
    saved = [path for path in sorted(folder.glob(f"*/{checkpoint.RUN_FILE}")) if (path.parent / "log.jsonl").exists()]
    if not saved:
        raise ConfigError(
            f"{folder} holds no training log; give the --out folder of experiments.quickstart or pretrain"
        )
    run, _, data = checkpoint.load_run(saved[0].parent)
    stages = [stage for stage in run.stages if folder / stage.name in [path.parent for path in saved]]
    return run, [_told(folder / stage.name, run, stage) for stage in stages], data


def _told(folder: Path, run: Run, stage: Stage) -> Told:
    log = metrics.read(folder / "log.jsonl")
    steps = [record for record in log if record["kind"] == "step"]
    seen = {record["step"]: record["tokens_seen"] for record in steps}
    before = run.tokens_before(stage.name)
    evaluations = [{**r, "tokens_seen": seen.get(r["step"], before)} for r in log if r["kind"] == "eval"]
    domain = "long" if stage in run.midtrain else "general" if stage == run.stages[0] else CODE_AND_MATH
    about = next((record for record in log if record["kind"] == "run"), {})
    optional = {name: read_optional(folder / name) for name in (RESULT_FILE, SAMPLES_FILE)}
    return Told(stage, domain, about, steps, evaluations, optional[RESULT_FILE] or {}, optional[SAMPLES_FILE])


def read_optional(path: Path) -> Any:
    """A JSON file's content, None where there is none."""
    return checkpoint.read_json(path) if path.exists() else None
