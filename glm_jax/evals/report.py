"""What a run shows: `report.json` with the figures and `report.html` to look at, made from the run's folder alone.

The folder holds a folder per stage (run.json, log.jsonl, result.json, and samples.json where samples were drawn), the
data folder with its manifest, evaluation.json (the mid-trained model beside zlib and an order-3 model), process.json
(what only the process knew: wall time, memory, changes from the recipe), and what `posttraining` reads. What is missing is
left out of the report.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from glm_jax import config, model, spec
from glm_jax.config import Run
from glm_jax.data.document import write as write_text
from glm_jax.data.prepare import read_manifest
from glm_jax.evals import bars, figures, posttraining, rl_figures
from glm_jax.evals.bars import LOAD_STEPS
from glm_jax.evals.posttraining import Story
from glm_jax.evals.told import Told, read, read_optional
from glm_jax.model import counts
from glm_jax.train import checkpoint

JSON_FILE, HTML_FILE = "report.json", "report.html"
EVALUATION_FILE, PROCESS_FILE = "evaluation.json", "process.json"


def write(folder: Path) -> dict[str, Any]:
    """Write report.json and report.html into a run's folder; returns what report.json holds."""
    folder = Path(folder)
    run, told, data = read(folder)
    story = posttraining.read(folder, run)
    found = collect(folder, run, told, story)
    checkpoint.write_json(folder / JSON_FILE, found)
    write_text(folder / HTML_FILE, render(found, run, told, story, read_manifest(data)))
    return found


def collect(folder: Path, run: Run, told: Sequence[Told], story: Story) -> dict[str, Any]:
    """The content of report.json. Bits per byte are held out; seconds are wall time; rates are tokens per second."""
    process, evaluation = read_optional(folder / PROCESS_FILE) or {}, read_optional(folder / EVALUATION_FILE) or {}
    stages = [_stage(each) for each in told]
    last, about = stages[-1], told[-1].about
    seconds = sum(stage["seconds"] for stage in stages)
    tokens = sum(stage["tokens"] for stage in stages)
    total, active = parameters(run.model)
    found = {
        "recipe": run.name,
        "fingerprint": config.fingerprint(run),
        "commit": about.get("commit"),
        "devices": about.get("devices"),
        "jax": about.get("jax"),
        "changes": process.get("diff", {}),
        "parameters": total,
        "active_parameters": active,
        "stages": stages,
        "bits_per_byte": evaluation.get("bits_per_byte"),
        "bits_per_byte_of": {name: evaluation.get(name) for name in ("documents", "bytes")},
        "expert_load": last["expert_load"],
        "expert_load_by_layer": last["expert_load_by_layer"],
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        "peak_rss_gb": process.get("peak_rss_gb"),
        "seconds": process.get("seconds", round(seconds, 1)),
        **posttraining.collect(run, story),
    }
    return {**found, "bars": [bar for judged in _bars(found, run).values() for bar in judged]}


def _bars(found: dict[str, Any], run: Run) -> dict[str, list[dict[str, Any]]]:
    """By part of the story."""
    return {
        "pretraining": bars.pretraining(found, with_posttraining=bool(run.post.experts)),
        "experts": bars.experts(found),
        "unified": bars.unified(found),
    }


def parameters(cfg: config.Model) -> tuple[int, int]:
    """All parameters, and those that one token uses: A of E experts."""
    weights = [declared for _, declared in spec.leaves(model.specs(cfg))]
    return sum(w.count for w in weights), sum(counts.used(cfg, w) for w in weights)


def expert_load(steps: Sequence[dict[str, Any]]) -> list[float]:
    """Per MoE layer (the MTP layer last) the largest over the mean count of its experts, summed over the last steps.

    Where a log has no counts, the mean of the steps' own ratios: never less than the ratio of the sums.
    """
    recent = steps[-LOAD_STEPS:]
    if recent and "load" in recent[0]:
        counts_LE = np.sum([step["load"] for step in recent], axis=0)
        ratios = counts_LE.max(axis=1) / counts_LE.mean(axis=1)
    else:
        ratios = np.mean([step["load_max_over_mean"] for step in recent], axis=0) if recent else np.zeros(0)
    return [round(float(ratio), 4) for ratio in ratios]


def rates(steps: Sequence[dict[str, Any]]) -> np.ndarray:
    """Tokens per second of each step but the first, which waits for compilation."""
    seconds, tokens = (np.array([step[name] for step in steps], float) for name in ("seconds", "batch_tokens"))
    return tokens[1:] / np.maximum(np.diff(seconds), 1e-9)


