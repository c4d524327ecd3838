"""Where packages lie, as this machine's own clients know it: pip's index, apt's sources. No address stands in this code.

pip is only asked for its settings (PIP_INDEX_URL and pip.conf decide, as always): a source archive that pip downloads is
built too, which runs what is in it. apt downloads itself, with lists and a cache of its own in a folder of ours, so that
nothing of the system changes and nobody needs to be root. APT_CONFIG names other sources.
"""

import ast
import hashlib
import html
import http.client
import importlib.util
import json
import os
import re
import shlex
import shutil
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_BYTES = 400_000_000  # of an archive
_TRIES = 3
_CHUNK = 1 << 20
_JSON = "application/vnd.pypi.simple.v1+json"
_LINK = re.compile(r"""<a\b[^>]*\bhref\s*=\s*["']([^"']+)["']""", re.IGNORECASE)
_URI = re.compile(r"^'([^']+)' (\S+) (\d+) SHA256:([0-9a-f]{64})$", re.MULTILINE)
_SDISTS = (".tar.gz", ".zip", ".tar.bz2", ".tar.xz")
# The schemes that an index may have; urllib would open others too.
_SCHEMES = ("https", "http", "file")
_UNREACHABLE = (urllib.error.URLError, http.client.HTTPException, ssl.SSLError, ConnectionError, TimeoutError)


class Unavailable(Exception):
    """A client or a package that is not there; the message says why."""


@dataclass(frozen=True)
class Archive:
    """Where an archive lies, and what it must be. `bytes` 0: not known before it is fetched."""

    address: str
    file: str
    sha256: str
    bytes: int


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Pip:
    """Python's package index, as pip is set up to use it."""

    def __init__(self):
        settings = _pip_settings()
        self.index = settings["index-url"].rstrip("/") + "/"
        if urllib.parse.urlsplit(self.index).scheme not in _SCHEMES:
            raise Unavailable(f"pip's index-url {self.index} is none of {' '.join(_SCHEMES)}")
        self._context = ssl.create_default_context(cafile=settings.get("cert"))

    def find(self, name: str, version: str) -> Archive:
        """The source archive of a release; Unavailable if the index has none with a checksum."""
        page = urllib.parse.urljoin(self.index, f"{_canonical(name)}/")
        for address, sha256, size in self._files(page):
            file = urllib.parse.unquote(urllib.parse.urlsplit(address).path.rsplit("/", 1)[-1])
            ending = next((end for end in _SDISTS if file.endswith(f"-{version}{end}")), None)
            if ending and _canonical(file.removesuffix(f"-{version}{ending}")) == _canonical(name):
                if urllib.parse.urlsplit(address).scheme not in _SCHEMES:
                    raise Unavailable(f"{name}: its address {address} is none of {' '.join(_SCHEMES)}")
                return Archive(address, file, sha256, size)
        raise Unavailable(f"the index has no source archive of {name} {version} with a SHA-256")

    def fetch(self, archive: Archive, to: Path, tell: Callable[[int], None]) -> None:
        """Download to `to`, telling bytes; Unavailable if it cannot be had or is not what the index says."""
        for left in reversed(range(_TRIES)):
            try:
                digest = hashlib.sha256()
                with self._open(archive.address) as answer, to.open("wb") as file:
                    size = 0
                    while chunk := answer.read(_CHUNK):
                        size += len(chunk)
                        if size > MOST_BYTES:
                            raise Unavailable(f"{archive.file} is larger than {MOST_BYTES / 1e6:.0f} MB")
                        digest.update(chunk)
                        file.write(chunk)
                        tell(len(chunk))
                if digest.hexdigest() == archive.sha256:
                    return
                reason = f"{archive.file}: its checksum is not the index's"
            except _UNREACHABLE as error:
                reason = f"{archive.file}: {getattr(error, 'reason', error)}"
            if left:
                time.sleep(_TRIES - left)
        raise Unavailable(reason)

    def _files(self, page: str) -> list[tuple[str, str, int]]:
        """(address, SHA-256, bytes or 0) of the files on a package's page, those without a checksum left out."""
        if page.startswith("file:"):  # a folder of folders, as pip takes it
            page += "index.html"
            if not Path(urllib.request.url2pathname(urllib.parse.urlsplit(page).path)).is_file():
                raise Unavailable(f"{page} does not exist")
        request = urllib.request.Request(page, headers={"Accept": f"{_JSON}, text/html;q=0.5"})
        try:
            with self._open(request) as answer:
                body, kind, page = answer.read(1 << 26), answer.headers.get("Content-Type", ""), answer.url
        except urllib.error.HTTPError as error:
            raise Unavailable(f"{page}: {error.code} {error.reason}") from None
        except _UNREACHABLE as error:
            raise ConnectionError(
                f"pip's index {self.index} does not answer: {getattr(error, 'reason', error)}"
            ) from None
        try:
            files = _files_of_json(body) if _JSON in kind else _files_of_html(body)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Unavailable(f"{page} is no page of a package index") from None
        joined = [(urllib.parse.urljoin(page, address), sha256, size) for address, sha256, size in files]
        return [entry for entry in joined if re.fullmatch("[0-9a-f]{64}", entry[1])]

    def _open(self, request: Any) -> Any:
        return urllib.request.urlopen(request, timeout=60, context=self._context)


