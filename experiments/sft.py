"""Supervised fine-tuning on dialogues: an expert's cold start, from the mid-trained model.

    python -m experiments.sft --from runs/a --domain reasoning
    python -m experiments.sft --from runs/a --dialogues my.jsonl --out runs/a/mine

Without --dialogues the oracle of the domain's environment writes them (tasks of held-out prompts left out); with it,
each line of the file is {"messages": [...], "tools": [...]?, "enable_thinking": true?} in OpenAI's form. Only what the
assistant says is trained, with the role token that ends its turn. RUN/DOMAIN/sft is a stage's folder like any other:
the same command continues it, experiments.chat talks to it, experiments.grpo goes on from it.
"""

import dataclasses
import itertools
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import cli
from glm_jax.config import SFT, ConfigError, Expert, Run, Stage, nearest

if TYPE_CHECKING:
    from glm_jax.data.dialogues import Dialogue
    from glm_jax.text.tokenizer import Tokenizer


NO_EXPERTS = "it has none: give a recipe post.experts, as experiments/recipes/tiny.py does"


@dataclass(frozen=True)
class Args:
    """Options of supervised fine-tuning."""

    from_: cli.From = None
    """The run's folder, or a stage's, whose weights to begin with. Its settings are taken over."""
    domain: str = "reasoning"
    """Expert of the recipe: its SFT settings, and the environment whose oracle writes the dialogues. With --dialogues a recipe needs
    none: its settings are then those of post.unify.sft."""
    dialogues: Path | None = None
    """JSON lines to train on instead of the oracle's dialogues."""
    out: Path | None = None
    """The stage's folder; by default RUN/DOMAIN/sft."""


