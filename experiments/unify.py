"""Unification: the experts' accepted answers distilled into one hybrid model, then general RL on all their tasks.

    python -m experiments.unify --from runs/a                  # RUN/*/rl -> RUN/unified/sft -> RUN/unified/rl

Every expert answers fresh prompts of its domain; rejection sampling keeps what is well formed, long enough, not
repetitive and verified (counts per reason in RUN/unified/rejection.json). A share of the kept answers is told again without
reasoning. The mid-trained model, not an expert, is fine-tuned on them, and GRPO goes on with tasks of all domains in
both modes.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import cli, grpo, sft
from glm_jax.config import ConfigError, Expert, Run

if TYPE_CHECKING:
    from glm_jax.data.dialogues import Dialogue
    from glm_jax.distill.rejection import Accepted

REJECTION_FILE = "rejection.json"
FRESH_SEED = 10**8  # of the prompts: far beyond what RL has drawn


@dataclass(frozen=True)
class Args:
    """Options of unification."""

    from_: cli.From = None
    """The run's folder, which holds the mid-trained model and every expert's RL."""


def main(args: Args, run: Run) -> dict[str, Any]:
    """Distil the experts and train the unified model; returns the result of its RL."""
    folder = cli.given(args.from_, "a run with its experts")
    if not run.post.experts:
        raise ConfigError(f"recipe {run.name!r} has no experts to unify; {sft.NO_EXPERTS}")
    for one in run.post.experts:
        for done, work in answers_part(run, one, folder):
            if not (folder / done).exists():
                work()
    fine_tune(run, folder)
    return reinforce(run, folder)


def answers_file(one: Expert) -> str:
    """Where, in the run's folder, an expert's accepted answers stand."""
    return f"unified/answers/{one.domain}.json"


def answers_part(run: Run, one: Expert, folder: Path) -> list[tuple[str, Callable[[], None]]]:
    """The part that makes them; none where the unified model has been taught already."""
    from glm_jax.train import loop

    taught = (folder / "unified" / "sft" / loop.RESULT_FILE).exists()
    return [] if taught else [(answers_file(one), partial(ask, run, one, folder))]


def ask(run: Run, one: Expert, folder: Path) -> None:
    """Write what the expert answers to fresh prompts and rejection sampling accepts, a share of it told again in direct mode."""
    from glm_jax.train import checkpoint

    unify, last = run.post.unify, last_rl(folder / one.domain)
    expert = _fingerprint(last)
    prompts = max(1, round(unify.prompts * one.unify_share))
    found = answers(run, one, last, unify.grpo.levels, prompts)
    dialogues = [dialogue.whole() for dialogue in told(found, one.direct_share)]
    described = {"from": last.name, "expert": expert, **found.record()}
    checkpoint.write_json(folder / answers_file(one), {**described, "dialogues": dialogues})


def _fingerprint(expert: Path) -> str:
    """Of the training that made an expert: another expert's answers are not taught in its place."""
    from glm_jax.train import loop

    result = expert / loop.RESULT_FILE
    if not result.exists():
        raise ConfigError(
            f"{expert} has no {loop.RESULT_FILE}: its RL has not ended; run experiments.grpo, which continues it"
        )
    return hashlib.sha256(result.read_bytes()).hexdigest()[:12]


