"""Every kernel on every case: measured where it runs, compiled ahead of time for a chip that is not here.

    python -m experiments.kernels --device cpu --against stock --out experiments/results/kernels_cpu.json
    python -m experiments.kernels --device tpu:v5p --op grouped_matmul --out experiments/results/kernels_v5p.json
    python -m experiments.kernels --readme

Devices: `cpu` and `gpu` measure, medians of sides that take turns; `tpu:v5e`, `tpu:v5p`, `tpu:v6e`, `tpu:tpu7x` and `h200-aot`
compile only, on any machine with that compiler (pallas_kernels/analysis), and tell memory, the roofline bound, and what the
schedule or the machine code says. `--against stock` adds others' kernels for the same case in the same run: jax's own, and
tokamax's where it is installed. `--readme` writes pallas_kernels/README.md from the files in experiments/results.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments import cli
from glm_jax.config import ConfigError, nearest
from glm_jax.data.document import write

if TYPE_CHECKING:
    from pallas_kernels.analysis import Figures
    from pallas_kernels.bench import Bench

AOT = ("tpu:v5e", "tpu:v5p", "tpu:v6e", "tpu:tpu7x", "h200-aot")
DEVICES = ("cpu", "gpu", *AOT)
RESULTS = Path("experiments/results")
README = Path("pallas_kernels/README.md")
TOLD = 110  # characters of an error in the table


@dataclass(frozen=True)
class Args:
    """Options of the measurement."""

    device: str = "cpu"
    """cpu, gpu, tpu:v5e, tpu:v5p, tpu:v6e, tpu:tpu7x or h200-aot."""
    op: str | None = None
    """One operation's folder in pallas_kernels; every one by default."""
    case: tuple[str, ...] = ()
    """Only these cases."""
    against: Literal["stock"] | None = None
    """Others' kernels beside ours."""
    out: Path | None = None
    """Write the figures here, as JSON; what the file has of other operations and cases stays, if it is of this device and jax."""
    repetitions: int = 21
    """Measurements of each side."""
    timeout: float = 240
    """Seconds that compiling for a chip that is not here may take."""
    readme: bool = False
    """Measure nothing; write the table of all results."""


def main(args: Args) -> None:
    if args.readme:
        README.write_text(readme(sorted(RESULTS.glob("kernels_*.json"))))
        print(f"wrote {README}")
        return
    if args.device not in DEVICES:
        raise ConfigError(f"--device {args.device!r} is unknown; {nearest(args.device, list(DEVICES))}")
    if args.repetitions < 1:
        raise ConfigError(f"--repetitions {args.repetitions} must be at least 1")
    _check_device(args.device)
    if args.out:
        _kept(args.out, args.device)
    print(_line("operation", "case", "whose", "status", "figures"))
    for bench in _benches(args):
        for row in _rows(args, bench):
            figures = "  ".join(_cell({name: value}) for name, value in row["figures"].items())
            print(_line(row["operation"], row["case"], row["whose"], row["status"], figures), flush=True)
            if args.out:
                _keep(args.out, args.device, row)


def _keep(out: Path, device: str, row: dict[str, Any]) -> None:
    """Row by row: whoever interrupts keeps what is done. What another run has written there since stays."""
    known = {_key(one): one for one in [*_kept(out, device), row]}
    record = {"device": device, "machine": _machine(), "rows": list(known.values())}
    write(out, json.dumps(record, indent=1) + "\n")


def _kept(out: Path, device: str) -> list[dict[str, Any]]:
    """Rows that the file has. It tells one device, machine and jax for all of them: ConfigError where they are not ours."""
    if not out.exists():
        return []
    record = json.loads(out.read_text())
    theirs, ours = (
        f"--device {name} ({machine['device']}, jax {machine['jax']})"
        for name, machine in ((record["device"], record["machine"]), (device, _machine()))
    )
    if theirs != ours:
        raise ConfigError(
            f"--out {out} has rows of {theirs}, and new ones would be of {ours}; name another file, or remove this one"
        )
    return record["rows"]


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return row["operation"], row["case"], row["whose"]


def _check_device(device: str) -> None:
    from pallas_kernels import analysis

    compiler = {"h200-aot": "hopper"}.get(device, device.split(":")[0])
    if device in AOT and not analysis.can_compile(compiler):
        raise ConfigError(f"--device {device}: its compiler is not installed; {analysis.INSTALL[compiler]}")
    if device in ("cpu", "gpu"):
        import jax

        if jax.default_backend() != device:
            raise ConfigError(f"--device {device}: jax runs on {jax.default_backend()} here; use that, or one of {AOT}")


def _machine() -> dict[str, str]:
    import jax

    return {"jax": jax.__version__, "device": jax.devices()[0].device_kind}


def _benches(args: Args) -> Iterator["Bench"]:
    from pallas_kernels import bench

    if args.op is not None and args.op not in bench.folders():
        raise ConfigError(f"--op {args.op!r} has no bench; {nearest(args.op, bench.folders())}")
    found = False
    for folder in [args.op] if args.op else bench.folders():
        for one in bench.benches(folder, "bench" if args.device == "cpu" else "chip"):
            if not args.case or one.case in args.case:
                found = True
                yield one
    if not found:
        raise ConfigError(f"no case of {args.op or 'any operation'} is named {', '.join(args.case)}")


