"""What a run's folder tells of post-training: the logs of SFT and RL, the scores, the rejection sampling.

Beside its pre-training stages the folder holds DOMAIN/sft, DOMAIN/rl and DOMAIN/control (as much more SFT as RL drew
tokens) of every expert, DOMAIN/sft2 and DOMAIN/rl2 of its second round, unified/sft and unified/rl, scores/*.json and
unified/rejection.json. What is missing is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glm_jax.config import Expert, Run
from glm_jax.evals import scores
from glm_jax.evals.scores import DIRECT, THINKING, Score
from glm_jax.evals.told import read_optional
from glm_jax.train import checkpoint, metrics
from glm_jax.train.loop import RESULT_FILE

UNIFIED, REJECTION_FILE = "unified", "rejection.json"
SFT, CONTROL, RL = "sft", checkpoint.CONTROL, "rl"  # a stage's folder below its domain's
MISMATCH = {"mean": "mismatch_mean", "max": "mismatch_max", "k3": "k3"}  # in the report: in the log


@dataclass(frozen=True)
class Trained:
    """What one stage of SFT or RL has written."""

    domain: str  # or "unified"
    name: str
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    curriculum: list[dict[str, Any]]
    result: dict[str, Any]

    @property
    def checkpoint(self) -> str:
        return f"{self.domain}-{self.name}"

    @property
    def label(self) -> str:
        """Its name in a legend or a table; further rounds of an expert keep their folders' names."""
        more = {SFT: "", RL: "", CONTROL: ", more SFT"}
        return self.domain + more.get(self.name, f", {self.name}")

    @property
    def is_rl(self) -> bool:
        return any("reward" in step for step in self.steps)


@dataclass(frozen=True)
class Story:
    """All of a run's post-training, in its order."""

    trained: list[Trained]
    scores: list[Score]
    rejection: dict[str, Any]  # domain -> asked, answers, accepted, reasons

    def score(self, name: str, domain: str, level: int, mode: str = THINKING) -> Score | None:
        """The score of the checkpoint called `name`, None where it was not measured."""
        wanted = name, domain, level, mode
        return next((s for s in self.scores if (s["checkpoint"], s["domain"], s["level"], s["mode"]) == wanted), None)

    @property
    def final(self) -> str | None:
        """The last checkpoint of the unified model that was measured."""
        measured = {score["checkpoint"] for score in self.scores}
        return next((name for name in (f"{UNIFIED}-{RL}", f"{UNIFIED}-{SFT}") if name in measured), None)


def read(folder: Path, run: Run) -> Story:
    """The post-training of the run in `folder`."""
    order = [*(expert.domain for expert in run.post.experts), UNIFIED]
    trained = [_trained(path.parent) for domain in order for path in sorted(folder.glob(f"{domain}/*/log.jsonl"))]
    names = {SFT: 0, CONTROL: 1, RL: 2, f"{SFT}2": 3, f"{RL}2": 4}
    trained.sort(key=lambda each: (order.index(each.domain), names.get(each.name, len(names)), each.name))
    places = {each.checkpoint: i for i, each in enumerate(trained)}
    found = [checkpoint.read_json(path) for path in sorted((folder / scores.FOLDER).glob("*.json"))]
    found.sort(key=lambda score: places.get(score["checkpoint"], len(places)))
    return Story(trained, found, read_optional(folder / UNIFIED / REJECTION_FILE) or {})


def _trained(folder: Path) -> Trained:
    log = metrics.read(folder / "log.jsonl")
    steps, evaluations, curriculum = (
        [record for record in log if record["kind"] == kind] for kind in ("step", "eval", "curriculum")
    )
    result = read_optional(folder / RESULT_FILE) or {}
    return Trained(folder.parent.name, folder.name, steps, evaluations, curriculum, result)


def collect(run: Run, story: Story) -> dict[str, Any]:
    """What report.json gains: `scores`, `experts`, `unified`, `wellformed`, `thought`, `mismatch`; {} without any."""
    evaluation = run.post.evaluation
    domains = [expert.domain for expert in run.post.experts]
    levels = dict.fromkeys((evaluation.level, evaluation.harder_level))
    experts = [_expert(story, one, level) for one in run.post.experts for level in levels]
    found = {
        "scores": [_row(score) for score in story.scores],
        "experts": [row for row in experts if row],
        "unified": {d: row for d in domains if (row := _unified(story, d, evaluation.level))},
        "wellformed": _share(story, "wellformed", evaluation.level),
        "thought": _share(story, "thought", evaluation.level),
        "mismatch": _mismatch(story.trained),
    }
    return {name: value for name, value in found.items() if value}


def _row(score: Score) -> dict[str, Any]:
    mean, error = scores.pass_at_1(score)
    about = {name: score[name] for name in ("checkpoint", "domain", "level", "mode")}
    best = scores.pass_at_k(score, score["answers"])
    rounded = {"score": mean, "stderr": error, "pass_at_n": best, "length": score["length"]}
    return {**about, "n": len(score["tasks"]), **{name: round(value, 5) for name, value in rounded.items()}}