def _files_of_json(body: bytes) -> list[tuple[str, str, int]]:
    return [(f["url"], f["hashes"].get("sha256", ""), int(f.get("size") or 0)) for f in json.loads(body)["files"]]


def _files_of_html(body: bytes) -> list[tuple[str, str, int]]:
    links = [html.unescape(link).partition("#") for link in _LINK.findall(body.decode("utf-8", "replace"))]
    return [(link, fragment.removeprefix("sha256="), 0) for link, _, fragment in links]


def _pip_settings() -> dict[str, str]:
    """`index-url` and perhaps `cert`, as pip itself resolves them: the environment before the user's and the system's files."""
    pip = [sys.executable, "-m", "pip"]
    if importlib.util.find_spec("pip") is None:
        found = shutil.which("pip") or shutil.which("pip3")
        if found is None:
            raise Unavailable("there is no pip to ask for its index: python -m ensurepip installs it")
        pip = [found]
    settings = {}
    listed = _run([*pip, "config", "list"])
    for section in ("global", "install", "download", ":env:"):  # the later wins
        for key, value in re.findall(rf"^{section}\.([\w-]+)=(.+)$", listed, re.MULTILINE):
            settings[key] = str(ast.literal_eval(value))
    if str(settings.get("no-index", "")).lower() in ("1", "true", "yes", "on"):
        raise Unavailable("pip is told to use no index (no-index)")
    if "index-url" not in settings:  # its default stands in its own help
        told = re.search(r"--index-url <url>.*?\(default\s+(\S+?)\)", _run([*pip, "download", "--help"]), re.DOTALL)
        if told is None:
            raise Unavailable("pip does not tell its index; set PIP_INDEX_URL")
        settings["index-url"] = told[1]
    return settings


