"""What a data folder holds, to look at: `report.html`, one file without anything from outside, made from the folder alone.

Counts, tokens, why text was left out, quality buckets, lengths, rows of every stage, and samples: what was dropped beside
what it repeats, and the lowest and the highest bucket side by side.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2

from glm_jax.data import corpus
from glm_jax.data.document import DIALOGUES, DOMAINS, Document, iterate_documents, unit, write
from glm_jax.data.prepare import read_manifest

FILE = "report.html"
_PAIRS = 4  # of dropped and kept, for each reason
_SAMPLES = 2  # of a bucket
_HEAD = 600  # characters of a sample


def write_report(folder: Path) -> Path:
    """Write `report.html` into a finished data folder; returns its path."""
    folder = Path(folder)
    found = collect(folder)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("glm_jax.data", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "count": lambda n: f"{n:,}",
        "mb": lambda n: f"{n / 1e6:,.2f}",
        "share": lambda n: f"{100 * n:.1f} %",
    }
    path = folder / FILE
    write(path, environment.get_template("report.html.jinja").render(found))
    return path


def collect(folder: Path) -> dict[str, Any]:
    """What the page shows. Sizes are bytes of UTF-8."""
    manifest = read_manifest(folder)
    domains = tuple(name for name in (*DOMAINS, *DIALOGUES) if name in manifest["training"])
    lengths: dict[str, Counter[int]] = {name: Counter() for name in domains}
    heads = _heads(folder)
    chinese = 0
    chosen = {name: _Sampler() for name in domains}
    for name in domains:
        for document in iterate_documents(folder / "documents" / f"{name}.jsonl"):
            lengths[name][int(math.log2(max(document.size, 1)))] += 1
            chinese += corpus.is_chinese(document.text)
            chosen[name].add(document)
            if document.id in heads:
                heads[document.id] = (document.path, document.text[:_HEAD])
    return {
        "manifest": manifest,
        "domains": domains,
        "chinese": chinese,
        "archives": corpus.read_summary(folder) if manifest["settings"]["data"].get("corpus") else None,
        "drops": sorted(manifest["drops"].items(), key=lambda drop: -drop[1]),
        "lengths": {name: _bars(counts) for name, counts in lengths.items()},
        "pairs": _pairs(folder, heads),
        "samples": {name: sampler.ends() for name, sampler in chosen.items()},
    }


class _Sampler:
    """A few documents of each bucket, chosen by hash."""

    def __init__(self):
        self._of: dict[int, list[tuple[float, str, str]]] = defaultdict(list)

    def add(self, document: Document) -> None:
        kept = self._of[document.bucket]
        kept.append((unit("report", document.id), document.path, document.text[:_HEAD]))
        if len(kept) > _SAMPLES:
            kept.remove(max(kept))

    def ends(self) -> list[tuple[int, list[tuple[str, str]]]]:
        """(bucket, [(path, beginning)]) of the lowest and of the highest bucket."""
        ends = sorted({min(self._of), max(self._of)}) if self._of else []
        return [(bucket, [(path, head) for _, path, head in sorted(self._of[bucket])]) for bucket in ends]


def _removed(folder: Path) -> Iterable[dict[str, Any]]:
    path = folder / "documents" / "removed.jsonl"
    if path.is_file():
        with path.open(encoding="utf-8", newline="\n") as lines:
            yield from map(json.loads, lines)


def _chosen_removals(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Reason -> a few removals, chosen by hash."""
    found: dict[str, list[tuple[float, str, dict[str, Any]]]] = defaultdict(list)
    for removal in _removed(folder):
        kept = found[removal["reason"]]
        kept.append((unit("report", removal["id"], removal["path"]), removal["path"], removal))
        if len(kept) > _PAIRS:
            kept.remove(max(kept, key=lambda entry: entry[:2]))
    return {reason: [entry[2] for entry in sorted(kept, key=lambda e: e[:2])] for reason, kept in sorted(found.items())}


def _heads(folder: Path) -> dict[str, tuple[str, str]]:
    """Id -> (path, beginning) of what the removals that are shown repeat; of held-out documents already filled."""
    wanted = {removal["cluster"] for chosen in _chosen_removals(folder).values() for removal in chosen}
    heads: dict[str, tuple[str, str]] = {}
    heads.update((name, ("", "")) for name in wanted)
    for document in iterate_documents(folder / "heldout.jsonl") if wanted else ():
        if document.id in wanted:
            heads[document.id] = (document.path, document.text[:_HEAD])
    return heads


def _pairs(folder: Path, heads: dict[str, tuple[str, str]]) -> dict[str, list[dict[str, Any]]]:
    return {
        reason: [
            {**removal, "kept_path": heads[removal["cluster"]][0], "kept_head": heads[removal["cluster"]][1]}
            for removal in chosen
        ]
        for reason, chosen in _chosen_removals(folder).items()
    }


def _bars(counts: Counter[int]) -> list[dict[str, Any]]:
    """A histogram over powers of two, without gaps."""
    if not counts:
        return []
    most = max(counts.values())
    return [
        {"label": _size(1 << power), "documents": counts[power], "height": counts[power] / most}
        for power in range(min(counts), max(counts) + 1)
    ]


def _size(count: int) -> str:
    for unit_name, size in (("MB", 1 << 20), ("kB", 1 << 10)):
        if count >= size:
            return f"{count // size} {unit_name}"
    return f"{count} B"
