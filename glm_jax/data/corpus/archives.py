"""Archives from strangers, read without being unpacked: nothing of one ever reaches the disk, and nothing of it runs.

A member is bytes in memory under a name that says where it would lie. An archive that lies about itself is refused
whole, with a reason; members that are links, devices or too large are left out and counted.
"""

import bz2
import contextlib
import gzip
import io
import lzma
import shutil
import subprocess
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

MOST_MEMBERS = 200_000
MOST_BYTES = 6_000_000_000  # of a whole archive, unpacked
MOST_MEMBER = 50_000_000  # bytes of one member; larger ones are left out
_RATIO = 100  # of unpacked to packed bytes; honest documentation has 5 to 20
_SMALL = 64_000_000  # bytes that any archive may unpack to
_XZ_MEMORY = 256 << 20  # bytes for a dictionary: xz -9 needs 65 MB
_AR, _AR_HEADER = b"!<arch>\n", 60


class Refused(Exception):
    """An archive that is not read; the message is the reason."""


def members(path: Path, drops: Counter[str]) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of every regular file of a .deb, a tar (plain, .gz, .bz2, .xz) or a .zip, in the archive's order.

    Refused where the archive is damaged, has names outside of its own tree, or unpacks to far more than it is.
    """
    most = min(MOST_BYTES, max(_SMALL, _RATIO * path.stat().st_size))
    try:
        if path.suffix in (".zip", ".whl"):
            yield from _of_zip(path, most, drops)
        else:
            with path.open("rb") as file, contextlib.ExitStack() as stack:
                packed, kind = (_data_of_deb(file, path)) if path.suffix == ".deb" else (file, path.suffix)
                plain = stack.enter_context(_unpacked(packed, kind, path))
                yield from _of_tar(_Limited(plain, most), drops)
    except (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, ValueError) as error:
        raise Refused(f"damaged archive ({type(error).__name__})") from error
    except OSError as error:
        if error.errno is not None:  # of the disk, not of the archive: gzip and bz2 have no errors of their own
            raise
        raise Refused("damaged archive (OSError)") from error
    except (NotImplementedError, RuntimeError) as error:  # zipfile's words for other methods and for passwords
        raise Refused("archive in a form that cannot be read") from error


def safe(name: str) -> str:
    """The name as a path inside the tree; Refused where it would lie outside."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in name.split("/")[0] or "\0" in name:
        raise Refused("archive with a name outside of its tree")
    return path.as_posix()


class _Limited(io.RawIOBase):
    """Counts what is read through it; Refused past the limit."""

    def __init__(self, plain: IO[bytes], most: int):
        self._plain, self._left = plain, most

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._plain.read(min(size, self._left + 1) if size >= 0 else self._left + 1)
        self._left -= len(data)
        if self._left < 0:
            raise Refused("archive that unpacks to far more than it is")
        return data


class _Xz(io.RawIOBase):
    """xz with a bound on memory, which the standard library's file object cannot set."""

    def __init__(self, packed: IO[bytes]):
        self._packed, self._xz = packed, self._new()

    @staticmethod
    def _new() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(lzma.FORMAT_AUTO, memlimit=_XZ_MEMORY)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._xz.eof:
                rest = self._xz.unused_data or self._packed.read(1 << 16)
                if not rest.strip(b"\0"):
                    return 0
                self._xz = self._new()  # another stream follows
            elif self._xz.needs_input:
                rest = self._packed.read(1 << 16)
                if not rest:
                    raise EOFError("xz data that ends too early")
            else:
                rest = b""
            data = self._xz.decompress(rest, len(buffer))
            if data:
                buffer[: len(data)] = data
                return len(data)


def _unpacked(packed: IO[bytes], kind: str, path: Path) -> Any:
    openers: dict[str, Callable[[IO[bytes]], Any]] = {
        ".tar": lambda file: file,
        ".gz": lambda file: gzip.GzipFile(fileobj=file),
        ".tgz": lambda file: gzip.GzipFile(fileobj=file),
        ".bz2": bz2.BZ2File,
        ".xz": lambda file: io.BufferedReader(_Xz(file), 1 << 20),
    }
    if kind in openers:
        return openers[kind](packed)
    if kind == ".zst" and shutil.which("dpkg-deb"):  # Python reads zstd from 3.14 on
        return _by_dpkg(path)
    raise Refused(f"archive in a form that cannot be read: {kind}")


@contextlib.contextmanager
def _by_dpkg(path: Path) -> Iterator[IO[bytes]]:
    process = subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    try:
        yield process.stdout
    finally:
        process.stdout.close()
        process.kill()
        process.wait()


def _data_of_deb(file: IO[bytes], path: Path) -> tuple[Any, str]:
    """The packed tar of a .deb's files, and how it is packed. A .deb is an `ar` archive; its third member is the data."""
    if file.read(len(_AR)) != _AR:
        raise Refused("damaged archive (no ar archive)")
    while len(header := file.read(_AR_HEADER)) == _AR_HEADER:
        name, size = header[:16].decode("ascii", "replace").strip().rstrip("/"), int(header[48:58])
        if header[58:] != b"`\n" or size < 0:
            break
        if name.startswith("data.tar"):
            end = file.tell() + size
            if end > path.stat().st_size:
                raise Refused("damaged archive (it ends too early)")
            return _Window(file, end), PurePosixPath(name).suffix
        file.seek(size + size % 2, io.SEEK_CUR)
    raise Refused("damaged archive (a .deb without data)")


class _Window(io.RawIOBase):
    """A file up to an end of its own."""

    def __init__(self, file: IO[bytes], end: int):
        self._file, self._end = file, end

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        left = self._end - self._file.tell()
        return self._file.read(left if size < 0 else min(size, left))


def _of_tar(plain: Any, drops: Counter[str]) -> Iterator[tuple[str, bytes]]:
    count = 0
    with tarfile.open(fileobj=plain, mode="r|", bufsize=1 << 20) as tar:
        for member in tar:
            count += 1
            tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # tarfile remembers every member; a stream has no use for them
            if count > MOST_MEMBERS:
                raise Refused("archive with too many members")
            name = safe(member.name)
            if member.issym() or member.islnk():
                drops["link"] += 1
            elif member.isdir():
                continue
            elif not member.isreg() or member.issparse():
                drops["neither file nor folder"] += 1
            elif member.size > MOST_MEMBER:
                drops["file too large"] += 1
            else:
                file = tar.extractfile(member)
                assert file is not None
                yield name, file.read()


def _of_zip(path: Path, most: int, drops: Counter[str]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        if len(infos) > MOST_MEMBERS:
            raise Refused("archive with too many members")
        for info in infos:
            name = safe(info.filename)
            kind = info.external_attr >> 16 & 0o170000
            if info.is_dir():
                continue
            if kind not in (0, 0o100000):
                drops["link" if kind == 0o120000 else "neither file nor folder"] += 1
            elif info.file_size > MOST_MEMBER:
                drops["file too large"] += 1
            else:
                with archive.open(info) as file:
                    data = file.read(info.file_size + 1)  # zipfile stops at the size that the header tells
                most -= len(data)
                if most < 0:
                    raise Refused("archive that unpacks to far more than it is")
                yield name, data
