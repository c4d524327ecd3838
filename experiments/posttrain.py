"""The whole of post-training: experts, their RL, one unified model, and what each step bought.

    python -m experiments.posttrain --from runs/a

For each expert of the recipe: cold-start SFT from the mid-trained model, as much more SFT as RL will sample (the control
that RL must beat), GRPO; with --post.self_distillation a second round, whose cold start is the expert's own accepted
answers and whose RL has harder tasks (DOMAIN/sft2, DOMAIN/rl2). Then unification: rejection sampling, SFT from the
mid-trained model, general RL. Every checkpoint is scored on held-out tasks. Run it again to go on where it was
interrupted: what has been made is skipped.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from experiments import cli, jobs
from experiments.jobs import Job, Part
from glm_jax.config import ConfigError, Expert, Run


@dataclass(frozen=True)
class Args:
    """Options of post-training."""

    from_: cli.From = None
    """The run's folder, with a mid-trained model in it. Its settings are taken over; overrides apply on top."""


def main(args: Args, run: Run) -> None:
    """Run every part that is not there yet."""
    from experiments import sft

    folder = cli.given(args.from_, "a trained run")
    if not run.post.experts:
        raise ConfigError(f"recipe {run.name!r} has no experts to train; {sft.NO_EXPERTS}")
    jobs.run(plan(run, folder), folder)


def plan(run: Run, folder: Path, needs: tuple[str, ...] = ()) -> list[Job]:
    """Everything that post-training does in a run's folder. Experts know nothing of each other, and take a share of the
    machine; `needs` are the jobs that make the mid-trained model."""
    from experiments import sft, unify

    experts, level = run.post.experts, run.post.evaluation.level
    for one in experts:  # all of them before the first hour of training
        sft.check_slips(one)
    if not experts:
        return []
    names = ("sft", "rl", "sft2", "rl2") if run.post.self_distillation else ("sft", "rl")
    made: list[Job] = []
    for one in experts:
        parts = (*train(run, one, folder), *unify.answers_part(run, one, folder))
        made.append(Job(one.domain, parts, needs, whole=False))
    for one in experts:  # behind all experts: they are what the unified model waits for, and these fill the gaps
        compared = (f"{one.domain}/control/result.json", partial(control, run, one, folder / one.domain))
        for job, parts in (
            ("scores", scores_of(run, one, folder, names)),
            ("control", (compared, *scores_of(run, one, folder, ("control",)))),
        ):
            made.append(Job(f"{one.domain} {job}", tuple(parts), (one.domain,), whole=False))
    unified: list[Part] = [
        ("unified/sft/result.json", partial(unify.fine_tune, run, folder)),
        ("unified/rl/result.json", partial(unify.reinforce, run, folder)),
    ]
    rows = (run.post.unify.sft.microbatch_rows, run.post.unify.grpo.microbatch_rows)
    domains = tuple(one.domain for one in experts)
    made.append(Job("unified", tuple(unified), domains, devices=jobs.cpu_devices(run, *rows)))
    for name in ("sft", "rl"):
        parts = [score(folder, f"unified/{name}", one.domain, level, mode) for one in experts for mode in (True, False)]
        made.append(Job(f"unified {name} scores", tuple(parts), ("unified",), whole=False))
    return made


def train(run: Run, one: Expert, folder: Path) -> Iterator[Part]:
    """An expert: cold start and RL, and a second round of both where the run has one."""
    from experiments import unify

    home = folder / one.domain
    base = folder / run.stages[-1].name
    yield f"{one.domain}/sft/result.json", partial(cold_start, run, one, base, home / "sft")
    yield f"{one.domain}/rl/result.json", partial(reinforce, run, one, one.grpo.levels, home, "")
    if run.post.self_distillation:
        yield f"{one.domain}/sft2/result.json", partial(unify.cold_start_again, run, one, folder)
        yield f"{one.domain}/rl2/result.json", partial(reinforce, run, one, harder(one), home, "2")


def scores_of(run: Run, one: Expert, folder: Path, names: Iterable[str]) -> Iterator[Part]:
    """Scores of an expert's checkpoints on held-out tasks of its domain, and on harder ones."""
    for name in names:
        for level in (run.post.evaluation.level, run.post.evaluation.harder_level):
            yield score(folder, f"{one.domain}/{name}", one.domain, level, True)


def cold_start(run: Run, one: Expert, base: Path, out: Path) -> dict[str, Any]:
    """An expert's SFT on its oracle's dialogues."""
    from experiments import sft

    return sft.train(run, one.sft, *sft.oracle_dialogues(one), out, base)


def reinforce(run: Run, one: Expert, levels: Iterable[int], home: Path, turn: str) -> dict[str, Any]:
    """An expert's RL on tasks of `levels`; `turn` is what its folders' names end in."""
    from experiments import grpo

    return grpo.train(run, one.grpo, [(one.domain, level) for level in levels], home / f"rl{turn}", home / f"sft{turn}")


def harder(one: Expert) -> Iterable[int]:
    """The levels of an expert's RL in a second round: each one harder, where the environment has it."""
    from glm_jax import envs

    known = envs.get(one.domain).levels
    return dict.fromkeys(level + 1 if level + 1 in known else level for level in one.grpo.levels)


def control(run: Run, one: Expert, home: Path) -> dict[str, Any]:
    """The SFT model fine-tuned on its dialogues for as many more tokens as RL sampled."""
    from experiments import sft
    from glm_jax.train import checkpoint

    sampled = checkpoint.read_json(home / "rl" / "result.json")["sampled_tokens"]
    before = checkpoint.read_json(home / "sft" / "result.json")
    settings = dataclasses.replace(one.sft, epochs=one.sft.epochs * sampled / before["tokens"])
    return sft.train(run, settings, *sft.oracle_dialogues(one), home / checkpoint.CONTROL, home / "sft")


def score(folder: Path, checkpoint: str, domain: str, level: int, thinking: bool) -> Part:
    """A checkpoint's score on one domain's held-out tasks."""
    from experiments import evaluate
    from glm_jax.evals import scores

    about = {
        "checkpoint": checkpoint.replace("/", "-"),
        "domain": domain,
        "level": level,
        "mode": scores.mode(thinking),
    }
    done = f"{scores.FOLDER}/{scores.name(about)}.json"
    return done, partial(evaluate.score, folder / checkpoint, domain, level, thinking)


if __name__ == "__main__":
    cli.main(main)
