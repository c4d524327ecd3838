"""Machines that a plan is made for, by name: "v5p:8x8x8" (chips along each side of a torus), "h200:1x1x8" (slices x hosts x
GPUs). What chips can do is in `pallas_kernels.analysis`; how fast they exchange bytes stands here."""

import itertools
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from glm_jax.config import ConfigError, nearest
from pallas_kernels import analysis
from pallas_kernels.analysis import Chip

GIB = 2.0**30

# Bytes a second that one device receives over all its links, from their makers' pages (half of what is given for both ways).
LINKS = {"v5e": 200e9, "v5p": 600e9, "v6e": 400e9, "tpu7x": 300e9, "h200": 450e9}
# The same between slices, or between hosts of GPUs: its share of its host's network cards (an H200 has one of 400 Gb/s to itself).
DCN = {"v5e": 3.125e9, "v5p": 6.25e9, "v6e": 12.5e9, "tpu7x": 6.25e9, "h200": 50e9}
DEVICES_PER_CHIP = {"tpu7x": 2}
HOSTS = re.compile(r"[1-9]\d*x[1-9]\d*x8")  # of GPUs: any number, all whole
FLAT = {"v5e": 2, "v6e": 2}  # sides of the torus, where they are not 3
TORUS = (1, 2, 4, 8, 12, 16, 20, 24, 28, 32)


@dataclass(frozen=True)
class Target:
    """A machine: `slices` of one topology, joined by a slower network."""

    name: str
    slices: int = 1

    @property
    def kind(self) -> str:
        return self.name.split(":")[0]

    @property
    def chip(self) -> Chip:
        return analysis.chip(self.name)

    @property
    def link_bandwidth(self) -> float:
        return LINKS[self.kind]

    @property
    def dcn_bandwidth(self) -> float:
        return DCN[self.kind]

    @property
    def gpu(self) -> bool:
        return self.kind == "h200"

    @property
    def sides(self) -> tuple[int, ...]:
        return tuple(int(side) for side in self.name.split(":")[1].split("x"))

    @property
    def count(self) -> int:
        """Devices, of all slices."""
        slices = 1 if self.gpu else self.slices  # of GPUs the first side counts them
        return slices * math.prod(self.sides) * DEVICES_PER_CHIP.get(self.kind, 1)

    @property
    def island(self) -> int:
        """Devices that fast links join: of a slice, or of a host of GPUs. In a mesh they follow one another."""
        return self.sides[-1] if self.gpu else self.count // self.slices

    def crossed(self, devices: int) -> float:
        """Links that a row crosses on its way from one of so many devices to another that it alone is meant for: on average, in a
        part of the torus as near to a cube as can be; one where they are switched."""
        ways = FLAT.get(self.kind, 3)
        return 1.0 if self.gpu else max(1.0, ways * devices ** (1 / ways) / 4)

    @cached_property
    def devices(self) -> list[Any]:
        """As jax describes them; the chip's compiler must be installed, the chip need not be here."""
        from jax.experimental import topologies

        try:
            if self.gpu:
                config = Path(analysis.__file__).with_name("h200.textproto").read_text()
                return topologies.get_topology_desc(
                    "", platform="cuda", target_config=config, topology=self.name.split(":")[1]
                ).devices
            more = {"num_slices": self.slices} if self.slices > 1 else {}
            return topologies.get_topology_desc(platform="tpu", topology_name=self.name, **more).devices
        except Exception as error:
            first = str(error).strip().splitlines()[0]
            raise ConfigError(f"topology {self.name!r}: {first}; {_offer(self.name)}") from None


def target(name: str, slices: int = 1) -> Target:
    """The machine of that name. ConfigError with the nearest for one that no maker builds."""
    if slices < 1:
        raise ConfigError(f"slices={slices} must be at least 1")
    kind, _, sides = name.partition(":")
    if kind not in LINKS:
        raise ConfigError(f"topology {name!r}: unknown chip {kind!r}; {_offer(name)}")
    if name not in names(kind) and not (kind == "h200" and HOSTS.fullmatch(sides)):
        form = " (slices x hosts x GPUs: four hosts of eight are h200:1x4x8)" if kind == "h200" else ""
        raise ConfigError(f"topology {name!r} does not exist{form}; {_offer(name)}")
    if kind == "h200" and slices > 1:
        raise ConfigError(f"slices={slices}: of GPUs the topology's first number counts slices, e.g. h200:{slices}x1x8")
    return Target(name, int(sides[: sides.index("x")]) if kind == "h200" else slices)


def missing(machine: Target) -> str | None:
    """How to install that chip's compiler; None where it is."""
    platform = "hopper" if machine.gpu else "tpu"
    return None if analysis.can_compile(platform) else analysis.INSTALL[platform]


def names(kind: str) -> list[str]:
    """Topologies of a chip that are offered, the smallest first: sides in order, whole hosts of 2 x 2 chips, or of up to 8 GPUs (of
    hosts there can be any number)."""
    if kind == "h200":
        hosts = ["1x1x1", "1x1x2", "1x1x4", *(f"1x{hosts}x8" for hosts in (1, 2, 4, 8, 16, 32, 64, 128))]
        return [f"{kind}:{sides}" for sides in hosts] + [f"{kind}:{slices}x1x8" for slices in (2, 4, 8, 16)]
    ways = FLAT.get(kind, 3)
    sides = itertools.combinations_with_replacement(TORUS, ways)
    most = {"v5e": 256, "v6e": 256, "v5p": 8960, "tpu7x": 9216}[kind]
    fitting = [s for s in sides if math.prod(s) <= most and (s[0] > 1 if ways == 2 else s[1] > 1 and s[0] > 1)]
    if ways == 3:
        fitting.append((2, 2, 1))
    return [f"{kind}:{'x'.join(map(str, s))}" for s in sorted(fitting, key=lambda s: (math.prod(s), s[-1]))]


def _offer(name: str) -> str:
    kind = name.partition(":")[0]
    close = nearest(kind, list(LINKS)) if kind not in LINKS else nearest(name, names(kind))
    return (
        close.replace("known:", "known among others:") if len(close) < 400 else close[:400].rsplit(", ", 1)[0] + ", ..."
    )
