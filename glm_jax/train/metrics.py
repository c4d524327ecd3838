"""What a run tells: a JSONL record per step, TensorBoard events beside it, a progress bar or plain lines."""

import json
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
    killed run wrote after its last checkpoint: no step appears twice."""

    def __init__(self, folder: Path, step: int, total: int, name: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "log.jsonl"
        keep = [record for record in read(self.path) if record["step"] <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in keep))
        temporary.replace(self.path)
        self._file = open(self.path, "a")  # noqa: SIM115 (closed in `close`)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        on_terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=name, unit="tok", unit_scale=True, disable=not on_terminal, smoothing=0.05)
        self._plain, self._name, self._total = not on_terminal, name, total
        self._tokens, self._since, self._printed = 0, time.monotonic(), 0.0

    def event(self, kind: str, step: int, **values: Any) -> None:
        """A record that is not a step: the run's description, an evaluation."""
        self._write({"kind": kind, "step": step, **values})
        for name, value in values.items():
            for label, number in value.items() if isinstance(value, dict) else ():
                if isinstance(number, (int, float)):
                    self._board.add_scalar(f"{name}/{label}", number, step)

    def step(self, record: dict[str, Any], done_tokens: int) -> None:
        """One step's record; `done_tokens` of the stage lie behind it."""
        self._write({"kind": "step", **record})
        for name, value in record.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(f"train/{name}", value, record["step"])
        self._show(record, done_tokens)

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        self._board.close()

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def _show(self, record: dict[str, Any], done: int) -> None:
        now = time.monotonic()
        if not self._plain:
            if not self._bar.n:
                self._bar.initial = done - record["batch_tokens"]  # the time left follows from this process's rate
            self._bar.n = done
            self._bar.set_postfix(loss=f"{record['loss']:.3f}", lr=f"{record['lr']:.1e}")
        elif now - self._printed > PLAIN_LINE_SECONDS or done >= self._total:
            self._tokens = self._tokens or done - record["batch_tokens"]
            rate = (done - self._tokens) / max(now - self._since, 1e-9)
            left = (self._total - done) / rate if rate else 0
            line = f"{self._name}: {100 * done / self._total:3.0f} %  step {record['step']}  loss {record['loss']:.3f}"
            print(f"{line}  {rate:,.0f} tok/s  {left:.0f} s left", file=sys.stderr, flush=True)
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


def load_record(load_LE: np.ndarray) -> dict[str, Any]:
    """Expert load for a step's record: max/mean of each layer, and all counts where they are few."""
    mean_L = np.maximum(load_LE.mean(axis=1), 1e-9)
    record: dict[str, Any] = {"load_max_over_mean": [round(float(r), 4) for r in load_LE.max(axis=1) / mean_L]}
    if load_LE.size <= FULL_LOAD_LIMIT:
        record["load"] = load_LE.astype(int).tolist()
    return record