def _expert(story: Story, one: Expert, level: int) -> dict[str, Any] | None:
    """What RL bought an expert, and what as much more SFT did; differences are paired by task.

    `slips` is the share of the cold start's dialogues that were wrong on purpose: imitation reaches about 1 - slips at most.
    """
    sft, rl, more = (story.score(f"{one.domain}-{name}", one.domain, level) for name in (SFT, RL, CONTROL))
    if sft is None or rl is None:
        return None
    gain, error = scores.difference(rl, sft)
    row = {"sft": scores.pass_at_1(sft)[0], "rl": scores.pass_at_1(rl)[0], "gain": gain, "stderr": error}
    if more is not None:
        row["more_sft"] = scores.pass_at_1(more)[0]
        row["more_sft_gain"], row["more_sft_stderr"] = scores.difference(more, sft)
    more_sft = {"more_sft": None, "more_sft_gain": None, "more_sft_stderr": None}
    rounded = {name: round(value, 5) for name, value in row.items()}
    about = {"domain": one.domain, "level": level, "slips": one.sft.slips}
    return {**about, **more_sft, **rounded, "n": len(sft["tasks"])}


def _unified(story: Story, domain: str, level: int) -> dict[str, Any] | None:
    """The unified model against a domain's expert: `ratio` to its score after RL, `sft`: its score before."""
    if story.final is None:
        return None
    last = story.score(story.final, domain, level)
    taught = story.rejection.get(domain, {}).get("from", RL)  # by which of the expert's rounds
    sft, rl = (story.score(f"{domain}-{name}", domain, level) for name in (SFT, taught))
    if last is None or sft is None or rl is None:
        return None
    score, before, best = (scores.pass_at_1(each)[0] for each in (last, sft, rl))
    ratio = round(score / best, 5) if best else None
    return {"score": round(score, 5), "ratio": ratio, "sft": round(before, 5)}


def _share(story: Story, name: str, level: int) -> dict[str, float]:
    """Mode -> share of the unified model's answers, over all domains."""
    found = {}
    for mode in (THINKING, DIRECT):
        of = [s for s in story.scores if (s["checkpoint"], s["level"], s["mode"]) == (story.final, level, mode)]
        if of:
            answers = [len(score["tasks"]) * score["answers"] for score in of]
            found[mode] = round(float(np.average([score[name] for score in of], weights=answers)), 5)
    return found


def _mismatch(trained: Sequence[Trained]) -> dict[str, float]:
    """Sampler against trainer: the worst step of every RL run in which both compute with the same bits."""
    steps = [step for each in trained if each.is_rl for step in each.steps if not step.get("rollouts_in_8_bits")]
    return {name: max(step[field] for step in steps) for name, field in MISMATCH.items()} if steps else {}


def table(run: Run, story: Story) -> dict[int, dict[str, Any]]:
    """Level -> `columns` [(domain, mode)] and `rows` {checkpoint: score or None in each column}."""
    tables = {}
    domains = [expert.domain for expert in run.post.experts]
    for level in sorted({score["level"] for score in story.scores}):
        here = [_row(score) for score in story.scores if score["level"] == level]
        columns = [
            (domain, mode)
            for domain in domains
            for mode in (THINKING, DIRECT)
            if any((row["domain"], row["mode"]) == (domain, mode) for row in here)
        ]
        rows = {
            name: [
                next((r for r in here if (r["checkpoint"], r["domain"], r["mode"]) == (name, *column)), None)
                for column in columns
            ]
            for name in dict.fromkeys(row["checkpoint"] for row in here)
        }
        tables[level] = {"columns": columns, "rows": rows}
    return tables


def rl_runs(story: Story) -> list[dict[str, Any]]:
    """What each RL run drew and learnt from."""
    rows = []
    for each in story.trained:
        if not each.is_rl:
            continue
        names = ("sampled_tokens", "groups", "groups_varying")
        total = {name: sum(step[name] for step in each.steps) for name in names}
        worst = {name: max(step[field] for step in each.steps) for name, field in MISMATCH.items()}
        clipped = float(np.mean([step["clipped"] for step in each.steps if step["groups_varying"]] or [0.0]))
        seconds = each.result.get("seconds", each.steps[-1]["seconds"])
        about = {
            "name": each.label,
            "steps": len(each.steps),
            "seconds": seconds,
            "clipped": clipped,
        }
        rows.append({**about, **total, **worst, "curriculum": each.curriculum[-1] if each.curriculum else None})
    return rows


def dialogues(run: Run, story: Story) -> list[dict[str, Any]]:
    """Of each domain and mode one dialogue of the unified model (or else of the domain's expert), one that earned a
    reward if there is one: {domain, mode, checkpoint, tools, messages, reward, reason}."""
    found = []
    for domain in (expert.domain for expert in run.post.experts):
        for mode in (THINKING, DIRECT):
            for name in (story.final, f"{domain}-{RL}", f"{domain}-{SFT}"):
                score = story.score(name, domain, run.post.evaluation.level, mode) if name else None
                if score and score["samples"]:
                    best = max(score["samples"], key=lambda sample: sample["reward"])
                    found.append({"domain": domain, "mode": mode, "checkpoint": name, **best})
                    break
    return found
