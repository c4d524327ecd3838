"""The held-out split: made first, by whole modules, packages and pages, so that no later step can leak it.

Membership depends on a group's name alone: not on the seed, on other documents or on their order.
"""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from glm_jax.data.code import concatenate
from glm_jax.data.document import DataError, Document, read_documents, unit

LONG_BYTES = 16_384  # a held-out document of at least this size also stands in the domain "long"
# Of 30 salts tried, one whose 5 % is fairly even: 0.35 MB of code, 0.2 MB each of prose and mathematics.
_SALT = "held out 22"
_ENOUGH_GROUPS = 10  # a kind with so many groups holds out at least one


def held_out_groups(groups: Iterable[str], share: float) -> set[str]:
    """Groups whose hash falls below `share`; of each kind (what precedes the colon) with many groups at least one."""
    kinds: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for group in set(groups):
        kinds[group.split(":", 1)[0]].append((unit(_SALT, group), group))
    chosen = set()
    for ranked in kinds.values():
        ranked.sort()
        chosen |= {group for rank, group in ranked if rank < share}
        if len(ranked) >= _ENOUGH_GROUPS:
            chosen.add(ranked[0][1])
    return chosen


def split(documents: list[Document], share: float) -> tuple[list[Document], list[Document]]:
    """Documents for training, and those held out."""
    chosen = held_out_groups((document.group for document in documents), share)
    return [d for d in documents if d.group not in chosen], [d for d in documents if d.group in chosen]


def with_long(documents: list[Document], cycles: str) -> list[Document]:
    """The held-out documents in the order of their ids, then domain "long": whole repositories and long pages."""
    unique = sorted({document.id: document for document in documents}.values(), key=lambda d: d.id)
    long = [
        Document.of(d.text, domain="long", source=d.source, path=d.path, group=d.group)
        for d in unique
        if d.repo is None and d.size >= LONG_BYTES
    ]
    repositories: dict[str, list[Document]] = defaultdict(list)
    for document in unique:
        if document.repo is not None:
            repositories[document.repo].append(document)
    for name, files in repositories.items():
        text = concatenate({file.path: file.text for file in files}, cycles)
        if len(text.encode()) >= LONG_BYTES:
            source = "repository:" + files[0].source
            long.append(Document.of(text, domain="long", source=source, path=name, group=files[0].group))
    return unique + sorted(long, key=lambda d: d.id)


def read_held_out(folder: Path, domain: str | None = None, max_bytes: int | None = None) -> list[Document]:
    """Held-out documents of a data folder, of one domain (general, code, math, long) or of all.

    `max_bytes` stops after the document that reaches so many bytes; the order is by hash, so a prefix is a fair sample.
    """
    path = Path(folder) / "heldout.jsonl"
    if not path.is_file():
        raise DataError(f"{folder} has no heldout.jsonl; make the data with python -m experiments.data --out {folder}")
    chosen, size = [], 0
    for document in read_documents(path):
        if domain is not None and document.domain != domain:
            continue
        if max_bytes is not None and size >= max_bytes:
            break
        chosen.append(document)
        size += document.size
    return chosen
