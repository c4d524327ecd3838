"""Files that hold many texts each: crawls, lines of JSON, tables, events of repositories. A table of readers by name.

A reader is a function (path, drops) -> texts, each with what the file says about it. Its module's needs are imported when
a file asks for them, so that nobody installs what he does not read.
"""

import gzip
import io
import json
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from glm_jax.data import web
from glm_jax.data.document import DOMAINS, DataError, escaped

_TEXTS = ("text", "content", "code", "markdown", "body")  # columns that hold a text: the first that there is
_NAMES = ("path", "url", "id", "title")
_REPOSITORIES = ("repo", "repo_name", "repository")
_CLOSES = re.compile(r"\b(?:clos|fix|resolv)(?:e|es|ed|s)?:? #(\d{1,9})\b", re.IGNORECASE)
_MOST = 50_000_000  # bytes of a line or of a record


@dataclass(frozen=True)
class Entry:
    """A text in a file of many, with what the file says of it; `name` is "" where it says nothing."""

    text: str
    name: str = ""
    domain: str | None = None
    repo: str | None = None


def reader_of(path: Path) -> str | None:
    """The name of the reader of a file, by how its name ends; None: the file is a text itself, or nothing we read."""
    return next((name for ending, name in _ENDINGS.items() if path.name.lower().endswith(ending)), None)


def read(path: Path, drops: Counter[str]) -> Iterator[Entry]:
    """The texts of a file that has a reader. What is damaged is dropped by reason, with what follows it in the file."""
    try:
        yield from READERS[reader_of(path) or ""](path, drops)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        drops["damaged compressed file"] += 1


def strings(path: Path) -> Iterator[str]:
    """Every text in the records of a file, whatever its name; a file without a reader is one text. DataError if there is
    none that can be read."""
    if not path.is_file():
        raise DataError(f"{path} is not a file")
    drops: Counter[str] = Counter()
    kind = reader_of(path)
    if kind == "jsonl":
        records: Any = _objects(path, drops)
    elif kind == "parquet":
        _pyarrow(path)
        import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]

        records = parquet.read_table(path).to_pylist()
    elif kind == "arrow":
        with _pyarrow(path).memory_map(str(path)) as source:
            records = _pyarrow(path).ipc.open_stream(source).read_all().to_pylist()
    else:
        records = [path.read_text(encoding="utf-8", errors="replace")]
    for record in records:
        yield from _strings(record)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield escaped(value)
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _strings(one)


def _jsonl(path: Path, drops: Counter[str]) -> Iterator[Entry]:
    """Lines of JSON objects with a text, and perhaps path, repo, domain; or GH Archive's events, which have a type, and
    objects as repo and payload."""
    events = []
    for one in _objects(path, drops):
        if "type" in one and isinstance(one.get("payload"), dict) and isinstance(one.get("repo"), dict):
            events.append(one)
        else:
            yield from _entry(one, drops)
    yield from _conversations(events, drops)


def _objects(path: Path, drops: Counter[str]) -> Iterator[dict[str, Any]]:
    with _opened(path) as file:
        while line := file.readline(_MOST):
            if len(line) == _MOST and not line.endswith(b"\n"):
                drops["line too long"] += 1
                while (line := file.readline(_MOST)) and not line.endswith(b"\n"):
                    pass
                continue
            try:
                found = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError):  # no UTF-8, no JSON, a number of thousands of digits
                drops["no JSON"] += 1
                continue
            if isinstance(found, dict):
                yield found


def _entry(fields: dict[str, Any], drops: Counter[str]) -> Iterator[Entry]:
    def first(names: tuple[str, ...]) -> str | None:
        return next((str(fields[name]) for name in names if isinstance(fields.get(name), (str, int))), None)

    text = next((fields[name] for name in _TEXTS if isinstance(fields.get(name), str)), None)
    if text is None:
        drops["record without a text"] += 1
        return
    domain = fields.get("domain")
    repo = first(_REPOSITORIES)
    yield Entry(text, first(_NAMES) or "", domain if domain in DOMAINS else "code" if repo else None, repo)


def _conversations(events: list[dict[str, Any]], drops: Counter[str]) -> Iterator[Entry]:
    """Issues and pull requests of GH Archive's events: title, body, then comments in the order of time, and a pull request's
    diff where the file has it. What says that it closes another stands behind it, in one text."""
    found: dict[tuple[str, int], dict[str, Any]] = defaultdict(
        lambda: {"title": "", "body": "", "diff": "", "comments": {}}
    )
    for event in events:
        payload, repo = event["payload"], event["repo"].get("name")
        subject = payload.get("issue") or payload.get("pull_request")
        if not isinstance(repo, str) or not isinstance(subject, dict) or not isinstance(subject.get("number"), int):
            drops[f"event {event['type']} says nothing"] += 1
            continue
        thread = found[repo, subject["number"]]
        for name in ("title", "body", "diff"):
            thread[name] = said if isinstance(said := subject.get(name), str) and said else thread[name]
        comment = payload.get("comment")
        if isinstance(comment, dict) and isinstance(comment.get("body"), str):
            hunk = f"```diff\n{comment['diff_hunk']}\n```\n" if comment.get("diff_hunk") else ""
            user = comment.get("user")
            author = user.get("login", "") if isinstance(user, dict) else ""
            order = (str(comment.get("created_at", "")), str(comment.get("id", "")))
            thread["comments"][order] = f"{author}: {hunk}{comment['body']}"
    for repo, numbers in _related(found):
        text = "\n".join(_conversation(found[repo, number]) for number in numbers)
        yield Entry(text, f"{repo}#{numbers[0]}", "general")


