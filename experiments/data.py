"""Make the data folder of a run: real documents, clean and packed into rows, with a tokenizer of their own.

    python -m experiments.data --recipe tiny --out data/tiny
    python -m experiments.data --recipe tiny --out data/mine --data.paths ~/notes ~/projects
    python -m experiments.data --recipe mini --out data/mini      # scorers are trained; SemDedup; rows in ArrayRecord shards
    python -m experiments.data --recipe mini --out data/own \\
        --data.scoring.contrasts ~/labelled --data.scoring.judge ~/scores.jsonl

Sources: the standard library of this Python (its packages as repositories), the topics of pydoc, docstrings and readme
pages of installed packages (those with LaTeX are the mathematics); nothing is downloaded. --data.paths adds folders of
text (.txt .md .rst .tex), web pages (.html, with pip install ".[data]"), code (.py .c .rs ...) and files of many texts:
crawls (.warc .warc.gz), lines of JSON (.jsonl .jsonl.gz), tables (.parquet, and .arrow as Hugging Face's datasets saves
them), GH Archive's hours (.json.gz). A subfolder with code counts as a repository.

--recipe default fetches 325 MB besides: web pages, mathematics, repositories and commits from the package archives that
this machine's apt and pip are set up for (PIP_INDEX_URL and APT_CONFIG name others), each under a licence that lets it
be used (OUT/extracted/corpus.json has them). --data.corpus FILE fetches by a list of your own, a line for each package:
part kind name licence, as in glm_jax/data/corpus/default.txt; --data.licences MIT BSD takes only what is under these.

Steps, in this order:
  fetch       with a corpus: bring its archives, each verified by its checksum and none twice; nothing in them is run
  extract     the documents of each archive, by --engine in --workers processes
  collect     read the sources; hold out --data.held_out of them by whole modules, packages and pages
  scorers     with --data.scoring.by classifiers: train those of prose, code (by language), pages with code and mathematics
              on labelled examples that the machine has, and on those of --data.scoring.contrasts; --data.scoring.judge has
              an LLM's scores of mathematics, or is the address of one to ask
  clean       drop exact and near duplicates, with --data.semantic_kept templated pages too, and what repeats held-out
              text; score; sort into quality buckets (--data.removals lists what went, for what)
  tokenizer   learn --model.V byte pairs and special tokens from the training documents
  tokens      encode them
  stage NAME  draw the stage's tokens by mixture and bucket, apply FIM to code, pack rows

Interrupt it at any time: the same command goes on where it stopped and ends with the same bytes. A folder made with
other settings is refused. Afterwards: OUT/manifest.json has every count, OUT/report.html shows them with samples;
experiments.pretrain --data_folder OUT trains on it.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from experiments import cli
from glm_jax.config import Run
from glm_jax.data import report
from glm_jax.data.document import DIALOGUES, DOMAINS
from glm_jax.data.engine import Engine, Kind
from glm_jax.data.prepare import prepare, read_manifest


@dataclass(frozen=True)
class Args:
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder to make, or to go on with."""
    engine: Kind = "pool"
    """Who reads a corpus: a pool of processes, this one alone, or Ray's (pip install ".[ray]"). The bytes are the same."""
    workers: int = 0
    """Processes of the engine; 0 is one for each core."""


MEGABYTES = ("fetch", "extract", "tokens")  # steps that count bytes or characters
QUIET_SECONDS = 20  # between two lines about the same step


