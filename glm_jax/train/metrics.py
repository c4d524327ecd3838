"""What a run tells: a JSONL record per step, TensorBoard events beside it, a progress bar or plain lines."""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

PLAIN_LINE_SECONDS = 10.0
FULL_LOAD_LIMIT = 4096  # counts; above it a record keeps each layer's max/mean only


class Log:
    """Appends to `folder/log.jsonl` and TensorBoard. Opened at step s, it first drops records of later steps, which a
    killed run wrote after its last checkpoint: no step appears twice. Of several processes one `writes`, the others say
    nothing."""

    def __init__(
        self,
        folder: Path,
        step: int,
        total: int,
        name: str,
        unit: str = "tok",
        shown: tuple[str, ...] = ("loss", "lr"),
        writes: bool = True,
    ):
        self.path, self._writes = folder / "log.jsonl", writes
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            keep = [record for record in read(self.path) if record["step"] <= step]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(record) + "\n" for record in keep))
            temporary.replace(self.path)
        self._file = open(self.path if writes else os.devnull, "a")  # noqa: SIM115 (closed in `close`)
        purge = step + 1 if step else None
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge, write_to_disk=writes)
        on_terminal = writes and sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=name, unit=unit, unit_scale=True, disable=not on_terminal, smoothing=0.05)
        self._plain, self._name, self._total, self._unit, self._shown = not on_terminal, name, total, unit, shown
        self._first: tuple[int, float] | None = None  # (done, when) of this process's first step, which compiles
        self._printed = 0.0

    def event(self, kind: str, step: int, **values: Any) -> None:
        """A record that is not a step: the run's description, an evaluation."""
        self._write({"kind": kind, "step": step, **values})
        for name, value in values.items():
            for label, number in value.items() if isinstance(value, dict) else ():
                if isinstance(number, (int, float)):
                    self._board.add_scalar(f"{name}/{label}", number, step)

    def step(self, record: dict[str, Any], done: int) -> None:
        """One step's record; `done` of the total lies behind it."""
        self._write({"kind": "step", **record})
        for name, value in record.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(f"train/{name}", value, record["step"])
        self._show(record, done)

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        self._board.close()

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def _show(self, record: dict[str, Any], done: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = done, now
            self._bar.initial = done  # the time left follows from this process's rate
        values = {name: f"{record[name]:.4g}" for name in self._shown}
        if not self._plain:
            self._bar.n = done
            self._bar.set_postfix(values)
        elif self._writes and (now - self._printed > PLAIN_LINE_SECONDS or done >= self._total):
            rate = (done - self._first[0]) / max(now - self._first[1], 1e-9)
            told = "  ".join(f"{name} {value}" for name, value in values.items())
            line = f"{self._name}: {100 * done / self._total:3.0f} %  step {record['step']}  {told}"
            if rate:
                line += f"  {rate:,.3g} {self._unit}/s  {(self._total - done) / rate:.0f} s left"
            print(line, file=sys.stderr, flush=True)
            self._printed = now


def read(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Records of a log, of one kind or all; a half-written last line (a killed run) is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if kind is None or record["kind"] == kind:
            records.append(record)
    return records


def check_finite(record: dict[str, Any], where: str, last_good: int | None, rate: str) -> None:
    """FloatingPointError where a step's loss or gradient norm is no number; `rate` names the setting to lower."""
    loss, norm = record["loss"], record["gradient_norm"]
    if not (math.isfinite(loss) and math.isfinite(norm)):
        way = f"lower {rate} and go on from the last good checkpoint, step {last_good}, by the same command"
        if last_good is None:
            way = f"there is no checkpoint yet: begin again with a lower {rate}"
        raise FloatingPointError(f"loss {loss} and gradient norm {norm} at {where}; {way}")


def load_record(load_LE: np.ndarray) -> dict[str, Any]:
    """Expert load for a step's record: max/mean of each layer, and all counts where they are few."""
    mean_L = np.maximum(load_LE.mean(axis=1), 1e-9)
    record: dict[str, Any] = {"load_max_over_mean": [round(float(r), 4) for r in load_LE.max(axis=1) / mean_L]}
    if load_LE.size <= FULL_LOAD_LIMIT:
        record["load"] = load_LE.astype(int).tolist()
    return record
