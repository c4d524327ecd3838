"""Jobs that wait for each other, several at a time: how the parts of a long script share a machine.

A job is a list of parts, and a part is a file with the function that makes it: what is there is not made again, so a
script that was interrupted goes on by the same command. On an accelerator, which belongs to one process, jobs run one after
another in this process. On CPUs each runs in a process of its own, with all cores or with a share of them. A miniature's
operations are too small to be spread over threads: three experts that know nothing of each other run side by side, and
a job that has the machine for itself splits its rows over two CPU devices, as a large run does over many chips.
"""

import io
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TextIO

import psutil

from experiments import cli
from glm_jax.config import Mesh, Run
from glm_jax.data.engine import cores, end_with_parent

Part = tuple[str, Callable[[], Any]]  # the file, in the run's folder, that is there when it is done; what makes it

MOST_AT_ONCE = 3  # jobs that share the cores: each holds the memory of a model in training
CPU_DEVICES = 2  # of a job that has them all, whatever their number: a run's figures must not depend on it
PROGRAMS_GB = 0.8  # resident memory of a process above which it forgets the programs of its last part
POLL_SECONDS = 0.5
# A step's arrays are asked for and given back at each step; in pages of 2 MB that costs a fifth of the time less.
HUGE_PAGES = "glibc.malloc.hugetlb=1"


@dataclass(frozen=True)
class Job:
    """Parts to be done in order, once the jobs that it needs are done."""

    name: str
    parts: tuple[Part, ...]  # functions of modules and partials of them: they travel to another process
    needs: tuple[str, ...] = ()
    whole: bool = True  # takes all cores; else runs beside others on a share of them
    devices: int = 1  # that the cores stand for

    def open(self, folder: Path) -> bool:
        """Whether a part is still to be made."""
        return any(not (folder / done).exists() for done, _ in self.parts)


def run(jobs: Sequence[Job], folder: Path, tick: Callable[[], Any] = lambda: None) -> None:
    """Do every job of `jobs` that is open; calls `tick` now and then while one is at work. Leaves with a job's exit code where one
    fails, having ended the others: what they had made is kept. ConfigError where another process does jobs of that folder."""
    import jax

    from glm_jax.train import checkpoint

    with checkpoint.sole_writer(folder):
        if jax.default_backend() == "cpu":
            _Processes(jobs, folder, tick).run()
            return
        for job in _in_order(jobs):
            _work(job, folder, tick)


def cpu_devices(run: Run, *rows: int) -> int:
    """`devices` of a job with microbatches of `rows`: `CPU_DEVICES` where they divide these and the run says nothing else."""
    return math.gcd(CPU_DEVICES, run.model.D, *rows) if run.mesh == Mesh() else 1


def memory_gb() -> float:
    """Resident memory of this process and those that it began, GB of 10^9 bytes. They run the same libraries, so pages of files
    count once."""
    me, own, of_files = psutil.Process(), 0, 0
    for process in (me, *me.children(recursive=True)):
        try:
            told = process.memory_info()
        except psutil.NoSuchProcess:  # ended meanwhile
            continue
        shared = getattr(told, "shared", 0)  # Linux tells
        own, of_files = own + told.rss - shared, max(of_files, shared)
    return (own + of_files) / 1e9


def _in_order(jobs: Sequence[Job]) -> list[Job]:
    """`jobs`, each after those that it needs."""
    left, ordered = list(jobs), []
    while left:
        done = {job.name for job in ordered}
        ready = next(job for job in left if set(job.needs) <= done)
        left.remove(ready)
        ordered.append(ready)
    return ordered


def _work(job: Job, folder: Path, tick: Callable[[], Any] = lambda: None) -> None:
    import jax

    for done, work in job.parts:
        there = (folder / done).exists()
        print(f"{done.removesuffix('.json')}{'  is there' if there else ''}", file=sys.stderr, flush=True)
        if not there:
            if psutil.Process().memory_info().rss > PROGRAMS_GB * 1e9:
                jax.clear_caches()
            work()
            tick()


class _Processes:
    """Jobs under way, each in a process of its own."""

    def __init__(self, jobs: Sequence[Job], folder: Path, tick: Callable[[], Any]):
        self._waiting, self._folder, self._tick = _in_order(jobs), folder, tick
        self._running: list[tuple[Job, BaseProcess]] = []
        self._done: set[str] = set()
        self._cores = cores()
        self._at_once = min(self._cores, MOST_AT_ONCE)

    def run(self) -> None:
        try:
            while self._waiting or self._running:
                while (job := self._next()) is not None:
                    self._waiting.remove(job)
                    self._begin(job)
                connection.wait([process.sentinel for _, process in self._running], timeout=POLL_SECONDS)
                if self._running:
                    self._tick()
                self._gather()
        finally:
            for _, process in self._running:
                process.terminate()
            for _, process in self._running:
                process.join()

    def _next(self) -> Job | None:
        """A job that can begin beside those that run."""
        for job in self._waiting:
            room = not self._running if job.whole else len(self._running) < self._at_once
            if room and set(job.needs) <= self._done:
                return job
        return None

    def _begin(self, job: Job) -> None:
        if not job.open(self._folder):
            self._done.add(job.name)
            return
        threads = self._cores if job.whole else self._cores // self._at_once
        arguments = (partial(_work, job, self._folder), threads, job.devices, "" if job.whole else job.name)
        os.environ.setdefault("GLIBC_TUNABLES", HUGE_PAGES)  # read when a process begins
        process = multiprocessing.get_context("spawn").Process(target=_child, args=arguments, name=job.name)
        process.start()
        self._running.append((job, process))

    def _gather(self) -> None:
        for job, process in list(self._running):
            code = process.exitcode
            if code is None:
                continue
            process.join()
            self._running.remove((job, process))
            if code or job.open(self._folder):
                told = f"signal {-code}" if code < 0 else f"exit code {code}, before all of it was there"
                print(f"{job.name} ended with {told}", file=sys.stderr, flush=True)
                sys.exit(code if code > 0 else cli.FAILURE)
            self._done.add(job.name)


def _child(work: Callable[[], None], threads: int, devices: int, name: str) -> None:
    """A job's process: `threads` for jax's computations on CPU `devices`, lines that begin with `name`, and an end when its
    parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends its children
    end_with_parent(cli.INTERRUPTED)
    os.environ["PJRT_NPROC"] = str(threads)
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(devices))
    if name:
        sys.stdout, sys.stderr = _Named(name, sys.stdout), _Named(name, sys.stderr)
    cli.leave_after(work)


class _Named(io.TextIOBase):
    """Whole lines, each with a job's name in front; no terminal, so that progress comes in lines too."""

    def __init__(self, name: str, stream: TextIO):
        self._name, self._stream, self._line = name, stream, ""

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        if lines:
            self._stream.write("".join(f"{self._name} | {line}\n" for line in lines))
            self._stream.flush()
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()