class Progress:
    """A bar with rate and time left for each step on a terminal; elsewhere a line with its seconds, and lines on the way."""

    def __init__(self):
        self._step, self._bar, self._since, self._said, self._first = None, None, 0.0, 0.0, 0
        self._most = 0
        self._terminal = sys.stderr.isatty()

    def __call__(self, step: str, done: int, total: int) -> None:
        now = time.monotonic()
        if step != self._step:
            self.close()
            self._step, self._since, self._said, self._first, self._most = step, now, now, 0, 0
            if self._terminal:
                form = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
                self._bar = tqdm(desc=f"{step:<18}", total=1000, bar_format=form)
        if total > 1:
            self._first = self._first if self._most else done  # what an earlier run did says nothing about the rate
            self._most = max(self._most, done, 1)
        if self._bar is not None:
            self._bar.set_postfix_str(self._rate(now), refresh=False)
            self._bar.update(max(0, round(1000 * done / max(total, 1)) - self._bar.n))
        elif now - self._said >= QUIET_SECONDS and self._first < done < total:
            self._said = now
            left = (now - self._since) * (total - done) / (done - self._first)
            print(f"{step:<18} {100 * done / total:5.1f} %{self._rate(now)}, {left:.0f} s left", file=sys.stderr)

    def close(self) -> None:
        now = time.monotonic()
        if self._bar is not None:
            self._bar.close()
        elif self._step is not None:
            print(f"{self._step:<18} {now - self._since:6.1f} s{self._rate(now)}", file=sys.stderr)
        self._step = self._bar = None

    def _rate(self, now: float) -> str:
        seconds = now - self._since
        if self._step not in MEGABYTES or seconds < 0.5 or self._most <= self._first:
            return ""
        return f" {(self._most - self._first) / 1e6 / seconds:6.1f} MB/s"


def main(args: Args, run: Run) -> None:
    make(run, args.out, Engine(args.engine, args.workers))
    print(summary(args.out))
    print(f"{report.write_report(args.out)}: the same with lengths, buckets and samples, to look at")


def make(run: Run, out: Path, engine: Engine = Engine()) -> Path:
    """The data folder of `run`, with progress if there is something to do; returns `out`."""
    progress = Progress()
    try:
        return prepare(run, out, progress, engine)
    finally:
        progress.close()


def summary(folder: Path) -> str:
    """The manifest in a screenful."""
    manifest = read_manifest(folder)
    lines = [
        f"{folder}: vocabulary {manifest['settings']['V']}",
        "",
        "domain     documents      MB   held out MB   bytes/token",
    ]
    for name in (*DOMAINS, "long"):
        held_out = manifest["held_out"][name]
        training = manifest["training"].get(name, {"documents": 0, "bytes": 0})
        lines.append(
            f"{name:<9} {training['documents']:10,} {training['bytes'] / 1e6:7.2f} {held_out['bytes'] / 1e6:13.2f} "
            f"{held_out['bytes_per_token']:13.2f}"
        )
    for name in DIALOGUES:
        if name in manifest["training"]:
            training = manifest["training"][name]
            lines.append(f"{name:<9} {training['documents']:10,} {training['bytes'] / 1e6:7.2f}")
    lines += ["", "stage          rows  length    tokens  padding  FIM  mixture"]
    for stage in manifest["stages"]:
        shares = stage["tokens_by_domain"]
        whole = max(sum(shares.values()), 1)
        mixture = ", ".join(f"{name} {100 * share / whole:.0f} %" for name, share in shares.items() if share)
        lines.append(
            f"{stage['name']:<12} {stage['rows']:6,} {stage['seq_len']:7,} {stage['tokens']:9,} "
            f"{100 * stage['padding']:6.2f} % {stage['readings_with_fim']:4,}  {mixture}"
        )
    if "scorers" in manifest:
        lines += ["", *_quality(manifest)]
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in manifest["drops"].items() if count)
    zlib = manifest["zlib_bits_per_byte"]["stdlib_modules"]
    lines += [
        "",
        f"dropped: {dropped}",
        f"zlib -9 on held-out standard-library modules one by one: {zlib:.3f} bits per byte",
    ]
    return "\n".join(lines)


def _quality(manifest: dict[str, Any]) -> list[str]:
    """The scorers' figures, and how documents fell into bins and buckets."""
    lines = ["scorer              AUC  held out good / bad  trained on"]
    for name, facts in manifest["scorers"].items():
        held_out = facts["held_out"]
        lines.append(
            f"{name:<16} {facts['auc']:6.4f}  {held_out['good']:13,} / {held_out['bad']:<5,} {facts['trained_on']:7,}"
        )
    lines += ["", "ranked together   documents in buckets from the lowest up"]
    for name, facts in manifest["quality"]["peers"].items():
        buckets = "  ".join(f"{number}: {held['documents']:,}" for number, held in facts["buckets"].items())
        lines.append(f"{name:<17} {buckets}")
    languages = sorted(manifest["quality"]["languages"].items(), key=lambda item: -item[1])
    lines.append("languages         " + "  ".join(f"{name}: {count:,}" for name, count in languages))
    return lines


if __name__ == "__main__":
    cli.main(main)