def main(args: Args, run: Run) -> dict[str, Any]:
    """Fine-tune; returns the stage's result."""
    from experiments import pretrain
    from glm_jax.data.prepare import load_tokenizer
    from glm_jax.train import checkpoint

    folder = cli.given(args.from_, "a trained run")
    start = checkpoint.stage_folder(folder)
    out = args.out or pretrain.run_folder(folder) / args.domain / "sft"
    if not args.dialogues:
        one = expert(run, args.domain)
        return train(run, one.sft, *oracle_dialogues(one), out, start)
    if not args.dialogues.is_file():
        raise ConfigError(f"--dialogues {args.dialogues} is no file; give one of JSON lines, as --help describes them")
    settings = expert(run, args.domain).sft if run.post.experts else run.post.unify.sft
    everything = read(args.dialogues, load_tokenizer(checkpoint.load_run(start)[2], run.model.V))
    held_out = max(1, min(settings.held_out, len(everything) // 10))
    return train(run, settings, everything[held_out:], everything[:held_out], out, start)


def expert(run: Run, domain: str) -> Expert:
    """The recipe's expert for `domain`."""
    known = {one.domain: one for one in run.post.experts}
    if domain not in known:
        raise ConfigError(
            f"recipe {run.name!r} has no expert {domain!r}; {nearest(domain, list(known)) if known else NO_EXPERTS}"
        )
    return known[domain]


def oracle_dialogues(one: Expert) -> tuple[list["Dialogue"], list["Dialogue"]]:
    """(training, validation): the oracle's answers to tasks of the expert's levels in turn, in both modes by share."""
    from glm_jax import envs
    from glm_jax.data.dialogues import Dialogue
    from glm_jax.envs import split
    from glm_jax.rl.collect import share

    environment = envs.get(one.domain)
    check_slips(one)

    def write(count: int, evaluation: bool) -> list[Dialogue]:
        streams = [split.tasks(environment, level, evaluation=evaluation) for level in one.sft_levels]
        tasks = itertools.islice((task for turn in zip(*streams, strict=True) for task in turn), count)
        written = []
        for number, task in enumerate(tasks):
            thinking = share(one.sft.thinking_share, number)
            teach = environment.slip if share(one.sft.slips, task.seed) else environment.solve
            messages = (*task.messages, *teach(task, thinking))
            written.append(Dialogue(messages, task.tools, thinking))
        return written

    return write(one.sft.dialogues, False), write(one.sft.held_out, True)


def check_slips(one: Expert) -> None:
    """ConfigError where slips are asked of an environment that has none."""
    from glm_jax import envs

    if one.sft.slips and type(envs.get(one.domain)).slip is envs.Environment.slip:
        raise ConfigError(f"slips={one.sft.slips}, but environment {one.domain} has no slip: set it to 0, or write one")


def train(
    run: Run, settings: SFT, training: Sequence["Dialogue"], validation: Sequence["Dialogue"], out: Path, start: Path
) -> dict[str, Any]:
    """Fine-tune the weights in the stage folder `start` on `training`, in the stage folder `out`; returns its result."""
    from glm_jax.data import dialogues
    from glm_jax.data.prepare import load_tokenizer
    from glm_jax.evals.dialogues import evaluator
    from glm_jax.hf.write import COMPANIONS
    from glm_jax.train import checkpoint, loop, processes

    before, name, data = checkpoint.load_run(start)
    tokenizer = load_tokenizer(data, run.model.V)
    rows = out / "data"

    def make_rows() -> dict[str, Any]:
        facts = dialogues.prepare(rows, training, tokenizer, "sft", settings.seq_len)
        for companion in map(data.joinpath, COMPANIONS):  # of a published model: they go with it when it is exported
            if companion.is_file() and not (rows / companion.name).exists():
                shutil.copyfile(companion, rows / companion.name)
        return facts

    facts = processes.in_turn(make_rows)
    run, stage = as_stage(run, settings, facts["rows"], before.stage(name).rope_theta)
    look = evaluator(validation, tokenizer, run, stage) if validation else None
    result = loop.train_stage(run, stage, out, rows, weights=start, evaluate=look, measure="loss")
    losses = [result[when].get("dialogues", math.nan) for when in ("start", "end")]
    told = f"{facts['dialogues']:,} dialogues, {result['tokens']:,} tokens"
    left_out = {"longer than a row": facts["longer_than_a_row"], "with nothing to train": facts["nothing_to_train"]}
    told += "".join(f", {count:,} {why} left out" for why, count in left_out.items() if count)
    print(f"{out}: {told}; held-out loss {losses[0]:.3f} -> {losses[1]:.3f}", flush=True)
    return result


def as_stage(run: Run, settings: SFT, rows: int, rope_theta: float) -> tuple[Run, Stage]:
    """The run whose one stage is this fine-tuning: the trainer of pre-training, with its own schedule and optimizer."""
    batch_tokens = settings.batch_rows * settings.seq_len
    batches = max(1, round(rows * settings.epochs / settings.batch_rows))
    tokens = batches * batch_tokens
    stage = Stage(
        "sft", tokens, settings.seq_len, rope_theta, settings.microbatch_rows, packing="best_fit", isolate=True
    )
    schedule = dataclasses.replace(
        run.schedule, kind="cosine", peak_lr=settings.peak_lr, final_lr=settings.final_lr,
        warmup_tokens=round(settings.warmup_share * tokens), batch_tokens_start=batch_tokens,
        batch_tokens=batch_tokens, batch_ramp_tokens=0, mtp_weight=settings.mtp_weight, mtp_switch_tokens=0,
        bias_rate=0.0, bias_freeze_tokens=0,
    )  # fmt: skip
    every = max(1, batches // (settings.evals + 1))
    loop = dataclasses.replace(run.loop, eval_every=every)
    run = dataclasses.replace(run, pretrain=(), midtrain=(stage,), schedule=schedule, optim=settings.optim, loop=loop)
    return run, stage


def read(path: Path, tokenizer: "Tokenizer") -> list["Dialogue"]:
    """Dialogues of a file of JSON lines; an error names the line. Empty lines are passed over."""
    found = []
    lines = path.read_text(encoding="utf-8").split("\n")  # JSON's strings may hold what else ends a line
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                found.append(_dialogue(json.loads(line), tokenizer))
            except (ValueError, ConfigError) as error:
                raise ConfigError(f"{path}, line {number}: {error}") from error
    if len(found) < 2:
        raise ConfigError(f"{path} has {len(found)} dialogues; give at least two, one is held out")
    return found


def _dialogue(record: Any, tokenizer: "Tokenizer") -> "Dialogue":
    """The dialogue that a line of the file tells; ConfigError where it is none, or none that the template can render."""
    from glm_jax.data.dialogues import Dialogue

    given = record if isinstance(record, dict) else {}
    messages, tools, thinking = (given.get(name) for name in ("messages", "tools", "enable_thinking"))
    if not isinstance(messages, list) or not isinstance(tools, list | None) or not isinstance(thinking, bool | None):
        form = '{"messages": [...], "tools": [...]?, "enable_thinking": true|false?}'
        raise ConfigError(f"{json.dumps(record, ensure_ascii=False)[:80]} is no dialogue; a line is {form}")
    dialogue = Dialogue(tuple(messages), None if tools is None else tuple(tools), thinking is not False)
    rendered = dialogue.tokens(tokenizer)
    return dataclasses.replace(dialogue, ids=tuple(rendered.ids), trained=tuple(rendered.trained))


if __name__ == "__main__":
    cli.main(main)
