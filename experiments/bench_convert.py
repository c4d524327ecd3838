"""Peak memory and time of `experiments.convert` both ways, on a made-up checkpoint of at least 6 GB.

    python -m experiments.bench_convert --folder /somewhere/with/20/GB --out experiments/results/bench_convert.json

Weights are noise in bfloat16: 30 MoE layers of 64 experts, so that an expert stack is 2 GB. Each conversion is a process of
its own, whose largest resident set (code, libraries and mapped pages of files included) is held against 1.3 times the
largest stacked weight. What comes back is compared with what was made, file by file. The folder is deleted at the end.
"""

import filecmp
import json
import math
import re
import shutil
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments import cli
from glm_jax.config import ConfigError, Model

BOUND = 1.3  # peak memory over the largest stacked weight


@dataclass(frozen=True)
class Args:
    """Options of the measurement."""

    folder: Path
    """Where three copies of the checkpoint have room; must not exist."""
    out: Path | None = None
    """Write the figures here too, as JSON."""
    experts: int = 64
    """Experts of a layer; 64 make 6.4 GB."""


def main(args: Args) -> None:
    if args.folder.exists():
        raise ConfigError(f"--folder {args.folder} exists, and would be deleted; name one that does not")
    try:
        figures = measure(args.folder, args.experts)
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    print(json.dumps(figures, indent=1))
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n")


def measure(folder: Path, experts: int) -> dict[str, Any]:
    """Make the checkpoint, convert it to a run and back, and compare."""
    made, run, back = (folder / name for name in ("made", "run", "back"))
    size = make(made, experts)
    figures: dict[str, Any] = size | {"bound_gb": round(BOUND * size["largest_weight_gb"], 3)}
    for name, src, dst in (("to_run", made, run), ("to_hugging_face", run, back)):
        begun = time.monotonic()
        command = [sys.executable, "-m", "experiments.convert", "--src", str(src), "--dst", str(dst)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak = re.search(r"peak resident memory ([\d.]+) GB", done.stdout)
        assert peak is not None, done.stdout
        figures[name] = {"peak_gb": float(peak[1]), "seconds": round(time.monotonic() - begun, 1)}
    files = sorted(path.name for path in made.glob("*.safetensors"))
    same = all(filecmp.cmp(made / name, back / name, shallow=False) for name in files)
    return {**figures, "files": len(files), "identical": same}


class Noise:
    """An array of random bits, made where it is read; the same part has the same bits."""

    def __init__(self, path: str, shape: tuple[int, ...], dtype: Any):
        self.shape, self.dtype, self._path = shape, np.dtype(dtype), path

    def __getitem__(self, part: tuple[slice, ...]) -> np.ndarray:
        shape = [one.stop - one.start for one in part]
        random = np.random.default_rng(zlib.crc32(repr((self._path, part)).encode()))
        bits = random.bytes(math.prod(shape) * self.dtype.itemsize)
        return np.frombuffer(bits, self.dtype).reshape(shape)


def make(folder: Path, experts: int) -> dict[str, Any]:
    """Write the checkpoint; its sizes."""
    import jax.numpy as jnp

    from glm_jax.hf import names
    from glm_jax.hf.write import export, sizes

    cfg = Model(
        V=32_768, D=1024, L=31, dense_layers=1, N=16, K=4, H=64, F=4096, M=512, E=experts, A=4, mtp_layers=1,
        max_positions=4096,
    )  # fmt: skip
    arrays = {
        path: Noise(path, declared.shape, np.float32 if path == names.ROUTER_BIAS else jnp.bfloat16)
        for path, declared in names.weights(cfg).items()
    }
    largest = max(math.prod(array.shape) * array.dtype.itemsize for array in arrays.values())
    for _ in export(folder, cfg, arrays):
        pass
    return {
        "checkpoint_gb": round(sum(sizes(cfg, arrays).values()) / 1e9, 3),
        "largest_weight_gb": round(largest / 1e9, 3),
    }


if __name__ == "__main__":
    cli.main(main)
