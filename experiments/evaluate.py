"""Measure a checkpoint: held-out bits per byte after pre-training, held-out tasks after SFT and RL.

    python -m experiments.evaluate --checkpoint runs/quickstart/stage1 --out stage1.json
    python -m experiments.evaluate --checkpoint runs/quickstart/reasoning/rl
    python -m experiments.evaluate --checkpoint runs/quickstart --domain agent chat --level 1 --mode direct

DIR is a run's folder (its final model is measured) or a stage's. Bits per byte: windows are as long as the stage's rows,
for the domain "long" as the last stage's; the document's own end counts as one more token to predict; the modules of the
standard library are measured whole, beyond `loop.eval_bytes`, beside zlib and an order-3 byte model. Tasks: pass@1 with
its standard error over tasks (the mean over all n answers, so avg@n too) and unbiased pass@k for each domain, level and
mode, kept as RUN/scores/*.json for the report and not measured again while the checkpoint stays.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments import cli, convert
from glm_jax.config import ConfigError, Evaluation, Run, fingerprint, nearest

if TYPE_CHECKING:
    from glm_jax.rl.rollout import Policy


@dataclass(frozen=True)
class Args:
    """Options of the evaluation."""

    checkpoint: Path
    """Folder of a run or of one of its stages."""
    domain: tuple[str, ...] = ()
    """Of the tasks; by default an expert's own, every expert's for the unified model."""
    level: tuple[int, ...] = ()
    """Of difficulty; by default post.evaluation's two."""
    mode: tuple[Literal["thinking", "direct"], ...] = ()
    """By default thinking, and direct too for the unified model."""
    tasks: int | None = None
    """Of each domain and level; by default post.evaluation.tasks. Given, nothing is kept in RUN/scores."""
    answers: int | None = None
    """To each task; by default post.evaluation.answers. Given, nothing is kept in RUN/scores."""
    out: Path | None = None
    """Write the figures here too, as JSON."""


def main(args: Args) -> None:
    from glm_jax.train import checkpoint, loop

    folder = checkpoint.final_folder(args.checkpoint)
    run, stage, data = checkpoint.load_run(folder)
    if stage == convert.STAGE and not (data / "heldout.jsonl").is_file():
        raise ConfigError(
            f"{folder} came without documents to measure it on; convert it again with --documents, a folder of experiments.data"
        )
    post_trained = stage in checkpoint.POST_TRAINING
    if post_trained and not run.post.experts:
        raise ConfigError(
            f"{folder} was fine-tuned in a run without experts, whose tasks would be asked; what it made of dialogues held out "
            f"of its training stands in {folder / loop.RESULT_FILE}, and experiments.chat talks to it"
        )
    figures = _tasks(args, folder) if post_trained else _texts(args, folder)
    if args.out:
        checkpoint.write_json(args.out, figures)


def _texts(args: Args, folder: Path) -> dict[str, Any]:
    """Bits per byte, printed."""
    given = [f"--{name}" for name in ("domain", "level", "mode", "tasks", "answers") if getattr(args, name)]
    if given:
        raise ConfigError(
            f"{', '.join(given)}: {folder} is a pre-training stage, which is measured on documents; leave them out, or give "
            "the folder of an expert or of the unified model"
        )
    figures = measure(folder)
    print(f"held-out bits per byte after {figures['stage']}\n")
    for name, value in figures["domains"].items():
        print(f"  {name:<10} {value:.3f}")
    print(f"\n{figures['documents']} modules of the standard library, {figures['bytes'] / 1e6:.2f} MB\n")
    for name, value in figures["bits_per_byte"].items():
        print(f"  {name:<10} {value:.3f}")
    return figures


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
        return call(run, run.stage(name), data, params, router_bias_LE)


def _tasks(args: Args, folder: Path) -> dict[str, Any]:
    """Scores of all domains, levels and modes that are asked for, printed."""
    from glm_jax.evals import scores
    from glm_jax.train import checkpoint

    run = checkpoint.load_run(folder)[0]
    domains = [expert.domain for expert in run.post.experts]
    one = folder.resolve().parent.name in domains
    chosen = args.domain or ([folder.resolve().parent.name] if one else domains)
    evaluation = run.post.evaluation
    levels = args.level or (evaluation.level, evaluation.harder_level)
    modes = args.mode or ((scores.THINKING,) if one else (scores.THINKING, scores.DIRECT))
    changes = {name: value for name in ("tasks", "answers") if (value := getattr(args, name)) is not None}
    changed = dataclasses.replace(evaluation, **changes)
    ks = [2**i for i in range(1, changed.answers.bit_length())]
    ks += [changed.answers] if changed.answers not in (1, *ks) else []
    print(f"{folder}: {changed.tasks} held-out tasks, {changed.answers} answers to each, at {changed.temperature:g}\n")
    columns = "".join(f"  {f'pass@{k}':>8}" for k in ks)
    print(f"  {'domain':<10} level  {'mode':<9} pass@1 = avg@{changed.answers}{'':<6}{columns}  well formed   tokens")
    found = []
    for domain, level, mode in (
        (d, lv, m) for d in dict.fromkeys(chosen) for lv in dict.fromkeys(levels) for m in modes
    ):
        thinking = mode == scores.THINKING
        if changed == evaluation:
            figures = score(folder, domain, level, thinking)
        else:
            figures = _measure(folder, domain, level, thinking, changed)
        found.append({**figures, **_summary(figures, ks)})
        print(f"  {domain:<10} {level:>5}  {mode:<9} {_row(found[-1], ks)}", flush=True)
    return {"checkpoint": _place(folder, run)[1], "scores": found}