def _stage(told: Told) -> dict[str, Any]:
    bits = {evaluation["when"]: evaluation["bits_per_byte"] for evaluation in told.evaluations}
    start, end = bits.get("start", {}), bits.get("end", {})
    loads = expert_load(told.steps)
    return {
        "name": told.stage.name,
        "seconds": told.result.get("seconds", told.steps[-1]["seconds"] if told.steps else 0.0),
        "tokens": told.result.get("tokens", sum(step["batch_tokens"] for step in told.steps)),
        "steps": len(told.steps),
        "tokens_per_second": told.result.get("tokens_per_second"),
        "tokens_per_second_median": round(statistics.median(rates(told.steps)), 1) if len(told.steps) > 1 else None,
        "domain": told.domain,
        "start": start.get(told.domain),
        "end": end.get(told.domain),
        "domains": {name: {"start": start[name], "end": end.get(name)} for name in start},
        "expert_load": max(loads, default=None),
        "expert_load_by_layer": loads,
    }


def summary(found: dict[str, Any]) -> str:
    """The report in a screenful of plain text."""
    lines = [
        "",
        f"{'stage':<12}{'tokens':>10}{'seconds':>9}{'tokens/s':>10}   held-out bits per byte       expert load",
    ]
    for stage in found["stages"]:
        start, end = (f"{value:.3f}" if value is not None else "-" for value in (stage["start"], stage["end"]))
        rate, load = stage["tokens_per_second"] or 0, stage["expert_load"] or 0
        row = f"{stage['name']:<12}{stage['tokens']:>10,}{stage['seconds']:>9.0f}{rate:>10,.0f}"
        lines.append(f"{row}   {stage['domain']:<10} {start:>6} -> {end:<6}{load:>16.2f}")
    if found["bits_per_byte"]:
        paid = found["bits_per_byte"]
        lines += [
            "",
            f"standard library, held out: model {paid['model']:.3f}, zlib -9 {paid['zlib']:.3f}, order-3 bytes {paid['order3']:.3f}",
        ]
    lines += _told_experts(found)
    lines += ["", f"{'':<86}{'value':>8}   has to be"]
    for bar in found["bars"]:
        rule, bound = bars.rule_and_bound(bar)
        told = f"{bar['what']:<80}{bar['value']:>8.3g}   {rule} {bound:.4g}"
        lines.append(f"{'ok  ' if bar['met'] else 'MISS'}  {told}")
    return "\n".join(lines)


def _told_experts(found: dict[str, Any]) -> list[str]:
    """A line for each expert and level, and the unified model's score beside the level that it was measured on."""
    experts = found.get("experts", [])
    if not experts:
        return []
    lines = [
        "",
        f"{'domain':<12}{'level':>6}{'SFT':>8}{'more SFT':>10}{'RL':>8}   gain of RL{'':<8}{'tasks':>7}{'unified':>9}",
    ]
    level = experts[0]["level"]
    for row in experts:
        more = f"{row['more_sft']:.3f}" if row["more_sft"] is not None else "-"
        unified = found.get("unified", {}).get(row["domain"], {}) if row["level"] == level else {}
        last = f"{unified['score']:.3f}" if unified else "-"
        gain = f"{row['gain']:+.3f} ± {row['stderr']:.3f}"
        start = f"{row['domain']:<12}{row['level']:>6}{row['sft']:>8.3f}{more:>10}{row['rl']:>8.3f}"
        lines.append(f"{start}   {gain:<18}{row['n']:>7}{last:>9}")
    return lines


def render(found: dict[str, Any], run: Run, told: Sequence[Told], story: Story, manifest: dict[str, Any]) -> str:
    """One page without anything from outside."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("glm_jax.evals", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    return environment.get_template("report.html.jinja").render(
        found=found,
        manifest=manifest,
        told=told,
        curves=figures.curves(told),
        experts=figures.experts(run, told),
        settings=_settings(run, found["changes"]),
        layers=figures.layer_names(run),
        load_steps=LOAD_STEPS,
        bars={part: [(bar, *bars.rule_and_bound(bar)) for bar in judged] for part, judged in _bars(found, run).items()},
        story=_story(run, story) if story.trained or story.scores else None,
    )


def _story(run: Run, story: Story) -> dict[str, Any]:
    """What the page shows of post-training."""
    return {
        "curves": rl_figures.curves(story),
        "tables": posttraining.table(run, story),
        "runs": posttraining.rl_runs(story),
        "dialogues": posttraining.dialogues(run, story),
        "rejection": story.rejection,
        "level": run.post.evaluation.level,
    }


def _settings(run: Run, changes: dict[str, Any]) -> dict[str, list[tuple[str, Any, Any]]]:
    """Group -> (field, value, the recipe's value where it differs) of every leaf of the configuration."""
    groups: dict[str, list[tuple[str, Any, Any]]] = {}
    for path, value in config.flatten(run).items():
        group, _, field = path.rpartition(".")
        was = changes[path][0] if path in changes else None
        groups.setdefault(group or "run", []).append((field, value, was))
    return groups
