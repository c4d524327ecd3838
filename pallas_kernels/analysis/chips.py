"""Facts about chips, per JAX device, from their makers' pages: what a roofline and a static schedule are held against."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Dense peaks. A tpu7x chip is two devices, a v5p chip one device of two cores."""

    flops: float  # bfloat16 in, float32 out, a second
    bandwidth: float  # bytes a second of its main memory
    memory: float  # bytes
    fp8_flops: float = 0.0  # 0: none, or none stated
    cores: int = 1  # that share a device's programs
    matrix: int = 0  # rows and columns of a TPU's matrix unit
    products: int = 0  # bfloat16 multiply-adds a cycle and core: flops = 2 * products * cores * clock


GIB = 2.0**30

CHIPS = {
    "v5e": Chip(197e12, 819e9, 16 * GIB, matrix=128, products=4 * 128 * 128),
    "v5p": Chip(459e12, 2765e9, 95 * GIB, cores=2, matrix=128, products=4 * 128 * 128),
    "v6e": Chip(918e12, 1640e9, 32 * GIB, matrix=256, products=4 * 256 * 256),  # two units, two rows a cycle
    "tpu7x": Chip(1153.5e12, 3690e9, 96 * GIB, fp8_flops=2307e12, matrix=256, products=4 * 256 * 256),
    "h200": Chip(989e12, 4800e9, 141e9, fp8_flops=1979e12),
}

TOPOLOGY = {
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}  # the smallest that libtpu describes
ONE_HOST_HOPPER = "1x1x1"  # slices x hosts x devices


def chip(name: str) -> Chip:
    """The facts of "v5p", or of the chip of a topology such as "v5p:4x4x4"."""
    kind = name.split(":")[0]
    if kind not in CHIPS:
        raise ValueError(f"unknown chip {name!r}; known: {', '.join(CHIPS)} (pallas_kernels/analysis/chips.py)")
    return CHIPS[kind]


def bound_seconds(chip: Chip, operations: float, bytes_moved: float) -> float:
    """The roofline: no program that does so much takes less."""
    return max(operations / chip.flops, bytes_moved / chip.bandwidth)
