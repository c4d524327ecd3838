"""From one archive to its documents: pages of a Debian package, files of a repository, patches with their messages.

The work of a shard for `glm_jax.data.engine`: nothing but the archive, its record and the settings decides what comes out.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from glm_jax.data import commits, sources, web
from glm_jax.data.corpus import archives, listing
from glm_jax.data.document import Document, write_documents

_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")
_KANA = re.compile(r"[\u3041-\u30ff]{3}")
_CHINESE = 0.1  # share of Han among the characters of a page that is Chinese
_REVIEWS = 100
_HEAD = 20_000  # characters that tell a page's language
_PAPER = re.compile(r"(?:^|/)(?:copyright|licen[cs]e|copying|pkg-info)[^/]*$", re.IGNORECASE)
_PAPERS_BYTES = 300_000  # of licence files, to find the licence's name in

Found = Iterator[tuple[str, dict[str, Any]]]  # text, the other fields of its document


def work(inputs: Sequence[Path], output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Write the documents of the archive `inputs[0]`, whose record is `inputs[1]`; tells how many, and what was left out."""
    record = json.loads(inputs[1].read_text(encoding="utf-8"))
    name = record["package"]
    drops: Counter[str] = Counter()
    papers: list[str] = []
    documents: list[Document] = []
    taken: Counter[str] = Counter()
    refused = ""
    readers = {"deb": _pages, "sdist": _repository, "patches": _patches}
    read = _reviews if record["part"] == "reviews" else readers[record["kind"]]
    try:
        for text, fields in read(_members(inputs[0], drops, papers), name, record["part"], drops):
            documents += sources.documents(text, settings["max_document_bytes"], taken, **fields)
        if papers and not listing.confirmed(record["licence"], "\n".join(papers)):
            raise archives.Refused(f"archive whose own papers do not speak of the licence {record['licence']}")
    except archives.Refused as reason:
        refused, documents = str(reason), []
        drops[refused] += 1
    write_documents(output, documents)
    return {
        "documents": len(documents),
        "text_bytes": sum(document.size for document in documents),
        "chinese": sum(is_chinese(document.text) for document in documents),
        "licence_confirmed": bool(papers) and not refused,
        "refused": refused,
        "drops": dict(sorted(drops.items())),
    }


def is_chinese(text: str) -> bool:
    """Whether more than a tenth of a text's beginning is Han, and it has no kana: those are Japanese."""
    head = text[:_HEAD]
    return len(_HAN.findall(head)) > _CHINESE * len(head) and not _KANA.search(head)


def _members(path: Path, drops: Counter[str], papers: list[str]) -> Iterator[tuple[str, bytes]]:
    """The archive's files; what its licence files say goes into `papers`."""
    left = _PAPERS_BYTES
    for name, data in archives.members(path, drops):
        if left > 0 and _PAPER.search(name):
            papers.append(data[:left].decode("utf-8", "replace"))
            left -= len(data)
        yield name, data


def _pages(members: Iterator[tuple[str, bytes]], name: str, part: str, drops: Counter[str]) -> Found:
    for path, data in members:
        if PurePosixPath(path).suffix.lower() not in sources.PAGES:
            continue
        try:
            text = web.text(data)
        except web.Unusable as reason:
            drops[str(reason)] += 1
            continue
        if sources.usable(text, False, drops):
            inner = path.removeprefix("usr/share/").removeprefix("doc/").removeprefix(f"{name}/")
            domain = "math" if part == "math" or sources.LATEX.search(text) else "general"
            label = f"{name}/{inner}"
            yield text, {"domain": domain, "source": f"deb:{name}", "path": label, "group": f"page:{label}"}


def _repository(members: Iterator[tuple[str, bytes]], name: str, part: str, drops: Counter[str]) -> Found:
    for path, data in members:
        inner = PurePosixPath(*PurePosixPath(path).parts[1:])  # without name-version/
        domain = sources.EXTENSIONS.get(inner.suffix.lower())
        if domain is None or inner.suffix.lower() in sources.PAGES:
            continue
        text = sources.decoded(data, drops)
        if text is None or not sources.usable(text, domain == "code", drops):
            continue
        if domain == "general" and sources.LATEX.search(text):
            domain = "math"
        fields = {"domain": domain, "source": f"sdist:{name}", "path": f"{name}/{inner}", "group": f"sdist:{name}"}
        yield text, {**fields, "repo": name if domain == "code" else None}


def _reviews(members: Iterator[tuple[str, bytes]], name: str, part: str, drops: Counter[str]) -> Found:
    """Of files with a review on each line, a hundred to a document."""
    for path, data in members:
        if not path.endswith(".txt") or (text := sources.decoded(data, drops)) is None:
            continue
        lines = [
            line for line in text.splitlines() if is_chinese(line)
        ]  # word lists and frequencies beside them are not
        for first in range(0, len(lines), _REVIEWS):
            label = f"{name}/{PurePosixPath(path).name}#{first}"
            told = "\n".join(lines[first : first + _REVIEWS])
            yield told, {"domain": "general", "source": f"reviews:{name}", "path": label, "group": label}


def _patches(members: Iterator[tuple[str, bytes]], name: str, part: str, drops: Counter[str]) -> Found:
    patches, changelog = {}, ""
    for path, data in members:
        if path == "debian/changelog":
            changelog = data.decode("utf-8", "replace")
        elif path.startswith("debian/patches/") and not path.endswith("/series"):
            text = sources.decoded(data, drops)
            if text is not None and sources.usable(text, False, drops):
                patches[path] = text
    told = 0
    for paths, text in commits.contexts(patches, changelog):
        told += len(paths)
        label = f"{name}/{paths[0]}"
        yield text, {"domain": "code", "source": f"patches:{name}", "path": label, "group": f"patches:{name}"}
    if told < len(patches):
        drops["no patch, or one of which nothing is said"] += len(patches) - told