def fine_tune(run: Run, folder: Path) -> dict[str, Any]:
    """SFT of the mid-trained base on the experts' accepted answers, in RUN/unified/sft."""
    from glm_jax.data.dialogues import Dialogue
    from glm_jax.train import checkpoint, loop

    out = folder / "unified" / "sft"
    if (out / loop.RESULT_FILE).exists():
        return checkpoint.read_json(out / loop.RESULT_FILE)
    counts = {one.domain: checkpoint.read_json(folder / answers_file(one)) for one in run.post.experts}
    for domain, count in counts.items():
        if count.pop("expert") != _fingerprint(last_rl(folder / domain)):
            raise ConfigError(
                f"{folder}/unified/answers/{domain}.json is of another expert than {domain} now is; delete it"
            )
    accepted = {
        domain: [Dialogue.from_whole(whole) for whole in count.pop("dialogues")] for domain, count in counts.items()
    }
    checkpoint.write_json(folder / "unified" / REJECTION_FILE, counts)
    for domain, count in counts.items():
        print(f"{domain}: {count['accepted']} of {count['answers']} answers accepted; {count['reasons']}", flush=True)
    empty = [domain for domain, count in counts.items() if not count["accepted"]]
    if len(empty) == len(counts):
        raise ConfigError(
            f"no answer of {', '.join(empty)} was accepted: there is nothing to teach; train the experts for longer, or "
            "raise post.unify.prompts"
        )
    if empty:
        print(f"nothing was accepted of {', '.join(empty)}: the unified model is not taught it", flush=True)
    training, validation = split(accepted, run.post.unify.sft.held_out)
    return sft.train(run, run.post.unify.sft, training, validation, out, checkpoint.stage_folder(folder))


def cold_start_again(run: Run, one: Expert, folder: Path) -> dict[str, Any]:
    """Iterative self-distillation (report, section 3.3): the mid-trained model fine-tuned on an expert's own accepted
    answers, in RUN/DOMAIN/sft2."""
    from glm_jax.train import checkpoint

    home = folder / one.domain
    found = answers(run, one, home / "rl", one.sft_levels, one.sft.dialogues, FRESH_SEED * 2)
    checkpoint.write_json(home / REJECTION_FILE, {one.domain: found.record()})
    if not found.samples:
        raise ConfigError(
            f"no answer of {home / 'rl'} was accepted, so there is nothing to distil; train it for longer"
        )
    training, validation = split({one.domain: told(found, direct_share=0.0)}, one.sft.held_out)
    return sft.train(run, one.sft, training, validation, home / "sft2", checkpoint.stage_folder(folder))


def reinforce(run: Run, folder: Path) -> dict[str, Any]:
    """General RL on the tasks of all domains, in RUN/unified/rl."""
    sources = [(one.domain, level) for one in run.post.experts for level in run.post.unify.grpo.levels]
    return grpo.train(run, run.post.unify.grpo, sources, folder / "unified" / "rl", folder / "unified" / "sft")


def last_rl(home: Path) -> Path:
    """An expert's RL: the second round's, where there was one."""
    from glm_jax.train import loop

    again = home / "rl2"
    return again if (again / loop.RESULT_FILE).exists() else home / "rl"


def answers(
    run: Run, one: Expert, folder: Path, levels: Sequence[int], prompts: int, first_seed: int = FRESH_SEED
) -> "Accepted":
    """What an expert, in its stage folder, answers to training prompts of `levels` from `first_seed` on, filtered."""
    import jax

    from glm_jax import mesh
    from glm_jax.distill.rejection import filtered
    from glm_jax.rl.collect import sample_groups
    from glm_jax.rl.curriculum import Problems
    from glm_jax.rl.rollout import load_policy

    unify = run.post.unify
    problems = Problems([(one.domain, level) for level in levels], first_seed).take(prompts)
    with jax.set_mesh(mesh.make(run.mesh)):
        groups = sample_groups(load_policy(folder), problems, unify.answers, one.grpo, run.loop.seed)
    return filtered(groups, unify.keep, unify.min_answer_tokens)


def told(found: "Accepted", direct_share: float) -> list["Dialogue"]:
    """Accepted answers as dialogues, that share of them without their thoughts."""
    from glm_jax.distill.rejection import dialogues

    return list(dialogues(found.samples, direct_share))


def split(accepted: Mapping[str, Sequence["Dialogue"]], held_out: int) -> tuple[list["Dialogue"], list["Dialogue"]]:
    """(training, validation) dialogues of all domains, in both modes; `held_out` of them for validation."""
    training, validation = [], []
    for found in accepted.values():
        count = min(held_out // len(accepted), max(1, len(found) // 10), len(found) - 1) if found else 0
        validation += found[:count]
        training += found[count:]
    return training, validation


if __name__ == "__main__":
    cli.main(main)
