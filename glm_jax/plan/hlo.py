"""What a compiled program does, read from its text: operations, bytes, traffic between devices, large arrays.

XLA's own cost analysis counts the body of a loop once. Here a computation counts as often as it runs: a `while` body by
its known trip count, or by the number that its condition compares with; everything else as often as what calls it.
"""

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

RAGGED = "ragged-all-to-all"
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", RAGGED)
NO_TRAFFIC = {  # with memory: names for what lies there already
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "iota", "call-start", "async-start", "async-update", "async-done", "opt-barrier",
}  # fmt: skip
SLICES = ("dynamic-slice", "slice", "gather")
ALIASED = "output_to_operand_aliasing={{}: (0, {})}"  # the result lies where the first argument lay
BITS = re.compile(r"\d+")
ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
SPACE = re.compile(r"S\(\d+\)")  # in a layout: another memory than the main one, which goes without saying
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
NAME = re.compile(r"%([\w.\-]+)")
CALLED = re.compile(r"\b(calls|to_apply|body|condition|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
COST = re.compile(r'"cost_estimate":\{[^}]*?"flops":"?(\d+)')
KERNEL = re.compile(r'op_name="[^"]*?([^/"]+)/mpmd_map"')
INDEX = re.compile(r"^, index=(\d+)")
SOURCE = re.compile(r'op_name="([^"]*)"')
WINDOW = re.compile(r"\bwindow=\{([^}]*)\}")
LABELS = re.compile(r"\bdim_labels=(\w+)_(\w+)->(\w+)")
CONTRACTED = re.compile(r"\blhs_contracting_dims=\{([\d,]*)\}")
LIBRARY = re.compile(r'"lhs_contracting_dimensions":\[([\d,"]*)\]')  # of a product that cuBLAS computes
LISTED = re.compile(r"\breplica_groups=\{\{([\d,]*)\}")
IOTA = re.compile(r"\breplica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
ORDER = r"(?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))?"
OVER_SLICES = re.compile(  # a TPU's host sends for it what a collective wants of other slices: {their numbers}x{0:the last device of one}
    r'_xla_megascale_target="\{([\d,]+)\}x\{0:(\d+)\}",_xla_megascale_transfer_type="(\w+)"'
)
OVER_MESH = re.compile(r"\breplica_groups=mesh\[([^\]]*)\]" + ORDER + r" \{([^}]*)\}")


@dataclass(frozen=True)
class Shape:
    dtype: str
    dims: tuple[int, ...]
    elsewhere: bool = False  # than in the device's main memory

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Predicates take a byte; 4-bit numbers half of one."""
        bits = BITS.search(self.dtype)
        return self.size * (int(bits.group()) / 8 if bits else 1)

    @property
    def main_bytes(self) -> float:
        """What of it lies in the main memory."""
        return 0 if self.elsewhere else self.bytes

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Op:
    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # several where it returns a tuple
    operands: tuple[str, ...]
    attributes: str
    literal: str = ""  # of a constant; of a parameter its number

    @property
    def bytes(self) -> float:
        return sum(shape.bytes for shape in self.shapes)

    @property
    def main_bytes(self) -> float:
        return sum(shape.main_bytes for shape in self.shapes)

    @property
    def source(self) -> str:
        """Where the program's text asked for it."""
        found = SOURCE.search(self.attributes)
        return found.group(1) if found else ""


@dataclass(frozen=True)
class Collective:
    kind: str
    devices: tuple[int, ...]  # of one group, as positions in the mesh
    bytes: float  # that each device receives, every time it runs; if ragged, the most that there is room for
    times: int


@dataclass(frozen=True)
class Computation:
    name: str
    ops: tuple[Op, ...]

    @cached_property
    def by_name(self) -> dict[str, Op]:
        return {op.name: op for op in self.ops}

    @cached_property
    def users(self) -> dict[str, list[Op]]:
        found: dict[str, list[Op]] = {}
        for op in self.ops:
            for operand in op.operands:
                found.setdefault(operand, []).append(op)
        return found

    def operand_shapes(self, op: Op) -> list[Shape]:
        known = (self.by_name[name] for name in op.operands if name in self.by_name)
        return [shape for operand in known for shape in operand.shapes]


class Program:
    """`compiled.as_text()`, understood."""

    def __init__(self, text: str):
        self.computations = {c.name: c for c in _computations(text)}
        self.entry = next(reversed(self.computations))  # callees come before their callers
        self.inlined: set[str] = set()  # whose operations are parts of one of the caller's: fusions, reducers
        self.times = self._times()

    def _times(self) -> Counter[str]:
        times: Counter[str] = Counter({self.entry: 1})
        for name in reversed(self.computations):
            where = self.computations[name]
            for op in where.ops:
                called_by = CALLED.findall(op.attributes)
                trips = self._trips(where, op, dict(called_by)) if op.opcode == "while" else 1
                for how, names in called_by:
                    for called in re.findall(r"[\w.\-]+", names):
                        times[called] += times[name] * (trips if how == "body" else 1)
                        if op.opcode == "fusion" or (how == "to_apply" and op.opcode != "call") or name in self.inlined:
                            self.inlined.add(called)
        return times

    def _trips(self, where: Computation, loop: Op, called: dict[str, str]) -> int:
        """Loops that jax makes count up from zero, and from one where the compiler has taken the first turn out; one whose end is known
        on the device alone counts once."""
        if known := TRIPS.search(loop.attributes):
            return int(known.group(1))
        condition = self.computations[called["condition"].lstrip("%")]
        constants = (op.literal for op in condition.ops if op.opcode == "constant")
        end = max((int(literal) for literal in constants if literal.isdigit()), default=None)
        return 1 if end is None else end - _begun(where, loop, condition)

    def ops(self, *, inlined: bool) -> Iterator[tuple[Computation, Op, int]]:
        """(where it stands, operation, how often it runs); those inside fusions too, or not."""
        for name, computation in self.computations.items():
            if self.times[name] and (inlined or name not in self.inlined):
                for op in computation.ops:
                    yield computation, op, self.times[name]

    @cached_property
    def flops(self) -> dict[str, float]:
        """Of matrix products, by what does them: "xla", or the name of a kernel as its cost estimate has it."""
        found: dict[str, float] = defaultdict(float)
        for computation, op, times in self.ops(inlined=True):
            if op.opcode == "dot":
                found["xla"] += times * _dot_flops(computation, op)
            elif op.opcode == "convolution":
                found["xla"] += times * _convolution_flops(computation, op)
            elif op.opcode == "custom-call" and (contracted := LIBRARY.search(op.attributes)):
                found["xla"] += times * _product_flops(computation, op, contracted.group(1).replace('"', ""))
            elif op.opcode == "custom-call" and (cost := COST.search(op.attributes)):
                found[re.sub(r"[.\d]+$", "", op.name)] += times * int(cost.group(1))
        return dict(found)

    @cached_property
    def kernels(self) -> dict[str, int]:
        """How often each Mosaic GPU kernel is called."""
        found: dict[str, int] = defaultdict(int)
        for _, op, times in self.ops(inlined=True):
            if op.opcode == "custom-call" and (name := KERNEL.search(op.attributes)):
                found[name.group(1)] += times
        return dict(found)

    @cached_property
    def bytes_moved(self) -> float:
        """To and from the device's main memory: each operation's arguments and results that lie there, of a slice what is sliced."""
        return sum(times * self._traffic(where, op) for where, op, times in self.ops(inlined=False))

    def _traffic(self, where: Computation, op: Op) -> float:
        if op.opcode in NO_TRAFFIC or op.opcode.endswith("-done"):
            return 0
        arguments = where.operand_shapes(op)
        if op.opcode == "copy-start":  # to another memory, or from it; its result names both places
            return sum(shape.main_bytes for shape in op.shapes[:2])
        if op.opcode.removesuffix("-start") in SLICES:
            taken = op.shapes[1 if op.opcode.endswith("-start") else 0]  # begun, it names what it is cut from first
            return taken.main_bytes + (0 if arguments[0].elsewhere else taken.bytes)
        if op.opcode == "dynamic-update-slice":
            return arguments[1].main_bytes + (0 if op.shapes[0].elsewhere else arguments[1].bytes)
        if op.opcode != "fusion":
            return op.main_bytes + sum(shape.main_bytes for shape in arguments)
        inside = self._called(op)
        read = sum(self._read(inside, p) for p in inside.ops if p.opcode == "parameter")
        root = inside.ops[-1]
        results = [inside.by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
        return read + sum(_written(inside, result) for result in results)

    def _tiled_anew(self, op: Op) -> bool:
        """A copy in the place of its argument, inside a fusion: what is read of it is tiled anew, and nothing else."""
        return (
            op.opcode == "fusion"
            and ALIASED in op.attributes
            and [z.opcode for z in self._called(op).ops] == ["parameter", "copy"]
        )

    def _called(self, fusion: Op) -> Computation:
        return self.computations[CALLED.findall(fusion.attributes)[0][1].lstrip("%")]

    def _read(self, inside: Computation, op: Op) -> float:
        """Bytes of a fusion's argument that it reads: slices alone where nothing else is done with it, also in a fusion inside it."""
        return min(op.main_bytes, sum(self._read_by(inside, user, op) for user in inside.users.get(op.name, [])))

    def _read_by(self, inside: Computation, user: Op, op: Op) -> float:
        if user.opcode == "bitcast" or self._tiled_anew(user):
            return self._read(inside, user)
        if user.opcode == "fusion":
            within = self._called(user)
            places = [str(i) for i, name in enumerate(user.operands) if name == op.name]
            return sum(self._read(within, p) for p in within.ops if p.opcode == "parameter" and p.literal in places)
        if user.operands[0] != op.name or user.operands.count(op.name) > 1:
            return op.bytes
        return user.bytes if user.opcode in SLICES else 0 if user.opcode == "dynamic-update-slice" else op.bytes

    @cached_property
    def collectives(self) -> list[Collective]:
        found = []
        for where, op, times in self.ops(inlined=True):
            kind = op.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                shapes, group = [shape.bytes for shape in where.operand_shapes(op)], _group(op)
                operands = (
                    sum(shapes) if kind != RAGGED else min(shapes[:2])
                )  # no more than where from and where to have
                if kind == "all-reduce" and where.name.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"  # as TPU's compiler writes it: a fusion that keeps a slice of the sum
                found.append(Collective(kind, group, operands * _received(kind, len(group)), times))
            elif op.opcode == "send" and (over := OVER_SLICES.search(op.attributes)):
                slices, kind = len(_integers(over.group(1))), over.group(3).lower().replace("_", "-")
                group = tuple(slice * (int(over.group(2)) + 1) for slice in range(slices))
                kind = kind if kind in COLLECTIVES else "collective-permute"
                found.append(Collective(kind, group, op.shapes[0].bytes * _received(kind, slices), times))
        return found

    def largest(self, count: int) -> list[tuple[str, Shape, str]]:
        """(operation, shape, source) of the largest arrays that it makes, of each shape and source one."""
        seen: dict[tuple[str, str], tuple[str, Shape, str]] = {}
        for _, op, _ in self.ops(inlined=False):
            if op.opcode in NO_TRAFFIC - {"while"} or op.opcode.endswith(("-start", "-done")):
                continue
            for shape in op.shapes:
                seen.setdefault((str(shape), op.source), (op.opcode, shape, op.source))
        return sorted(seen.values(), key=lambda row: -row[1].bytes)[:count]


def _begun(where: Computation, loop: Op, condition: Computation) -> int:
    """From where the loop's counter starts, if that is a constant of the program."""
    counters = (op for op in condition.ops if op.opcode == "get-tuple-element" and str(op.shapes[0]) == "s32[]")
    places = [int(found.group(1)) for op in counters if (found := INDEX.search(op.attributes))]
    value = where.by_name.get(loop.operands[0])
    if not places or value is None or value.opcode != "tuple":
        return 0
    value = where.by_name.get(value.operands[places[0]])
    while value is not None and value.opcode == "copy":
        value = where.by_name.get(value.operands[0])
    return int(value.literal) if value is not None and value.opcode == "constant" else 0


def _computations(text: str) -> Iterator[Computation]:
    name, ops, entry = "", [], None
    for line in text.splitlines():
        if line.startswith("}") and name:  # what runs beside the main thread says so behind it
            done = Computation(name, tuple(ops))
            if entry == name:
                last = done
            else:
                yield done
            name = ""
        elif name:
            if found := LINE.match(line):
                ops.append(_op(*found.groups()))
        elif found := HEADER.match(line):
            name, ops = found.group(2), []
            entry = name if found.group(1) else entry
    yield last


def _op(name: str, rest: str) -> Op:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode, _, _ = rest[end + 1 :].partition("(")
    opcode = opcode.strip()
    start = rest.index("(", end)
    close = _closing(rest, start)
    operands = tuple(NAME.findall(rest[start:close]))
    literal = rest[start + 1 : close] if opcode in ("constant", "parameter") else ""
    return Op(name, opcode, _shapes(rest[:end]), operands, rest[close + 1 :], literal)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis at `start` closes."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return found.start()
    return len(text)


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(
        Shape(dtype, _integers(dims), bool(SPACE.search(layout))) for dtype, dims, layout in ARRAY.findall(text)
    )


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def _dot_flops(where: Computation, op: Op) -> float:
    found = CONTRACTED.search(op.attributes)
    return _product_flops(where, op, found.group(1) if found else "")


def _product_flops(where: Computation, op: Op, contracted: str) -> float:
    left = where.by_name[op.operands[0]].shapes[0]
    return 2 * op.shapes[0].size * math.prod(left.dims[d] for d in _integers(contracted))


def _convolution_flops(where: Computation, op: Op) -> float:
    """TPU's compiler writes every product of matrices as a convolution, batches as spatial dimensions with holes."""
    left, right = (where.by_name[name].shapes[0].dims for name in op.operands[:2])
    labels = LABELS.search(op.attributes)
    assert labels is not None
    left_labels, right_labels, out_labels = labels.groups()
    window = WINDOW.search(op.attributes)
    sizes = dict(part.split("=") for part in window.group(1).split()) if window else {}
    out = op.shapes[0].dims
    pairs = 1
    for d, label in enumerate(sorted(c for c in left_labels if c.isdigit())):
        pairs *= _window_pairs(sizes, d, left[left_labels.index(label)], out[out_labels.index(label)])
    batch, features = (out[out_labels.index(label)] for label in "bf")
    return 2 * batch * features * right[right_labels.index("i")] * pairs


def _window_pairs(sizes: dict[str, str], d: int, length: int, out: int) -> int:
    """Pairs of a result's place and a window's place at which there is an element, in the window's dimension d."""

    def of(name: str, default: str) -> str:
        return sizes[name].split("x")[d] if name in sizes else default

    low = int(of("pad", "0_0").split("_")[0])
    size, stride, left, right = (int(of(name, "1")) for name in ("size", "stride", "lhs_dilate", "rhs_dilate"))
    places = (o * stride + k * right - low for o in range(out) for k in range(size))
    return sum(0 <= place <= (length - 1) * left and place % left == 0 for place in places)


def _group(op: Op) -> tuple[int, ...]:
    """The first of its groups of devices; none listed: a permutation's pairs are its own matter."""
    if found := IOTA.search(op.attributes):
        size = int(found.group(2))
        dims = _integers(found.group(3))
        order = _integers(found.group(4)) if found.group(4) else tuple(range(len(dims)))
        return tuple(_iota(dims, order, i) for i in range(size))
    if found := OVER_MESH.search(op.attributes):
        axes = {name: int(size) for name, size in (axis.split("=") for axis in found.group(1).split(","))}
        over = [name in found.group(4).split(",") for name in axes]
        kept = itertools.product(*(range(size if one else 1) for size, one in zip(axes.values(), over, strict=True)))
        places = [_flat(place, axes.values()) for place in kept]
        if found.group(2):
            places = [_iota(_integers(found.group(2)), _integers(found.group(3)), place) for place in places]
        return tuple(places)
    if found := LISTED.search(op.attributes):
        return _integers(found.group(1))
    return (0,)


def _iota(dims: tuple[int, ...], order: tuple[int, ...], index: int) -> int:
    """Entry `index` of arange(prod(dims)).reshape(dims).transpose(order), flattened."""
    place = [0] * len(dims)
    for d in reversed(order):
        index, place[d] = divmod(index, dims[d])
    return _flat(place, dims)


def _flat(place: Iterable[int], dims: Iterable[int]) -> int:
    """Where in a flattened array of these dimensions."""
    flat = 0
    for here, size in zip(place, dims, strict=True):
        flat = flat * size + here
    return flat


def _received(kind: str, devices: int) -> float:
    """Bytes that a device receives for each byte that it puts in."""
    share = 1 - 1 / devices
    return {"all-gather": devices - 1, "all-reduce": 2 * share, "collective-permute": 1}.get(kind, share)


def _written(inside: Computation, result: Op) -> float:
    if result.shapes[0].elsewhere:
        return 0
    while result.opcode == "bitcast" and result.operands[0] in inside.by_name:
        result = inside.by_name[result.operands[0]]
    if result.opcode == "dynamic-update-slice":
        return inside.by_name[result.operands[1]].bytes
    return result.bytes
