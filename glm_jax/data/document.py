"""What every data step hands to the next: documents, and files that appear whole or not at all."""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from glm_jax.config import ConfigError

DOMAINS: tuple[str, ...] = ("general", "code", "math")  # of texts that are found
DIALOGUES: tuple[str, ...] = (
    "reasoning",
    "agent",
)  # of those that are made (`synthetic`): in the chat format, none held out


class DataError(ConfigError):
    """Data that cannot be used. The message says what, why and the way out; scripts print it without a traceback."""


class Progress(Protocol):
    """Called with the step's name and how much of it is done."""

    def __call__(self, step: str, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class Document:
    """A text and where it came from.

    `group` is what is held out as a whole (a module, a package, a page); `repo` names the repository of a code file
    and `path` is its path there, never a path of this machine. `bucket` is the quality bucket, lowest 0, -1 unscored.
    """

    id: str  # of the text alone: equal texts have equal ids
    text: str
    domain: str
    source: str
    path: str
    group: str
    repo: str | None = None
    bucket: int = -1

    @classmethod
    def of(cls, text: str, **fields: Any) -> "Document":
        """Labels are `escaped`: they may be names of files in no encoding."""
        fields |= {name: escaped(value) for name, value in fields.items() if isinstance(value, str)}
        return cls(id=digest(text)[:16], text=text, **fields)

    @property
    def stdlib_module(self) -> bool:
        return self.source == "stdlib"

    @property
    def is_patch(self) -> bool:
        """A change with its message: not a text to fill a middle into."""
        return self.source.startswith("patches:")

    @property
    def unwanted(self) -> bool:
        """Whether it is an example for scorers alone, of what no model should read."""
        return self.source.startswith("reviews:")

    @property
    def size(self) -> int:
        """Bytes of UTF-8."""
        return len(self.text.encode())


def escaped(text: str) -> str:
    """The text as UTF-8 can hold it: a lone surrogate becomes the six characters of its escape, \\udc80."""
    return text.encode("utf-8", "backslashreplace").decode()


def digest(text: str) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def unit(*keys: object) -> float:
    """A number in [0, 1) that is a pure function of the keys: the same on every machine and in every process."""
    return int(digest("\x1f".join(map(str, keys)))[:13], 16) / 16**13


def write(path: Path, text: str) -> None:
    """Write the file whole or not at all: a killed writer leaves the old file, or none."""
    with staged(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place when the block ends well."""
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    os.replace(temporary, path)


def write_documents(path: Path, documents: Iterable[Document]) -> None:
    """One JSON object a line, in the given order, with `stdlib_module` spelt out for readers without this class."""
    write_lines(path, ({**vars(document), "stdlib_module": document.stdlib_module} for document in documents))


def write_lines(path: Path, objects: Iterable[Any]) -> None:
    """One JSON object a line, whole or not at all; never more than one of them in memory."""
    with staged(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in objects)


def read_documents(path: Path) -> list[Document]:
    """Documents of a file of `write_documents`."""
    return list(iterate_documents(path))


def iterate_documents(path: Path) -> Iterator[Document]:
    """The same, one at a time."""
    with path.open(encoding="utf-8", newline="\n") as lines:
        for line in lines:
            fields = json.loads(line)
            del fields["stdlib_module"]
            yield Document(**fields)


@contextlib.contextmanager
def explained(what: Path) -> Iterator[None]:
    """Turn the operating system's refusals about the folder `what` into a `DataError`."""
    try:
        yield
    except OSError as error:
        ways_out = {
            errno.ENOSPC: "the disk is full; free some space and run the same command again",
            errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
            errno.EACCES: "permission denied; choose a folder you may write",
            errno.EROFS: "the file system is read-only; choose another folder",
            errno.ENOTDIR: "a part of the path is a file; choose another folder",
            errno.EEXIST: "it exists and is not a folder; choose another name",
        }
        if error.errno not in ways_out:
            raise
        raise DataError(f"{error.filename or what}: {ways_out[error.errno]}") from error
