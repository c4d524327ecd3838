"""Corpora that are fetched: a list of packages, their archives, and from each archive its documents."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from glm_jax.config import Data
from glm_jax.data import web
from glm_jax.data.corpus import extract, fetch, listing
from glm_jax.data.document import DataError, Document, digest, iterate_documents, write
from glm_jax.data.engine import Engine, Shard

is_chinese = extract.is_chinese
Tell = Callable[[str], Callable[[int, int], None]]


def list_of(data: Data) -> Path:
    """The file that names the packages of `data.corpus`; DataError where there is none."""
    path = listing.DEFAULT if data.corpus == "default" else Path(data.corpus)
    if not path.is_file():
        raise DataError(f"data.corpus={data.corpus!r} is neither 'default' nor a file with a list of packages")
    return path


def fingerprint(data: Data) -> str:
    """Hash of the list, with what of it is allowed."""
    packages, _ = listing.read(list_of(data), data.licences)
    return digest(json.dumps([vars(package) for package in packages], default=list))[:12]


def make(data: Data, out: Path, engine: Engine, tell: Tell) -> dict[str, str]:
    """Fetch and extract what is missing of `data.corpus` below `out`; file -> its hash, and the hash of the summary.

    `out/archives` holds archives (see `fetch`), `out/extracted` a file of documents for each and `corpus.json`: what came
    of them, with licences, and why anything was left out.
    """
    if not web.available():
        raise DataError('a corpus has web pages, and there is no resiliparse to read them; pip install ".[data]"')
    packages, excluded = listing.read(list_of(data), data.licences)
    if not packages:
        raise DataError(
            f"data.licences={data.licences} leaves nothing of data.corpus={data.corpus!r}; allow more of them"
        )
    fetched, absent = fetch.fetch(packages, out / "archives", tell("fetch"))
    shards = []
    for one in fetched:
        archive = out / "archives" / one.file
        record = archive.with_name(f"{one.kind}-{one.name}.json")
        key = digest(json.dumps([one.sha256, one.part, one.kind, one.package, one.licence]))
        shards.append(Shard(f"{one.kind}-{one.name}.jsonl", (archive, record), key, one.bytes))
    settings = {"max_document_bytes": data.max_document_bytes}
    facts = engine.run(extract.work, shards, settings, out / "extracted", tell("extract"))
    archives = []
    for one, told, shard in zip(fetched, facts, shards, strict=True):
        extracted = {"file": shard.name, "sha256": told.pop("sha256"), "bytes": told.pop("bytes")}
        archives.append({**vars(one), **told, "extracted": extracted})
    summary = {
        "archives": archives,
        "absent": dict(sorted(absent.items())),
        "licence_not_allowed": sorted(package.label for package in excluded),
    }
    path = out / "extracted" / "corpus.json"
    write(path, json.dumps(summary, indent=1, sort_keys=True) + "\n")
    return {f"extracted/{one['extracted']['file']}": one["extracted"]["sha256"] for one in archives}


def documents(out: Path, drops: Counter[str]) -> Iterator[Document]:
    """The documents of the archives that `make` brought, in the order of the list."""
    summary = read_summary(out)
    for one in summary["archives"]:
        drops.update(one["drops"])
        yield from iterate_documents(out / "extracted" / one["extracted"]["file"])


def read_summary(out: Path) -> dict[str, Any]:
    return json.loads((out / "extracted" / "corpus.json").read_text(encoding="utf-8"))
