"""A list's archives, brought to this machine: each with its checksum verified, and none twice.

OUT/archives/<kind>-<name>.<ending>        an archive
OUT/archives/<kind>-<name>.json            what it is: address, checksum, bytes, licence; written when it is whole
OUT/archives/manifest.json                 all of these, and what could not be had, with reasons
"""

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from glm_jax.data.corpus.clients import Apt, Archive, Pip, Unavailable
from glm_jax.data.corpus.listing import Package
from glm_jax.data.document import DataError, write

_AT_ONCE = 4  # downloads
_GUESS = 5_000_000  # bytes of an archive whose size the index does not tell
_ENDINGS = (".deb", ".zip", ".tar.gz", ".tar.bz2", ".tar.xz", ".tgz", ".gz", ".xz", ".bz2")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fetched:
    """An archive that is here. `name` is the list's first for it, `package` the one of its names that was found."""

    part: str
    kind: str
    name: str
    package: str
    licence: str
    file: str
    address: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class _Job:
    """A download to do: `get(to, telling)` does it and says what it brought, which may be an older version."""

    package: Package
    name: str  # the one that was found
    archive: Archive
    get: Callable[[Path, Callable[[int], None]], Archive]


class _Tell:
    """Bytes of all downloads together, from several threads."""

    def __init__(self, tell: Callable[[int, int], None], total: int):
        self._tell, self._total, self._done, self._lock = tell, total, 0, threading.Lock()

    def __call__(self, count: int) -> None:
        with self._lock:
            self._done += count
            self._tell(min(self._done, self._total), self._total)


def fetch(
    packages: Sequence[Package], folder: Path, tell: Callable[[int, int], None]
) -> tuple[list[Fetched], dict[str, str]]:
    """(archives that are here, in the order of the list; label -> reason of those that are not).

    What is here already costs no connection. A client that is missing, or does not answer, is told once and the rest goes
    on; DataError where nothing at all could be had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("*.part"):
        left.unlink()
    here = {package.label: found for package in packages if (found := _here(package, folder))}
    missing = [package for package in packages if package.label not in here]
    absent: dict[str, str] = {}
    if missing:
        found, absent = _find(missing, folder)
        telling = _Tell(tell, sum(job.archive.bytes or _GUESS for job in found))
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            for job, result in zip(found, threads.map(lambda job: _kept(job, folder, telling), found), strict=True):
                if isinstance(result, str):
                    absent[job.package.label] = result
                else:
                    here[job.package.label] = result
    shutil.rmtree(folder / "apt", ignore_errors=True)
    reasons = sorted(set(absent.values()))
    if not here:
        raise DataError("no archive of the corpus could be fetched: " + "; ".join(reasons))
    for reason in reasons:
        names = " ".join(label for label, told in absent.items() if told == reason)
        log.warning("goes on without %s: %s", names, reason)
    fetched = [here[package.label] for package in packages if package.label in here]
    manifest = {"archives": [asdict(one) for one in fetched], "absent": dict(sorted(absent.items()))}
    write(folder / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return fetched, absent


def _find(packages: Sequence[Package], folder: Path) -> tuple[list[_Job], dict[str, str]]:
    """(downloads to do, label -> reason of the packages that have no address)."""
    found: list[_Job] = []
    absent: dict[str, str] = {}
    of_apt = [package for package in packages if package.kind != "sdist"]
    of_pip = [package for package in packages if package.kind == "sdist"]
    try:
        if of_apt:
            found += _find_by_apt(Apt(folder / "apt"), of_apt, absent)
    except Unavailable as error:
        absent |= {package.label: str(error) for package in of_apt}
    try:
        if of_pip:
            found += _find_by_pip(Pip(), of_pip, absent)
    except (Unavailable, ConnectionError) as error:
        absent |= {package.label: str(error) for package in of_pip}
    return found, absent


def _find_by_apt(apt: Apt, packages: Sequence[Package], absent: dict[str, str]) -> list[_Job]:
    known = apt.known([name for package in packages for name in package.names])
    jobs = []
    for source in (False, True):
        chosen: dict[str, Package] = {}
        for package in packages:
            if (package.kind == "patches") == source:
                name = next((name for name in package.names if (name, source) in known), None)
                if name is None:
                    absent[package.label] = "apt's lists do not have it"
                else:
                    chosen[name] = package
        archives = apt.find(list(chosen), source)
        for name, package in chosen.items():
            if name in archives:
                get = _by_apt(apt, name, archives[name], source, known[name, source])
                jobs.append(_Job(package, name, archives[name], get))
            else:
                absent[package.label] = "apt's lists have no archive of it with a SHA-256"
    return jobs


def _by_apt(
    apt: Apt, name: str, newest: Archive, source: bool, versions: Sequence[str]
) -> Callable[[Path, Callable[[int], None]], Archive]:
    def get(to: Path, telling: Callable[[int], None]) -> Archive:
        candidates = [(name, newest)]
        while candidates:
            version, archive = candidates.pop(0)
            try:
                apt.fetch(version, archive, source, to)
                telling(newest.bytes)
                return archive
            except Unavailable:  # a mirror may lack what its lists have: of security updates, often
                if archive is newest:
                    older = [apt.find([f"{name}={one}"], source) for one in versions]
                    candidates = [entry for found in older for entry in found.items() if entry[1] != newest]
                if not candidates:
                    raise
        raise AssertionError("the last candidate returns or raises")

    return get


def _find_by_pip(pip: Pip, packages: Sequence[Package], absent: dict[str, str]) -> list[_Job]:
    jobs = []
    for package in packages:
        reasons = []
        for one in package.names:
            name, _, version = one.partition("==")
            try:
                archive = pip.find(name, version)
            except Unavailable as error:
                reasons.append(str(error))
                continue
            jobs.append(_Job(package, name, archive, _by_pip(pip, archive)))
            break
        else:
            absent[package.label] = "; ".join(reasons)
    return jobs


def _by_pip(pip: Pip, archive: Archive) -> Callable[[Path, Callable[[int], None]], Archive]:
    def get(to: Path, telling: Callable[[int], None]) -> Archive:
        pip.fetch(archive, to, telling)
        return archive

    return get


def _kept(job: _Job, folder: Path, telling: Callable[[int], None]) -> Fetched | str:
    """Do the download; the archive that is here then, or why it is not."""
    package = job.package
    file = _stem(package) + next((ending for ending in _ENDINGS if job.archive.file.endswith(ending)), "")
    part = folder / f"{file}.part"
    try:
        archive = job.get(part, telling)
        size = part.stat().st_size
        os.replace(part, folder / file)
    except Unavailable as error:
        return str(error)
    finally:
        part.unlink(missing_ok=True)
    fetched = Fetched(
        package.part,
        package.kind,
        package.names[0],
        job.name,
        package.licence,
        file,
        archive.address,
        archive.sha256,
        size,
    )
    write(folder / f"{_stem(package)}.json", json.dumps(asdict(fetched), indent=1, sort_keys=True) + "\n")
    return fetched


def _here(package: Package, folder: Path) -> Fetched | None:
    try:
        found = Fetched(**json.loads((folder / f"{_stem(package)}.json").read_text(encoding="utf-8")))
        whole = (folder / found.file).stat().st_size == found.bytes
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return None
    return found if whole and found.licence == package.licence and found.part == package.part else None


def _stem(package: Package) -> str:
    return f"{package.kind}-{package.names[0]}"
