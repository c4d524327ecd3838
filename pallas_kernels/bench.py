"""What is measured of every operation, and how: the one protocol that each folder's `bench.py` follows.

A folder's `bench.py` has `benches(tag)`: a `Bench` for every operation of every case with that tag, "bench" (a CPU's size) or
"chip" (the published models', for an accelerator). Functions in it travel to other processes: they are a module's own or a
`functools.partial` of such. A peer is another's kernel for the same operation, named by whose it is; it imports what it
needs when it is called and raises ImportError or NotImplementedError where it cannot.
"""

import importlib
import importlib.util
import pkgutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import pallas_kernels
from pallas_kernels.choose import platform

TAGS = ("bench", "chip")
FLUSH_BYTES = 2**28  # more than a GPU's cache holds


@dataclass(frozen=True)
class Bench:
    operation: str  # the door's function, and "and gradient" where the backward pass is in it
    case: str
    run: Callable[..., Any]  # of `implementation=` and the arguments
    arguments: tuple[jax.ShapeDtypeStruct, ...]
    operations: float  # that the result needs: two a multiply-add
    bytes_moved: float  # arguments and results once each
    inputs: Callable[[], tuple[Array, ...]]  # for `arguments`, with numbers that mean something (group sizes, segments)
    implementations: tuple[str, ...]
    peers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)


def folders() -> list[str]:
    """The operations' folders that have a bench."""
    names = [module.name for module in pkgutil.iter_modules(pallas_kernels.__path__) if module.ispkg]
    return [name for name in names if importlib.util.find_spec(f"pallas_kernels.{name}.bench") is not None]


def benches(folder: str, tag: str) -> Iterator[Bench]:
    """Raises ValueError for a folder that has none."""
    if folder not in folders():
        raise ValueError(f"{folder}: no bench of that name; known: {', '.join(folders())}")
    yield from importlib.import_module(f"pallas_kernels.{folder}.bench").benches(tag)


def tagged(cases: Mapping[str, Any], tag: str) -> Iterator[tuple[str, Any, Any]]:
    """(name, case, dtype) of those with the tag: bfloat16 on chips, float32 on a CPU."""
    for name, case in cases.items():
        if tag in case.tags:
            yield name, case, jnp.bfloat16 if tag == "chip" else jnp.float32


def normal(dtype: Any, *shapes: tuple[int, ...], seed: int = 0) -> tuple[Array, ...]:
    """Standard normal arrays."""
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for shape in shapes)


@jax.jit
def flush() -> Array:
    """Fills a GPU's cache with something else: what to do between two measurements there."""
    return jnp.ones(FLUSH_BYTES, jnp.int8)


def only_on_tpu(whose: str) -> None:
    """Raises NotImplementedError where the program is not compiled for a TPU: a peer would be interpreted there, or fail."""
    if platform() != "tpu":
        raise NotImplementedError(f"{whose} is for TPU")


def only_where_it_runs(whose: str) -> None:
    """Raises NotImplementedError while compiling for a device that is not here, by which a peer would choose its kernel."""
    if platform() != jax.default_backend():
        raise NotImplementedError(f"{whose} asks this machine's device which kernel to take")


def seconds_in_turns(
    sides: Mapping[str, Callable[[], Any]], repetitions: int, between: Callable[[], Any] | None = None
) -> dict[str, float]:
    """Median seconds of each side, after one call that warms up. Sides take turns: a busy machine slows all of them.

    `between` runs before each measurement: what empties a cache.
    """
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repetitions + 1):
        for name, call in sides.items():
            if between is not None:
                jax.block_until_ready(between())
            start = time.perf_counter()
            jax.block_until_ready(call())
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in taken.items()}
