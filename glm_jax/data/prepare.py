"""From sources to a data folder in a few steps, each of which appears whole or not at all.

    OUT/config.json              what decides the data: settings, and the state of the inputs
    OUT/archives/, extracted/    with data.corpus: what was fetched, with its licences, and the documents of each archive
    OUT/builtin/                 while they are read: documents of the standard library and of each package
    OUT/collected/               all documents, split: train.jsonl, heldout.jsonl, unwanted.jsonl, drops.json
    OUT/cleaning/                while documents are measured: shards of them, and their measures
    OUT/documents/<domain>.jsonl clean and in quality buckets; tokens.npy and offsets.npy of those read
    OUT/documents/removed.jsonl  with data.removals: what duplicates what, how alike, and how it begins
    OUT/scorers/                 with data.scoring.by classifiers: each scorer, and report.json with its held-out AUC;
                                 OUT/documents/attributes.jsonl: language, scores, bin and bucket of each document
    OUT/heldout.jsonl            held-out documents, with the domain "long" besides the three
    OUT/tokenizer.json           and chat_template.jinja, which goes with it
    OUT/<stage>/                 the rows: row_starts.npy, stage.json and, flat, tokens.npy, offsets.npy, segments.npy;
                                 with data.shard_tokens tokens-*.array_record, first.npy, rows.npy (see shards.py)
    OUT/manifest.json            counts, reasons of drops, buckets, stages; written last
    OUT/done/<step>.json         a step's mark: hash of its inputs, hashes of its files

Killed at any moment and started again, it ends with the same bytes. A folder made with other settings is refused.
"""

import hashlib
import json
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from glm_jax.config import Data, Run, canonical, flatten
from glm_jax.data import cleaning, corpus, heldout, scoring, sources, stages, synthetic
from glm_jax.data.document import (
    DIALOGUES,
    DOMAINS,
    DataError,
    Document,
    Progress,
    digest,
    explained,
    read_documents,
    unit,
    write,
    write_documents,
    write_lines,
)  # fmt: skip
from glm_jax.data.engine import Engine
from glm_jax.text.tokenizer import Tokenizer, train

_OWN_FOLDERS = ("archives", "builtin", "cleaning", "collected", "documents", "done", "extracted", "scorers")
_FORMAT = 1  # of the folder; a change makes older folders unusable


def prepare(run: Run, out: Path, progress: Progress, engine: Engine = Engine()) -> Path:
    """Make the data folder of `run`, or go on with an unfinished one; returns `out`.

    Reads run.data, run.model.V and the stages, nothing else; whichever `engine` works, the bytes are the same. DataError
    where data, disk or an older folder forbid it.
    """
    out = Path(out)
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
        return _prepare(run, out, progress, engine)


def _prepare(run: Run, out: Path, progress: Progress, engine: Engine) -> Path:
    config = _settle(run, out)
    if (out / "manifest.json").is_file():
        return out
    steps = _Steps(out, config, progress)
    if run.data.corpus:
        steps.mark("corpus", lambda: corpus.make(run.data, out, engine, steps.tell))
    steps.do(
        "collect",
        ["corpus"] if run.data.corpus else [],
        lambda to: _collect(run, out, to, engine, steps.tell("collect")),
    )
    before = ["collect"]
    if run.data.scoring.by == "classifiers":
        steps.do("scorers", before, lambda to: _scorers(run, out, to, steps.tell("scorers")))
        before = ["collect", "scorers"]
    steps.do("clean", before, lambda to: _clean(run, out, to, engine, steps.tell("clean")))
    made = ["clean"]
    if run.data.dialogues:
        steps.do("dialogues", [], lambda to: _dialogues(run, to, steps.tell("dialogues")))
        made = ["clean", "dialogues"]
    steps.do("tokenizer", ["clean"], lambda to: _tokenizer(run, out, to, steps.tell("tokenizer")))
    steps.do("tokens", [*made, "tokenizer"], lambda to: _tokens(run, out, to, steps.tell("tokens")))
    for stage in run.stages:
        step = f"stage {stage.name}"
        steps.do(step, ["tokens"], lambda to, stage=stage, step=step: _stage(run, stage, out, to, steps.tell(step)))
    write(out / "manifest.json", _pretty(_manifest(run, out, config)))
    return out


def settings(run: Run) -> dict[str, Any]:
    """The part of a run that decides its data."""
    return {
        "format": _FORMAT,
        "data": canonical(run.data),
        "V": run.model.V,
        "stages": [stages.restated(s) for s in run.stages],
    }


