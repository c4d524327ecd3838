"""TPU's static schedule, as libtpu writes it: which instruction bundles a kernel's loops hold, and what of that is matmul.

A TPU core issues one bundle (a very long instruction word) a cycle, in an order fixed when it is compiled. The listing of a
kernel's final bundles has a line or more for each: its address, its instructions, and which regions start and end there: a
branch (`sbr.rel`) to a region that started before closes a loop, and one to a later region jumps over a block. Beside it
lies a table of how many instructions of each unit a bundle holds, spills and fills among them.
What the listing cannot know are stalls: waits for memory, and units that are still busy. A schedule may be shorter than its
matrix units need (v5p: 14 bundles between matmuls that take 16 cycles; tpu7x queues them, to two thirds); then they are the bound.
"""

import re
from dataclasses import dataclass

from pallas_kernels.analysis.chips import Chip

BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:\s+(?:>\s*)*\{")
REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
BRANCH = re.compile(r"\bsbr\.rel\b[^;}]*target = \$region(\d+)")
MATMUL = re.compile(r"\bvmatmul\.(?:\w+\.)*?(bf16|f32|f8e\w+|s8|u8|s4|u4)\b")
DELAY = 4  # bundles after a branch that still run
ROWS = {"bf16": 16, "f32": 8}  # of the left side in one matmul instruction; 32 of 8 bits


@dataclass(frozen=True)
class Loop:
    """A loop that multiplies matrices itself (not only through a loop within it)."""

    depth: int  # 1: the grid's
    bundles: int  # of an iteration, without conditional blocks that multiply nothing (a tile's first and last steps)
    conditional: int  # bundles of those blocks, which no other figure counts
    matmuls: int  # matrix instructions
    products: int  # multiply-adds that they do
    spills: int  # vector registers written to memory for want of room
    fills: int  # and read again

    def over_ideal(self, chip: Chip) -> float:
        """Bundles over the cycles that the matrix units need for the same at full rate: up to 1 they are the bound.

        A matmul counts as a whole unit's: where a product's depth is less than the unit's side (128 of 256 on v6e), half of what is
        counted is nothing, and the figure looks twice as good as it is.
        """
        return self.bundles * chip.products / self.products


@dataclass(frozen=True)
class _Bundle:
    text: str
    spills: int
    fills: int
    matmuls: tuple[str, ...]  # the dtype of each


def loops(listing: str, table: str, chip: Chip) -> tuple[Loop, ...]:
    """The loops that multiply, innermost first; then by how much they multiply."""
    bundles = _bundles(listing, table)
    blocks = _blocks(bundles)
    rounds = [block for block in blocks if block.step < 0]
    idle = {i for block in blocks if block.step > 0 and not any(bundles[j].matmuls for j in block) for i in block}
    found = [_loop(bundles, own, rounds, idle, chip) for own in rounds]
    return tuple(sorted((one for one in found if one.matmuls), key=lambda one: (-one.depth, -one.products)))


def _bundles(listing: str, table: str) -> list[_Bundle]:
    uses = _uses(table)
    texts: list[list[str]] = []
    for line in listing.splitlines():
        if BUNDLE.match(line):
            texts.append([line])
        elif texts:
            texts[-1].append(line)
    whole = ("\n".join(lines) for lines in texts)
    return [_Bundle(text, *use, tuple(MATMUL.findall(text))) for text, use in zip(whole, uses, strict=True)]


def _uses(table: str) -> list[tuple[int, int]]:
    """(spills, fills) of every bundle."""
    lines = table.splitlines()
    names = [
        name.strip() for name in next(line for line in lines if line.startswith("MXU") or "MATMUL" in line).split(",")
    ]
    spill, fill = names.index("VSTORE:SPILL"), names.index("VLOAD:FILL")
    rows = [line.split() for line in lines[lines.index("== UTILIZATION:") + 1 :] if line.strip()]
    return [(int(row[spill]), int(row[fill])) for row in rows]


def _blocks(bundles: list[_Bundle]) -> list[range]:
    """What a branch may jump over, as a rising range; what it jumps back over, a loop, as a falling one."""
    landing: dict[str, int] = {}
    for i, bundle in enumerate(bundles):
        for region in REGION.findall(bundle.text):
            landing[region] = i
    blocks = []
    for i, bundle in enumerate(bundles):
        for region in BRANCH.findall(bundle.text):
            to = landing.get(region, i)
            blocks.append(range(i + 1, to) if to > i else range(min(i + DELAY, len(bundles) - 1), to - 1, -1))
    return blocks


def _loop(bundles: list[_Bundle], own: range, rounds: list[range], idle: set[int], chip: Chip) -> Loop:
    around = [other for other in rounds if other[-1] <= own[-1] and own[0] <= other[0]]
    within = {i for other in rounds if other not in around for i in other if i in own}
    mine = [i for i in own if i not in within]
    always = [bundles[i] for i in mine if i not in idle]
    dtypes = [dtype for bundle in always for dtype in bundle.matmuls]
    return Loop(
        depth=len(around),
        bundles=len(always),
        conditional=len(mine) - len(always),
        matmuls=len(dtypes),
        products=sum(ROWS.get(dtype, 32) * chip.matrix**2 for dtype in dtypes),
        spills=sum(bundle.spills for bundle in always),
        fills=sum(bundle.fills for bundle in always),
    )
