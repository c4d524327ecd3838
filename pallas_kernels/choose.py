"""Which implementation a door takes: the one that is named, or the best for the device that the program is compiled for.

That device is the one of the mesh in context (`jax.set_mesh`), so that a program compiled ahead of time for a chip that is
not here gets that chip's kernels; without a mesh, this process's default back end.
"""

import importlib
from collections.abc import Mapping
from types import ModuleType

import jax
from jax import Array

BEST_FIRST = {"tpu": ("tpu", "xla"), "gpu": ("gpu", "xla"), "cpu": ("xla",)}


class Later(ModuleType):
    """The module of that name, imported when it is first used: Mosaic takes half a second and writes to the terminal."""

    def __getattr__(self, name: str):
        return getattr(importlib.import_module(self.__name__), name)


def platform() -> str:
    """ "cpu", "tpu" or "gpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
    """As jax names it: "cpu", "TPU v5", "NVIDIA H200"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def choose(operation: str, implementations: Mapping[str, ModuleType], name: str | None, *arrays: Array) -> ModuleType:
    """The module that `name` names, or the first for this platform that takes these arrays.

    A module with a domain of its own has `refusal(operation, *arrays)`: why it cannot take them (shapes included), or None; one
    for certain chips has `DEVICES`, of which a device's kind contains one. On a CPU, where it can only be simulated, none is asked for.
    Raises ValueError for an unknown name, NotImplementedError for a named one that refuses: nothing falls back in silence.
    """
    if name is None:
        candidates = [implementations[one] for one in BEST_FIRST.get(platform(), ("xla",)) if one in implementations]
        return next(module for module in candidates if _refusal(module, operation, arrays) is None)
    if name not in implementations:
        raise ValueError(
            f"{operation}: unknown implementation {name!r}; known: {', '.join(implementations)}, or None for the best"
        )
    refusal = _refusal(implementations[name], operation, arrays)
    if refusal is not None:
        raise NotImplementedError(f"{operation}: implementation {name!r} cannot: {refusal}; None takes one that can")
    return implementations[name]


def _refusal(module: ModuleType, operation: str, arrays: tuple[Array, ...]) -> str | None:
    devices = getattr(module, "DEVICES", ())
    if devices and platform() != "cpu" and not any(one in device_kind() for one in devices):
        return f"it is written for {', '.join(devices)}, and the device is {device_kind()}"
    return module.refusal(operation, *arrays) if hasattr(module, "refusal") else None
