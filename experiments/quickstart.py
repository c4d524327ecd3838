"""The whole story in miniature on this machine: documents, both pre-training stages, mid-training, three experts and
their RL, one unified model, a report to look at.

    python -m experiments.quickstart --recipe tiny --out runs/quickstart      (the longest part is post-training)
    python -m experiments.quickstart --recipe smoke --out runs/smoke          (the same code in a few steps of each)

It calls the functions of experiments.data, pretrain, midtrain, posttrain and evaluate; on CPUs experts are trained side by side.
Run it again to go on where it was interrupted: finished parts are skipped. OUT/report.html needs no network and no other
file; OUT/report.json has the figures. `python -m experiments.report --run OUT` writes both again from the folder alone.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from experiments import cli, jobs, recipes
from experiments.jobs import Job, Part
from glm_jax.config import ConfigError, Run, diff

SAMPLE_TOKENS = 96
PROMPT_CHARS = 160  # of a held-out document, up to the end of the line
TRUTH_CHARS = 320
SAVE_SECONDS = 10.0  # between two writings of the clock
OWN_PROMPTS = ("The purpose of this module is", "def factorial(n):\n", "class Stack:\n    ")


@dataclass(frozen=True)
class Args:
    """Options of the quickstart."""

    out: Path = Path("runs/quickstart")
    """The run's folder."""


def main(args: Args, run: Run) -> None:
    from experiments import posttrain
    from glm_jax.evals import report
    from glm_jax.train import loop

    _check(args.out, run)
    loop.check_layout(run, *run.stages)
    clock = _Clock(args.out / report.PROCESS_FILE, {"diff": _changes(run)})
    devices = jobs.cpu_devices(run, *(stage.microbatch_rows for stage in run.stages))
    base = Job("base", tuple(_base(run, args.out)), devices=devices)
    jobs.run([base, *posttrain.plan(run, args.out, needs=(base.name,))], args.out, clock.tick)
    clock.save()
    print(report.summary(report.write(args.out)))
    print(f"\n{args.out / report.HTML_FILE}")


def _base(run: Run, out: Path) -> Iterator[Part]:
    """From documents to the mid-trained model, with samples on the way and its place among compressors."""
    from experiments import pretrain
    from glm_jax.evals import report, told
    from glm_jax.train import loop

    for stage in run.stages:
        yield f"{stage.name}/{loop.RESULT_FILE}", partial(pretrain.train, run, stage, out, None, None)
        if stage in (run.stages[0], run.stages[-1]):
            yield f"{stage.name}/{told.SAMPLES_FILE}", partial(_write_samples, out / stage.name)
    yield report.EVALUATION_FILE, partial(_compare, out / run.stages[-1].name, out / report.EVALUATION_FILE)


def _compare(last: Path, out: Path) -> None:
    """Write the mid-trained model's bits per byte beside compressors'."""
    from experiments import evaluate
    from glm_jax.train import checkpoint

    checkpoint.write_json(out, evaluate.compare(last))


class _Clock:
    """Wall time and memory of all processes that worked on a run, kept in its folder."""

    def __init__(self, path: Path, facts: dict[str, Any]):
        from glm_jax.train import checkpoint

        self._path, self._facts, self._begun = path, facts, time.monotonic()
        before = checkpoint.read_json(path) if path.exists() else {"seconds": 0.0, "peak_rss_gb": 0.0}
        self._before, self._peak, self._saved = before["seconds"], before["peak_rss_gb"], 0.0
        self._worked = not path.exists()

    def tick(self) -> None:
        """To be called while there is work: where nothing was left to do, nothing is added."""
        self._worked = True
        self._peak = max(self._peak, jobs.memory_gb(), cli.peak_rss_gb())
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        from glm_jax.train import checkpoint

        if not self._worked:
            return
        self._saved = time.monotonic()
        told = {"seconds": round(self._before + self._saved - self._begun, 1), "peak_rss_gb": round(self._peak, 3)}
        checkpoint.write_json(self._path, {**self._facts, **told})


def _check(out: Path, run: Run) -> None:
    """Refuse a folder that holds stages of another run: the report must be of one."""
    from glm_jax.train import checkpoint

    for stage in run.stages:
        if not (out / stage.name / checkpoint.RUN_FILE).exists():
            continue
        if changed := diff(run, checkpoint.load_run(out / stage.name)[0]):
            told = ", ".join(f"{path} {theirs} there, {ours} now" for path, (theirs, ours) in changed.items())
            raise ConfigError(
                f"{out / stage.name} was made by another run: {told}; give another --out, or delete {out}"
            )
    for path in out.glob(f"*/*/{checkpoint.RUN_FILE}"):
        if changed := diff(run.post, checkpoint.load_run(path.parent)[0].post):
            told = ", ".join(f"post.{name} {theirs} there, {ours} now" for name, (theirs, ours) in changed.items())
            raise ConfigError(f"{path.parent} was made with other settings: {told}; delete it, or give another --out")


def _changes(run: Run) -> dict[str, list[Any]]:
    """Field -> [the recipe's value, this run's]."""
    recipe = recipes.RECIPES.get(run.name)
    return {path: list(both) for path, both in diff(run, recipe()).items()} if recipe else {}


def _write_samples(folder: Path) -> None:
    """Let the stage's model continue held-out documents (the true continuation stands beside) and our own prompts."""
    from glm_jax.data.document import DOMAINS
    from glm_jax.data.heldout import read_held_out
    from glm_jax.data.prepare import load_tokenizer
    from glm_jax.evals import told
    from glm_jax.sample import engine
    from glm_jax.train import checkpoint

    run, params, router_bias_LE, data = checkpoint.load_params(folder)
    tokenizer = load_tokenizer(data)
    samples: list[dict[str, Any]] = []
    prompts: list[str] = []
    for domain in DOMAINS:
        for text in (document.text for document in read_held_out(data, domain)):
            end = text.find("\n", PROMPT_CHARS) + 1
            if 0 < end < min(2 * PROMPT_CHARS, len(text) - TRUTH_CHARS):
                samples.append({"source": f"held-out {domain}", "truth": text[end : end + TRUTH_CHARS]})
                prompts.append(text[:end])
                break
    samples += [{"source": "a prompt of ours", "truth": None} for _ in OWN_PROMPTS]
    prompts += OWN_PROMPTS
    settings = engine.Sampling(temperature=0.7, top_p=0.95, max_new_tokens=SAMPLE_TOKENS, stop_ids=(tokenizer.end,))
    ids = [[tokenizer.end, *prompt] for prompt in tokenizer.encode_batch(prompts)]
    done = engine.generate(run.model, params, router_bias_LE, ids, settings=settings)
    for sample, prompt, completion in zip(samples, prompts, done, strict=True):
        sample |= {"prompt": prompt, "ended": completion.finish == "stop"}
        sample["continuation"] = tokenizer.decode(completion.ids, skip_special=True)
    described = {"temperature": settings.temperature, "top_p": settings.top_p, "samples": samples}
    checkpoint.write_json(folder / told.SAMPLES_FILE, described)


if __name__ == "__main__":
    cli.main(main)