def _related(found: dict[tuple[str, int], dict[str, Any]]) -> Iterator[tuple[str, list[int]]]:
    """(repository, numbers) of threads that belong in one text, the one that is closed first, each once."""
    closed_by: dict[tuple[str, int], list[tuple[str, int]]] = defaultdict(list)
    for repo, number in sorted(found):
        closes = {int(other) for other in _CLOSES.findall(found[repo, number]["body"])} - {number}
        for other in sorted(other for other in closes if (repo, other) in found)[:1]:
            closed_by[repo, other].append((repo, number))
    behind = {thread for threads in closed_by.values() for thread in threads}
    seen: set[tuple[str, int]] = set()
    for start in (*sorted(found.keys() - behind), *sorted(behind)):  # those of a circle come last
        order, waiting = [], [start]
        while waiting:
            thread = waiting.pop(0)
            if thread not in seen:
                seen.add(thread)
                order.append(thread[1])
                waiting += closed_by[thread]
        if order:
            yield start[0], order


def _conversation(thread: dict[str, Any]) -> str:
    diff = f"```diff\n{thread['diff'].rstrip()}\n```" if thread["diff"] else ""
    comments = (text for _, text in sorted(thread["comments"].items()))
    parts = [f"# {thread['title']}", thread["body"], diff, *comments]
    return "\n\n".join(part.replace("\r\n", "\n") for part in parts if part) + "\n"


def _warc(path: Path, drops: Counter[str]) -> Iterator[Entry]:
    """Pages of a crawl: the HTML responses of a WARC file."""
    if not web.available():
        raise DataError(f'{path}: pages of a crawl need resiliparse; pip install ".[data]"')
    with _opened(path) as file:
        while header := _header(file):
            size = int(header.get("content-length", "-1"))
            if not 0 <= size <= _MOST:
                drops["damaged or too large WARC record"] += 1
                return
            data = file.read(size)
            if len(data) < size:
                raise EOFError
            if header.get("warc-type") != "response":
                continue
            try:
                page = _page_of_response(data)
                if page is not None:
                    yield Entry(web.text(page), header.get("warc-target-uri", "").strip("<>"))
            except web.Unusable as reason:
                drops[str(reason)] += 1


def _header(file: IO[bytes]) -> dict[str, str]:
    """Fields of the next WARC or HTTP header, in lower case; {} at the end. The first line is left out."""
    line = file.readline(1 << 16)
    while line and not line.strip():
        line = file.readline(1 << 16)
    fields = {}
    while (line := file.readline(1 << 16)).strip():
        name, _, value = line.decode("utf-8", "replace").partition(":")
        fields[name.strip().lower()] = value.strip()
    return fields


def _page_of_response(data: bytes) -> bytes | None:
    """The HTML that a server answered, unpacked; None if it is something else."""
    answer = io.BytesIO(data)
    if b" 200" not in data[:64].split(b"\n")[0]:
        return None
    header = _header(answer)
    if "html" not in header.get("content-type", "html"):
        return None
    body = answer.read()
    if "chunked" in header.get("transfer-encoding", "") and re.match(rb"[0-9A-Fa-f]+[^\r\n]*\r\n", body):
        body = _joined(body)
    if body[:2] == b"\x1f\x8b":
        body = zlib.decompressobj(31).decompress(body, web.MOST_BYTES + 1)
    return body


def _joined(body: bytes) -> bytes:
    """A body that was sent in chunks."""
    parts, place = [], 0
    while (end := body.find(b"\r\n", place)) >= 0:
        try:
            size = int(body[place:end].split(b";")[0], 16)
        except ValueError:
            break
        if size <= 0:
            break
        parts.append(body[end + 2 : end + 2 + size])
        place = end + 4 + size
    return b"".join(parts)


def _parquet(path: Path, drops: Counter[str]) -> Iterator[Entry]:
    """Rows of a Parquet file, as Hugging Face's hub has data sets: the columns of `_entry`."""
    pyarrow = _pyarrow(path)
    import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]

    try:
        with parquet.ParquetFile(path) as table:
            columns = [name for name in table.schema_arrow.names if name in _COLUMNS]
            for batch in table.iter_batches(batch_size=256, columns=columns):
                for row in batch.to_pylist():
                    yield from _entry(row, drops)
    except pyarrow.ArrowException:
        drops["damaged table"] += 1


def _arrow(path: Path, drops: Counter[str]) -> Iterator[Entry]:
    """Rows of an Arrow file, as Hugging Face's `datasets` saves them to disk."""
    pyarrow = _pyarrow(path)
    try:
        with pyarrow.memory_map(str(path)) as source:
            for batch in pyarrow.ipc.open_stream(source):
                for row in batch.select([name for name in batch.schema.names if name in _COLUMNS]).to_pylist():
                    yield from _entry(row, drops)
    except pyarrow.ArrowException:
        drops["damaged table"] += 1


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError(f'{path}: a table needs pyarrow; pip install ".[data]", or write it as JSONL') from None
    return pyarrow


def _opened(path: Path) -> Any:
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")


READERS: dict[str, Callable[[Path, Counter[str]], Iterator[Entry]]] = {
    "jsonl": _jsonl,
    "warc": _warc,
    "parquet": _parquet,
    "arrow": _arrow,
}
_COLUMNS = frozenset((*_TEXTS, *_NAMES, *_REPOSITORIES, "domain"))
# GH Archive's hours are .json.gz. A data set that `datasets` saved is a folder of .arrow files; the hub's, of .parquet.
_ENDINGS = {
    **dict.fromkeys((".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz", ".json.gz"), "jsonl"),
    **dict.fromkeys((".warc", ".warc.gz"), "warc"),
    ".parquet": "parquet",
    ".arrow": "arrow",
}
EXTENSIONS: tuple[str, ...] = tuple(_ENDINGS)
