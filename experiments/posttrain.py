"""The whole of post-training: experts, their RL, one unified model, and what each step bought.

    python -m experiments.posttrain --from runs/a

For each expert of the recipe: cold-start SFT from the mid-trained model, as much more SFT as RL will sample (the control
that RL must beat), GRPO; with --post.self_distillation a second round, whose cold start is the expert's own accepted
answers and whose RL has harder tasks (DOMAIN/sft2, DOMAIN/rl2). Then unification: rejection sampling, SFT from the
mid-trained model, general RL. Every checkpoint is scored on held-out tasks. Run it again to go on where it was
interrupted: what has been made is skipped.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from experiments import cli
from glm_jax.config import Expert, Run

Part = tuple[str, Callable[[], Any]]  # the file, in the run's folder, that is there when it is done; what makes it


@dataclass(frozen=True)
class Args:
    """Options of post-training."""

    from_: cli.From = None
    """The run's folder, with a mid-trained model in it. Its settings are taken over; overrides apply on top."""


def main(args: Args, run: Run) -> None:
    """Run every part that is not there yet."""
    folder = cli.given(args.from_, "a trained run")
    for done, work in parts(run, folder):
        print(f"{done.removesuffix('.json')}{'  is there' if (folder / done).exists() else ''}", flush=True)
        if not (folder / done).exists():
            work()


def parts(run: Run, folder: Path) -> Iterator[Part]:
    """Everything that post-training does in a run's folder, in order."""
    from experiments import sft, unify

    for one in run.post.experts:  # all of them before the first hour of training
        sft.check_slips(one)
    base = folder / run.stages[-1].name
    for one in run.post.experts:
        home = folder / one.domain
        yield f"{one.domain}/sft/result.json", partial(_afresh, partial(cold_start, run, one, base, home / "sft"))
        yield f"{one.domain}/rl/result.json", partial(reinforce, run, one, one.grpo.levels, home, "")
        yield f"{one.domain}/control/result.json", partial(control, run, one, home)
        names = ["sft", "rl", "control"]
        if run.post.self_distillation:
            yield f"{one.domain}/sft2/result.json", partial(unify.cold_start_again, run, one, folder)
            yield f"{one.domain}/rl2/result.json", partial(reinforce, run, one, harder(one), home, "2")
            names += ["sft2", "rl2"]
        for name in names:
            for level in (run.post.evaluation.level, run.post.evaluation.harder_level):
                yield score(folder, f"{one.domain}/{name}", one.domain, level, True)
    if not run.post.experts:
        return
    yield "unified/sft/result.json", partial(_afresh, partial(unify.fine_tune, run, folder))
    yield "unified/rl/result.json", partial(unify.reinforce, run, folder)
    for name in ("sft", "rl"):
        for one in run.post.experts:
            for thinking in (True, False):
                yield score(folder, f"unified/{name}", one.domain, run.post.evaluation.level, thinking)


def _afresh(work: Callable[[], Any]) -> Any:
    """Do `work` without the programs that were compiled before it: they hold memory, and few of them will be called again."""
    import jax

    jax.clear_caches()
    return work()


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