class Apt:
    """apt's archives, through apt-get. `folder` keeps its lists and cache; it may be deleted afterwards."""

    def __init__(self, folder: Path):
        if shutil.which("apt-get") is None:
            raise Unavailable("there is no apt-get: Debian's packages are fetched where apt is")
        self._folder = folder.absolute()
        for name in ("lists/partial", "cache/archives/partial", "sources"):
            (self._folder / name).mkdir(parents=True, exist_ok=True)
        (self._folder / "status").touch()
        _sources_with_source_packages(self._folder / "sources")
        self._options = [
            word
            for key, value in {
                "Dir::State::Lists": "lists", "Dir::State::status": "status", "Dir::Cache": "cache",
                "Dir::Etc::SourceParts": "sources",
            }.items()
            for word in ("-o", f"{key}={self._folder / value}")
        ] + ["-o", "Dir::Etc::SourceList=/dev/null", "-o", "Acquire::Languages=none", "-o", "Acquire::Retries=2"]  # fmt: skip
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            self._options += ["-o", "APT::Sandbox::User=root"]  # the folder may be one that apt's own user cannot enter
        if not any((self._folder / "lists").glob("*_Packages*")):
            problem = self._call("apt-get", "-q", "update", check=False)
            if not any((self._folder / "lists").glob("*_Packages*")):
                raise Unavailable(f"apt-get update fetched no list of packages: {problem}")

    def known(self, names: Sequence[str]) -> dict[tuple[str, bool], list[str]]:
        """(name, whether it is a source package) -> versions of those names that the lists have."""
        lines = [line.split("|") for line in self._call("apt-cache", "madison", *names, check=False).splitlines()]
        found: dict[tuple[str, bool], list[str]] = {}
        for name, version, where in (line for line in lines if len(line) == 3):
            found.setdefault((name.strip(), where.rstrip().endswith("Sources")), []).append(version.strip())
        return found

    def find(self, names: Sequence[str], source: bool) -> dict[str, Archive]:
        """Name -> its .deb, or with `source` the archive of what Debian added to a source package. A name may be `name=version`."""
        if not names:
            return {}
        told = self._call("apt-get", "--print-uris", *_what(source), *names)
        found = {}
        for address, file, size, sha256 in _URI.findall(told):
            found[file.split("_")[0]] = Archive(address, file, sha256, int(size))
        return {name: found[bare] for name in names if (bare := name.partition("=")[0]) in found}

    def fetch(self, name: str, archive: Archive, source: bool, to: Path) -> None:
        """Download to `to`; Unavailable if apt cannot, or what it brings is not what its lists say."""
        folder = to.with_name(to.name + ".apt")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            self._call("apt-get", "-q", *_what(source), name, cwd=folder)
            brought = [path for path in folder.iterdir() if path.is_file()]
            if len(brought) != 1:
                raise Unavailable(f"{name}: apt-get brought {len(brought)} files")
            shutil.copyfile(brought[0], to)  # apt links to archives that lie on this machine
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if sha256_of(to) != archive.sha256:
            raise Unavailable(f"{name}: its checksum is not that of apt's lists")

    def _call(self, program: str, *arguments: str, cwd: Path | None = None, check: bool = True) -> str:
        return _run([program, *self._options, *arguments], cwd, check)


def _what(source: bool) -> list[str]:
    return ["source", "--download-only", "--diff-only"] if source else ["download"]


def _sources_with_source_packages(to: Path) -> None:
    """The system's lists of sources, copied into `to`, each with source packages besides binary ones."""
    shell = _run(["apt-config", "shell", "MAIN", "Dir::Etc::sourcelist/f", "PARTS", "Dir::Etc::sourceparts/d"])
    where = dict(part.split("=", 1) for part in shlex.split(shell))
    parts = Path(where.get("PARTS", "/nowhere"))
    files = [Path(where.get("MAIN", "/nowhere")), *(sorted(parts.iterdir()) if parts.is_dir() else [])]
    for number, path in enumerate(files):
        if not path.is_file() or path.suffix not in (".list", ".sources"):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if path.suffix == ".sources":
            text = re.sub(r"^Types:.*$", "Types: deb deb-src", text, flags=re.MULTILINE)
        else:
            lines = [line for line in text.splitlines() if re.match(r"deb\s", line)]
            text = "".join(f"{line}\ndeb-src{line[3:]}\n" for line in lines)
        (to / f"{number:03d}{path.suffix}").write_text(text, encoding="utf-8")


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _run(command: list[str], cwd: Path | None = None, check: bool = True) -> str:
    """What a client prints, in English; Unavailable, with its last words, if it fails and `check`."""
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, errors="replace", env={**os.environ, "LC_ALL": "C"}
    )
    if check and done.returncode:
        words = " ".join(done.stderr.split())[-300:] or "it does not say why"
        raise Unavailable(f"{Path(command[0]).name} failed: {words}")
    return done.stdout if check or done.returncode == 0 else done.stdout + done.stderr