class _Steps:
    """Runs a step unless its mark says that it has been done with the same inputs."""

    def __init__(self, out: Path, config: dict[str, Any], progress: Progress):
        self._out, self._config, self._progress = out, config, progress
        (out / "done").mkdir(exist_ok=True)

    def tell(self, step: str) -> Callable[[int, int], None]:
        return lambda done, total: self._progress(step, done, total)

    def mark(self, step: str, make: Callable[[], dict[str, str]]) -> None:
        """Set the mark of a step that sees to its own files, unless it has been done: `make` tells them, with hashes."""
        if not self._done(step, inputs := self._inputs(step, [])):
            write(self._out / "done" / f"{step}.json", _pretty({"inputs": inputs, "files": make()}))

    def do(self, step: str, after: list[str], make: Callable[[Path], None]) -> None:
        """`make` writes files into a temporary folder; they move into place, then the mark is set."""
        mark = self._out / "done" / f"{step}.json"
        inputs = self._inputs(step, after)
        if self._done(step, inputs):
            return
        self._progress(step, 0, 1)
        temporary = self._out / f".{step}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        make(temporary)
        files = {}
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                name = path.relative_to(temporary).as_posix()
                with path.open("rb") as file:
                    files[name] = hashlib.file_digest(file, "sha256").hexdigest()
                (self._out / name).parent.mkdir(exist_ok=True)
                os.replace(path, self._out / name)
        shutil.rmtree(temporary)
        write(mark, _pretty({"inputs": inputs, "files": files}))
        self._progress(step, 1, 1)

    def _inputs(self, step: str, after: list[str]) -> str:
        return digest(json.dumps([step, self._config, [self._mark(name) for name in after]], sort_keys=True))

    def _done(self, step: str, inputs: str) -> bool:
        mark = self._out / "done" / f"{step}.json"
        if not mark.is_file():
            return False
        found = json.loads(mark.read_text())
        return found["inputs"] == inputs and all((self._out / name).is_file() for name in found["files"])

    def _mark(self, step: str) -> dict[str, str]:
        return json.loads((self._out / "done" / f"{step}.json").read_text())["files"]


def _settle(run: Run, out: Path) -> dict[str, Any]:
    """Write config.json, or compare with the one that is there."""
    for stage in run.stages:
        if stage.name in _OWN_FOLDERS or "/" in stage.name or stage.name.startswith("."):
            raise DataError(f"a stage's name is its folder's and cannot be {stage.name!r}; choose another")
    path = out / "config.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if found is not None and (out / "manifest.json").is_file():
        inputs = found["inputs"]  # finished: what its sources are today no longer matters
    else:
        folders = {name: _listing(Path(name)) for name in (*run.data.paths, *run.data.scoring.contrasts)}
        folders |= {name: _state(Path(name)) for name in run.data.benchmarks}
        inputs: dict[str, Any] = {
            "folders": folders, "versions": sources.environment(), **scoring.inputs(run.data.scoring)
        }  # fmt: skip
        if run.data.corpus:
            inputs["corpus"] = corpus.fingerprint(run.data)
    config = {"settings": settings(run), "inputs": inputs}
    if found is None:
        if any(item.suffix != ".tmp" for item in out.iterdir()):
            raise DataError(f"{out} has files but is no data folder; choose an empty or new folder for --out")
        write(path, _pretty(config))
        return config
    ours, theirs = flatten(json.loads(json.dumps(config))), flatten(found)
    ours, theirs = _spread(ours), _spread(theirs)
    changed = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
    if changed:
        listed = "\n  ".join(f"{key}: {theirs.get(key)} there, {ours.get(key)} now" for key in changed)
        raise DataError(
            f"{out} was made with other settings or inputs; name another folder, or delete it if no run reads it. "
            f"Differences:\n  {listed}"
        )
    return config


def _spread(flat: dict[str, Any]) -> dict[str, Any]:
    """Lists as numbered leaves, so that a difference names its stage."""
    result: dict[str, Any] = {}
    for key, value in flat.items():
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            for index, item in enumerate(value):
                result |= _spread(flatten(item, f"{key}.{index}"))
        else:
            result[key.removeprefix("settings.")] = value
    return result


def _listing(root: Path) -> str:
    """Fingerprint of the names, sizes and times of a folder's files."""
    states = [(path.relative_to(root).as_posix(), path.stat()) for path in sources.list_folder(root)]
    return digest(json.dumps([(name, state.st_size, state.st_mtime_ns) for name, state in states]))[:12]


