"""What Mosaic GPU leaves of a compiled Hopper kernel: ptxas' report, PTX, and SASS where an `nvdisasm` is found."""

import re
from dataclasses import dataclass
from pathlib import Path

SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class MachineCode:
    kernel: str
    registers: int  # a thread
    spill_bytes: int  # stored and loaded, a thread
    wgmma: int  # matrix instructions in PTX
    hgmma: int | None  # the same in machine code; None without nvdisasm
    warnings: tuple[str, ...]  # ptxas', of matrix instructions that it had to serialise among them


def read(folder: Path) -> tuple[MachineCode, ...]:
    """One entry per kernel that was dumped."""
    return tuple(_read(report) for report in sorted(folder.glob("*.ptxas")))


def _read(report: Path) -> MachineCode:
    text, ptx = report.read_text(), report.with_suffix(".ptx")
    sass = next(report.parent.glob(f"{report.stem}.sass*"), None)
    return MachineCode(
        kernel=report.stem,
        registers=max((int(n) for n in re.findall(r"Used (\d+) registers", text)), default=0),
        spill_bytes=sum(int(n) for pair in SPILL.findall(text) for n in pair),
        wgmma=ptx.read_text().count("wgmma.mma_async"),
        hgmma=sass.read_text().count("HGMMA") if sass else None,
        warnings=tuple(re.findall(r"\(C\d+\)[^\n]*|Potential Performance Loss[^\n]*", text)),
    )
