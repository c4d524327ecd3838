"""What a corpus consists of: a table of packages, and the licences that their text may stand under.

A list is a file of lines `part kind name licence`, # begins a comment. Kinds: `deb`, a Debian package with web pages;
`sdist`, a source archive of Python's package index, `name==version`; `patches`, a Debian source package whose patches
are read. `a|b` is the first of several names that there is: names with versions change from release to release.
Of the part `reviews` are examples of what is not wanted: scorers learn from them, nobody trains on them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from glm_jax.config import nearest
from glm_jax.data.document import DataError

DEFAULT = Path(__file__).with_name("default.txt")
PARTS = ("web", "math", "code", "commits", "reviews")
KINDS = ("deb", "sdist", "patches")

# Licences that allow their texts to be copied and changed, and what an archive's own papers say where it stands under one.
LICENCES: dict[str, re.Pattern[str]] = {
    name: re.compile(pattern, re.IGNORECASE)
    for name, pattern in {
        "Apache-2.0": r"apache[- ]*(software)?,?[- ]*(license)?,?[- ]*(version)?[- ]*2",
        "Artistic": r"artistic",
        "BSD": r"\bbsd\b|redistribution and use in source and binary forms",
        "CC0": r"\bcc0\b|public[- ]domain",
        "CC-BY-SA": r"\bcc[- ]by[- ]sa\b|attribution[- ]share[- ]?alike",
        "GFDL": r"\bg?fdl\b|free documentation licen[cs]e",
        "GPL": r"\bgpl|general public licen[cs]e",
        "ISC": r"\bisc\b",
        "LGPL": r"\blgpl|(lesser|library) general public",
        "MIT": r"\bmit\b|\bexpat\b|permission is hereby granted, free of charge",
        "MPL": r"\bmpl\b|mozilla public",
        "PostgreSQL": r"postgresql",
        "PSF": r"\bpsf|python software foundation",
        "public-domain": r"public[- ]domain|blessing",
        "Vim": r"\bvim\b",
        "Zlib": r"\bzlib\b",
    }.items()
}


@dataclass(frozen=True)
class Package:
    """A line of a list."""

    part: str
    kind: str
    names: tuple[str, ...]
    licence: str

    @property
    def label(self) -> str:
        return f"{self.kind} {self.names[0]}"


def read(path: Path, allowed: Sequence[str] = ()) -> tuple[list[Package], list[Package]]:
    """(packages whose licence is allowed, the others) of a list; `allowed` empty: every licence of `LICENCES`."""
    for name in allowed:
        if name not in LICENCES:
            raise DataError(f"data.licences has {name!r}, which is no licence here; {nearest(name, list(LICENCES))}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{path} is no text in UTF-8; a list has lines: part kind name licence") from None
    found = []
    for number, line in enumerate(lines, start=1):
        fields = line.split("#")[0].split()
        if fields:
            found.append(_package(fields, f"{path}:{number}"))
    if len({package.label for package in found}) != len(found):
        raise DataError(f"{path} names a package twice; take one of the lines away")
    allowed = allowed or tuple(LICENCES)
    return [p for p in found if p.licence in allowed], [p for p in found if p.licence not in allowed]


def _package(fields: list[str], where: str) -> Package:
    if len(fields) != 4:
        raise DataError(f"{where} has {len(fields)} fields; a line is: part kind name licence")
    part, kind, name, licence = fields
    for what, value, known in (("part", part, PARTS), ("kind", kind, KINDS), ("licence", licence, LICENCES)):
        if value not in known:
            raise DataError(f"{where}: {value!r} is no {what}; {nearest(value, list(known))}")
    names = tuple(name.split("|"))
    rule = r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.!+]*" if kind == "sdist" else r"[a-z0-9][a-z0-9.+-]+"
    for one in names:
        if not re.fullmatch(rule, one):
            form = "name==version" if kind == "sdist" else "a Debian package's name"
            raise DataError(f"{where}: {one!r} is not {form}")
    return Package(part, kind, names, licence)


def confirmed(licence: str, papers: str) -> bool:
    """Whether an archive's own words about its licence speak of the one that the list says."""
    return LICENCES[licence].search(papers) is not None
