"""A stage: a pure function over shards, whose outputs appear whole or not at all.

    out/<shard>             what the function wrote
    out/<shard>.done.json   its mark: hash of function, inputs and settings; size and hash of the output; what it told

The function never learns which engine calls it: this process, a pool of processes, or Ray's (the extra `ray`) on one
machine or on many with a common file system. A shard with a mark of the same inputs is not made again, so a stage that
was killed goes on, and ends with the same bytes.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from glm_jax.data.document import DataError, digest, write

# (input files, output file, settings) -> facts, as JSON has them. A function of a module, so that processes find it.
Work = Callable[[Sequence[Path], Path, dict[str, Any]], dict[str, Any]]
Kind = Literal["pool", "one", "ray"]


@dataclass(frozen=True)
class Shard:
    """A part of a stage's work: `name` is its output's, `key` a hash of its inputs, `size` its share of the work."""

    name: str
    inputs: tuple[Path, ...]
    key: str
    size: int = 1


@dataclass(frozen=True)
class Engine:
    """Who does the work; the bytes are the same. `workers` 0: as many as this process may use cores."""

    kind: Kind = "pool"
    workers: int = 0

    def __post_init__(self):
        if self.workers < 0:
            raise DataError(f"workers={self.workers} must not be negative; 0 is one for each core")

    @property
    def processes(self) -> int:
        return self.workers or cores()

    def run(
        self, work: Work, shards: Sequence[Shard], settings: dict[str, Any], out: Path, tell: Callable[[int, int], None]
    ) -> list[dict[str, Any]]:
        """The facts of every shard, in their order, with `sha256` and `bytes` of its output; makes what is missing.

        `tell` gets sizes done and in all. An error in a shard ends the stage; shards that were done stay done.
        """
        names = [shard.name for shard in shards]
        if len(set(names)) != len(names):
            raise ValueError(f"shards must differ in their names: {sorted(n for n in names if names.count(n) > 1)[:3]}")
        out.mkdir(parents=True, exist_ok=True)
        for left in out.glob(".*.tmp"):
            left.unlink(missing_ok=True)
        found = {shard.name: _done(work, shard, settings, out) for shard in shards}
        missing = [shard for shard in shards if found[shard.name] is None]
        missing.sort(key=lambda shard: -shard.size)  # the longest first, so that the last ends soon after the others
        total = sum(shard.size for shard in shards)
        done = total - sum(shard.size for shard in missing)
        tell(done, total)
        for shard, facts in self._calls(work, missing, settings, out):
            found[shard.name] = facts
            done += shard.size
            tell(done, total)
        return [facts for facts in found.values() if facts is not None]

    def _calls(
        self, work: Work, shards: Sequence[Shard], settings: dict[str, Any], out: Path
    ) -> Iterator[tuple[Shard, dict[str, Any]]]:
        if self.kind == "ray":
            return _by_ray(self.workers, work, shards, settings, out)
        if self.kind == "one" or self.processes == 1 or len(shards) < 2:
            return ((shard, make(work, shard, settings, out)) for shard in shards)
        return _by_pool(min(self.processes, len(shards)), work, shards, settings, out)


def make(work: Work, shard: Shard, settings: dict[str, Any], out: Path) -> dict[str, Any]:
    """Make one shard: its output, then its mark. Called wherever the engine likes."""
    temporary = out / f".{shard.name}.{os.getpid()}.tmp"  # two processes never write the same file
    facts = work(shard.inputs, temporary, settings)
    with temporary.open("rb") as written:
        sha256 = hashlib.file_digest(written, "sha256").hexdigest()
    facts = {**facts, "sha256": sha256, "bytes": temporary.stat().st_size}
    os.replace(temporary, out / shard.name)
    mark = {"key": _key(work, shard, settings), "facts": facts}
    write(_mark(shard, out), json.dumps(mark, indent=1, sort_keys=True) + "\n")
    return facts


def _done(work: Work, shard: Shard, settings: dict[str, Any], out: Path) -> dict[str, Any] | None:
    """The facts of a shard that has been made from the same inputs, and whose output is whole."""
    try:
        mark = json.loads(_mark(shard, out).read_text(encoding="utf-8"))
        whole = (out / shard.name).stat().st_size == mark["facts"]["bytes"]
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return mark["facts"] if whole and mark["key"] == _key(work, shard, settings) else None


def _mark(shard: Shard, out: Path) -> Path:
    return out / f"{shard.name}.done.json"


def _key(work: Work, shard: Shard, settings: dict[str, Any]) -> str:
    return digest(json.dumps([work.__module__, work.__qualname__, shard.name, shard.key, settings], sort_keys=True))


def _by_pool(
    processes: int, work: Work, shards: Sequence[Shard], settings: dict[str, Any], out: Path
) -> Iterator[tuple[Shard, dict[str, Any]]]:
    spawn = multiprocessing.get_context("spawn")  # a fork of a process with threads (jax has them) may hang
    with futures.ProcessPoolExecutor(processes, spawn, _begin_worker) as pool:
        waiting = {pool.submit(make, work, shard, settings, out): shard for shard in shards}
        try:
            for ready in futures.as_completed(waiting):
                yield waiting[ready], ready.result()
        except futures.process.BrokenProcessPool:
            raise DataError(
                f"a worker of {processes} was ended from outside, perhaps for lack of memory; "
                "run the same command again, with fewer --workers if it happens again"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker() -> None:
    """Ctrl-C is the pool's owner's to answer, and a worker ends when its owner does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(1)


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with_parent(code: int) -> None:
    """From now on this process leaves at once with `code` when its parent is gone, killed or not: two runs must never write to
    one folder."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(code)

    threading.Thread(target=wait, daemon=True).start()


def _by_ray(
    processes: int, work: Work, shards: Sequence[Shard], settings: dict[str, Any], out: Path
) -> Iterator[tuple[Shard, dict[str, Any]]]:
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError('the engine ray is not installed; pip install ".[ray]", or use the engine pool') from None
    if not ray.is_initialized():
        ray.init(num_cpus=processes or None, include_dashboard=False, log_to_driver=False)
    remote = ray.remote(make)
    waiting = {remote.remote(work, shard, settings, out.absolute()): shard for shard in shards}
    while waiting:
        ready, _ = ray.wait(list(waiting), num_returns=1)
        for one in ready:
            yield waiting.pop(one), ray.get(one)