def _summary(figures: dict[str, Any], ks: Sequence[int]) -> dict[str, Any]:
    from glm_jax.evals import scores

    mean, error = scores.pass_at_1(figures)
    return {"pass@1": mean, "stderr": error, **{f"pass@{k}": scores.pass_at_k(figures, k) for k in ks}}


def _row(figures: dict[str, Any], ks: Sequence[int]) -> str:
    columns = "".join(f"  {figures[f'pass@{k}']:>8.3f}" for k in ks)
    both = f"{figures['pass@1']:.3f} ± {figures['stderr']:.3f}"
    return f"{both:<21}{columns}  {100 * figures['wellformed']:>9.1f} %  {figures['length']:>7.1f}"


def score(folder: Path, domain: str, level: int, thinking: bool, out: Path | None = None) -> dict[str, Any]:
    """The score (`glm_jax.evals.scores`) on held-out tasks of the checkpoint in a stage folder, RUN/reasoning/rl say.

    Written to the folder `out`, RUN/scores by default, as `reasoning-rl.<domain>.<level>.<mode>.json`; one that is there,
    whole and of this checkpoint and these settings is returned as it is.
    """
    from glm_jax.evals import scores
    from glm_jax.train import checkpoint

    folder = Path(folder).resolve()
    run = checkpoint.load_run(folder)[0]
    home, name = _place(folder, run)
    about = {"checkpoint": name, "domain": domain, "level": level, "mode": scores.mode(thinking)}
    path = (out or home / scores.FOLDER) / f"{scores.name(about)}.json"
    evaluation = run.post.evaluation
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError, KeyError):
        there = checkpoint.read_json(path)
        wanted = evaluation.tasks, evaluation.answers, evaluation.temperature, *_model(folder, run).values()
        if (len(there["tasks"]), there["answers"], there["temperature"], there["fingerprint"], there["step"]) == wanted:
            return there
    found = _measure(folder, domain, level, thinking, evaluation)
    checkpoint.write_json(path, found)
    return found


def _place(folder: Path, run: Run) -> tuple[Path, str]:
    """(the run's folder, the checkpoint's name) of a stage folder: `reasoning-rl` of RUN/reasoning/rl."""
    folder = folder.resolve()
    nested = folder.parent.name in (*(expert.domain for expert in run.post.experts), "unified")
    return (folder.parent.parent, f"{folder.parent.name}-{folder.name}") if nested else (folder.parent, folder.name)


def _model(folder: Path, run: Run) -> dict[str, Any]:
    """Which weights are in a stage folder: `fingerprint` of its run, `step` of its last checkpoint."""
    from glm_jax.train import checkpoint

    steps = checkpoint.committed(folder)
    if not steps:
        raise ConfigError(f"{folder} holds no checkpoint yet; train it first")
    return {"fingerprint": fingerprint(run), "step": steps[-1]}


def _measure(folder: Path, domain: str, level: int, thinking: bool, evaluation: Evaluation) -> dict[str, Any]:
    """As `score`, always measured, and with any settings."""
    import jax

    from glm_jax import mesh
    from glm_jax.evals import scores
    from glm_jax.sample.engine import Sampling
    from glm_jax.train import checkpoint

    folder = Path(folder).resolve()
    run = checkpoint.load_run(folder)[0]
    about = _model(folder, run)
    experts = {expert.domain: expert for expert in run.post.experts}
    if domain not in experts:
        raise ConfigError(f"no expert for domain {domain!r} in this run; {nearest(domain, list(experts))}")
    grpo = experts[domain].grpo
    how = Sampling(evaluation.temperature, max_new_tokens=grpo.max_new_tokens, seed=run.loop.seed)
    with jax.set_mesh(mesh.make(run.mesh)):
        policy, many = _policy(folder, **about), {"tasks": evaluation.tasks, "answers": evaluation.answers}
        found = scores.measure(policy, domain, level, **many, how=how, tokens=grpo.max_tokens, thinking=thinking)
    return {"checkpoint": _place(folder, run)[1], **about, **found}


@functools.lru_cache(maxsize=1)
def _policy(folder: Path, *, fingerprint: str, step: int) -> "Policy":
    """The model of a stage's folder, kept for as long as it is the same: its scores are asked for one after the other."""
    from glm_jax.rl.rollout import load_policy

    return load_policy(folder)


if __name__ == "__main__":
    cli.main(main)