def _rows(args: Args, bench: "Bench") -> Iterator[dict[str, Any]]:
    """One row per side: ours for this device, and the peers if they are asked for."""
    from pallas_kernels.choose import BEST_FIRST

    platform = "gpu" if args.device == "h200-aot" else args.device.split(":")[0]
    ours = next(name for name in BEST_FIRST[platform] if name in bench.implementations)
    sides: dict[str, Callable] = {f"ours ({ours})": partial(bench.run, implementation=ours)}
    if args.against:
        sides |= bench.peers
    outcomes = _compiled(args, bench, sides) if args.device in AOT else _measured(args, bench, sides)
    for whose, (status, figures) in outcomes:
        yield {"operation": bench.operation, "case": bench.case, "whose": whose, "status": status, "figures": figures}


Outcome = tuple[str, tuple[str, dict[str, Any]]]


def _measured(args: Args, bench: "Bench", sides: dict[str, Callable]) -> Iterator[Outcome]:
    """Milliseconds and the rate of useful operations, of all sides in turns."""
    import jax

    from pallas_kernels.bench import flush, seconds_in_turns

    inputs = bench.inputs()
    ready, refused = {}, {}
    for whose, run in sides.items():
        try:
            ready[whose] = partial(jax.jit(run).lower(*inputs).compile(), *inputs)
            jax.block_until_ready(ready[whose]())  # too large a side fails here, and not the others with it
        except Exception as error:
            ready.pop(whose, None)
            refused[whose] = (_told(error), {})
    between = flush if args.device == "gpu" else None
    for whose, seconds in seconds_in_turns(ready, args.repetitions, between).items():
        temporary = ready[whose].func.memory_analysis()
        figures = {"ms": _short(1e3 * seconds), "GFLOP/s": _short(bench.operations / seconds / 1e9)}
        if temporary is not None:
            figures["temp_MiB"] = _short(temporary.temp_size_in_bytes / 2**20)
        yield whose, ("measured", figures)
    yield from refused.items()


def _compiled(args: Args, bench: "Bench", sides: dict[str, Callable]) -> Iterator[Outcome]:
    """What the compiler and its schedule say of each side."""
    from pallas_kernels import analysis

    for whose, run in sides.items():
        try:
            if args.device == "h200-aot":
                figures = analysis.hopper(run, bench.arguments, timeout=args.timeout)
            else:
                figures = analysis.tpu(run, bench.arguments, args.device.split(":")[1], timeout=args.timeout)
            yield whose, ("compiled", told(figures, bench))
        except Exception as error:
            yield whose, (_told(error), {})


def told(figures: "Figures", bench: "Bench") -> dict[str, Any]:
    """The roofline of the useful operations, memory, and per kernel the schedule of its inner loop or its machine code."""
    from pallas_kernels.analysis import bound_seconds

    bound = bound_seconds(figures.chip, bench.operations, bench.bytes_moved)
    known: dict[str, Any] = {"bound_ms": _short(1e3 * bound), "temp_MiB": _short(figures.temporary_bytes / 2**20)}
    if figures.operations:
        known["operations_over_useful"] = _short(figures.operations / bench.operations)
    for kernel, loops in figures.loops.items():
        if loops:
            known[kernel] = {"over_ideal": _short(loops[0].over_ideal(figures.chip)), "spills": loops[0].spills}
    for code in figures.machine_code:
        known[code.kernel] = {k: v for k, v in asdict(code).items() if k != "kernel" and v not in (None, ())}
    return known


def readme(paths: Sequence[Path]) -> str:
    """The table of all results: kernel, case, whose, device, status, figures."""
    text = [
        "# Kernels",
        "",
        "Generated by `python -m experiments.kernels --readme` from `experiments/results/kernels_*.json`; each of those by",
        "`python -m experiments.kernels --device DEVICE [--against stock] --out FILE`. Compiled rows were never run: `bound_ms` is",
        "the chip's roofline of the useful operations, `over_ideal` the bundles of the inner loop over the cycles of its matmuls",
        "(up to 1 the matrix units are the bound), `spills` vector registers written to memory in an iteration of it.",
        "A loop that takes one of several branches in each iteration counts all of them: our attention on TPU has a tile without a",
        "mask, with one, and where queries have prefixes one with these too, so its `over_ideal` is their mean and its `spills` their sum.",
        "`operations_over_useful` counts the body of an XLA loop once (cross-entropy's chunks), and a kernel by its cost estimate.",
    ]
    for path in paths:
        record = json.loads(path.read_text())
        text += ["", f"## {record['device']}", "", f"{record['machine']['device']}, jax {record['machine']['jax']}", ""]
        text += ["| operation | case | whose | status | figures |", "|---|---|---|---|---|"]
        for row in record["rows"]:
            cells = row["operation"], row["case"], row["whose"], row["status"], _cell(row["figures"])
            text.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(text) + "\n"


def _cell(figures: dict[str, Any]) -> str:
    plain = [f"{name} {value}" for name, value in figures.items() if not isinstance(value, dict)]
    nested = [
        f"`{name}`: " + ", ".join(f"{k} {_counted(v)}" for k, v in value.items())
        for name, value in figures.items()
        if isinstance(value, dict)
    ]
    return "; ".join(filter(None, [", ".join(plain), *nested]))


def _counted(value: Any) -> Any:
    """Of several, such as ptxas' warnings, how many; the file has their words."""
    return len(value) if isinstance(value, list | tuple) else value


def _told(error: Exception) -> str:
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:TOLD]


def _short(value: float) -> float:
    """Four significant figures."""
    return float(f"{value:.4g}") if math.isfinite(value) else value


def _line(*cells: str) -> str:
    return "".join(f"{cell:<{width}}" for cell, width in zip(cells, (34, 24, 18, 12, 0), strict=True))


if __name__ == "__main__":
    cli.main(main)