def _state(path: Path) -> str:
    """Fingerprint of a file's bytes."""
    if not path.is_file():
        raise DataError(f"data.benchmarks: {path} is not a file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def _collect(run: Run, out: Path, to: Path, engine: Engine, tell: Callable[[int, int], None]) -> None:
    drops: Counter[str] = Counter()
    documents = sources.builtin(engine, out / "builtin", drops, tell)
    if run.data.corpus:
        documents += corpus.documents(out, drops)
    for name in run.data.paths:
        documents += sources.folder(Path(name), run.data.max_document_bytes, drops)
    (to / "collected").mkdir()
    write_documents(to / "collected" / "unwanted.jsonl", [d for d in documents if d.unwanted])
    training, held_out = heldout.split([d for d in documents if not d.unwanted], run.data.held_out)
    write_documents(to / "collected" / "train.jsonl", training)
    write_documents(to / "collected" / "heldout.jsonl", held_out)
    write(to / "collected" / "drops.json", _pretty(drops))


def _scorers(run: Run, out: Path, to: Path, tell: Callable[[int, int], None]) -> None:
    documents = [
        d for name in ("train", "heldout", "unwanted") for d in read_documents(out / "collected" / f"{name}.jsonl")
    ]
    scoring.train_all(documents, run.data.scoring, to / "scorers", out / "judged.jsonl", tell)


def _clean(run: Run, out: Path, to: Path, engine: Engine, tell: Callable[[int, int], None]) -> None:
    training, held_out = (read_documents(out / "collected" / f"{name}.jsonl") for name in ("train", "heldout"))
    drops: Counter[str] = Counter()
    (to / "documents").mkdir()
    measured = cleaning.by_engine(engine, out / "cleaning", tell)
    training, held_out, removed = cleaning.sorted_out(
        training, held_out, run.data, measured, out / "scorers", to / "documents", drops
    )
    for domain in DOMAINS:
        write_documents(to / "documents" / f"{domain}.jsonl", [d for d in training if d.domain == domain])
    write_documents(to / "heldout.jsonl", heldout.with_long(held_out, run.data.cycles))
    write(to / "documents" / "drops.json", _pretty(drops))
    if run.data.removals:
        write_lines(to / "documents" / "removed.jsonl", map(vars, removed))


def _dialogues(run: Run, to: Path, tell: Callable[[int, int], None]) -> None:
    drops: Counter[str] = Counter()
    bucket = len(run.data.bucket_epochs) - 1  # their answers are known to be right
    found = list(synthetic.documents(run.data.dialogues, bucket, drops, tell))
    (to / "documents").mkdir()
    for name in DIALOGUES:
        write_documents(to / "documents" / f"{name}.jsonl", [d for d in found if d.domain == name])
    write(to / "documents" / "dialogues-drops.json", _pretty(drops))


def _training_documents(run: Run, out: Path) -> list[Document]:
    files = (out / "documents" / f"{domain}.jsonl" for domain in _domains(run.data))
    return stages.usable([document for file in files for document in read_documents(file)], run.data)


def _tokenizer(run: Run, out: Path, to: Path, tell: Callable[[int, int], None]) -> None:
    found = [document for document in _training_documents(run, out) if document.domain in DOMAINS]
    documents = sorted(found, key=lambda d: unit("tokenizer", d.id))
    budget = {name: share * run.data.tokenizer_bytes for name, share in _domain_shares(run, documents).items()}
    texts = []
    for document in documents:
        if budget[document.domain] > 0:
            budget[document.domain] -= document.size
            texts.append(document.text)
    tell(1, 10)
    train(texts, run.model.V).save(to / "tokenizer.json")


def _domain_shares(run: Run, documents: list[Document]) -> dict[str, float]:
    """How much of its text the tokenizer is trained on from each domain: as the stages will read it."""
    sizes = Counter(dict.fromkeys(DOMAINS, 0))
    for document in documents:
        sizes[document.domain] += document.size
    shares: dict[str, float] = dict.fromkeys(DOMAINS, 0.0)
    for stage in run.stages:
        mixture = stage.mixture or dict(sizes)
        for name in DOMAINS:
            shares[name] += stage.tokens / run.total_tokens * mixture.get(name, 0.0) / sum(mixture.values())
    return shares


def _tokens(run: Run, out: Path, to: Path, tell: Callable[[int, int], None]) -> None:
    tokenizer = load_tokenizer(out, run.model.V)
    documents = _training_documents(run, out)
    encoded = stages.encode_all([d.text for d in documents if d.domain in DOMAINS], tokenizer, tell)
    made = [
        d.text for d in documents if d.domain in DIALOGUES
    ]  # the last; only the template's tags are special in them
    encoded += [np.array(tokenizer.encode(text, special=True)) for text in made]
    dtype = stages.id_dtype(run.model.V)
    (to / "documents").mkdir()
    stages.Tokens.of([np.append(ids, dtype.type(tokenizer.end)) for ids in encoded], dtype).save(to / "documents")


def _stage(run: Run, stage: Any, out: Path, to: Path, tell: Callable[[int, int], None]) -> None:
    tokenizer = load_tokenizer(out, run.model.V)
    tokens = stages.Tokens.load(out / "documents")
    built = stages.build(stage, run.data, _training_documents(run, out), tokens, tokenizer, tell)
    if len(built.plan) == 0:
        raise DataError(
            f"stage {stage.name}: its documents do not fill one row of {stage.seq_len} tokens; "
            "add --data.paths or shorten seq_len"
        )
    (to / stage.name).mkdir()
    built.save(to / stage.name, run.data.shard_tokens)
    key = hashlib.sha256(built.tokens.flat.tobytes() + built.plan.segments.tobytes()).hexdigest()[:12]
    write(
        to / stage.name / "stage.json",
        _pretty({**built.facts, "key": key, "end": tokenizer.end, "vocab_size": run.model.V}),
    )


def load_tokenizer(out: Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a data folder; its vocabulary size stands in the manifest of a finished one."""
    out = Path(out)
    if vocab_size is None:
        if not (out / "manifest.json").is_file():
            raise DataError(f"{out} is no finished data folder; make it with python -m experiments.data --out {out}")
        vocab_size = read_manifest(out)["settings"]["V"]
    return Tokenizer.load(out / "tokenizer.json", vocab_size)


def read_manifest(out: Path) -> dict[str, Any]:
    return json.loads((Path(out) / "manifest.json").read_text(encoding="utf-8"))


def zlib_bits_per_byte(documents: list[Document]) -> float:
    """Bits per byte of `zlib -9` on the documents one by one."""
    size = sum(document.size for document in documents)
    return sum(len(zlib.compress(document.text.encode(), 9)) for document in documents) * 8 / max(size, 1)


def _manifest(run: Run, out: Path, config: dict[str, Any]) -> dict[str, Any]:
    domains = _domains(run.data)
    training = [document for domain in domains for document in read_documents(out / "documents" / f"{domain}.jsonl")]
    held_out = heldout.read_held_out(out)
    tokenizer = load_tokenizer(out, run.model.V)
    tokens = stages.Tokens.load(out / "documents")
    count: Counter[str] = Counter()
    for document, length in zip(stages.usable(training, run.data), tokens.lengths.tolist(), strict=True):
        count[document.domain] += length
    drops: Counter[str] = Counter()
    for path in (out / "collected" / "drops.json", *sorted((out / "documents").glob("*drops.json"))):
        drops.update(json.loads(path.read_text()))
    modules = [document for document in held_out if document.stdlib_module and document.domain == "code"]
    return {
        **config,
        "training": {name: {**_sizes(training, name), "tokens_read": count[name]} for name in domains},
        "held_out": {name: _held_out_figures(held_out, name, tokenizer) for name in (*DOMAINS, "long")},
        "zlib_bits_per_byte": {"stdlib_modules": round(zlib_bits_per_byte(modules), 4)},
        "buckets": {name: _histogram(training, name, len(run.data.bucket_epochs)) for name in domains},
        "drops": dict(sorted(drops.items())),
        **scoring.report(run.data.scoring, out),
        "stages": [json.loads((out / stage.name / "stage.json").read_text()) for stage in run.stages],
    }


def _sizes(documents: list[Document], domain: str) -> dict[str, Any]:
    chosen = [document for document in documents if document.domain == domain]
    return {"documents": len(chosen), "bytes": sum(document.size for document in chosen)}


def _held_out_figures(documents: list[Document], domain: str, tokenizer: Tokenizer) -> dict[str, Any]:
    sizes = _sizes(documents, domain)
    count = sum(map(len, tokenizer.encode_batch([d.text for d in documents if d.domain == domain])))
    return {**sizes, "tokens": count, "bytes_per_token": round(sizes["bytes"] / max(count, 1), 3)}


def _histogram(documents: list[Document], domain: str, buckets: int) -> list[dict[str, int]]:
    rows = [{"documents": 0, "bytes": 0} for _ in range(buckets)]
    for document in documents:
        if document.domain == domain:
            rows[document.bucket]["documents"] += 1
            rows[document.bucket]["bytes"] += document.size
    return rows


def _domains(data: Data) -> tuple[str, ...]:
    """Of training documents, each a file."""
    return (*DOMAINS, *DIALOGUES) if data.dialogues else DOMAINS


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True) + "\n"
