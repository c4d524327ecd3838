"""jax's simulator of Hopper kernels with what ours need beside it: wgmma of transposed tiles and of factors in registers.

The simulator multiplies at once and without looking for races. Here tiles are read like any shared memory, and a product
happens `late`, at the same warpgroup's next product or when its sums are read, as it may on the chip: to hand a tile back
to the loader too early is a race, and gives wrong sums. The simulator does not tell when a kernel waits for its products
without reading them; one that does is not `late`. Floating-point memory begins as NaN, integers as their largest.
"""

from contextlib import contextmanager
from functools import partial

import jax
import numpy as np
from jax._src.interpreters import mlir
from jax._src.pallas.mosaic.interpret.race_detection_state import RaceDetectionState
from jax._src.pallas.mosaic_gpu.core import layout_cast_p
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams, force_gpu_interpret_mode
from jax._src.state.types import TransposeTransform
from jax.sharding import AbstractDevice, AbstractMesh

mlir.register_lowering(layout_cast_p, lambda ctx, x, **layout: [x], platform="cpu")
read_sums = gpu_callbacks.wgmma_accumulator_deref
pending = {}


@contextmanager
def hopper(multiprocessors: int = 2, late: bool = True):
    """Kernels traced herein run in the simulator, for a Hopper of so few multiprocessors. Raises AssertionError for a race."""
    watched = []  # one for each kernel

    def watch(**sizes):
        watched.append(RaceDetectionState(**sizes))
        return watched[-1]

    patched = {
        "wgmma": partial(_multiply, late=late),
        "wgmma_accumulator_deref": _read_sums,
        "RaceDetectionState": watch,
    }
    kept = {name: getattr(gpu_callbacks, name) for name in patched}
    device = AbstractDevice("NVIDIA H100 80GB HBM3", multiprocessors, "gpu")
    params = InterpretGPUParams(detect_races=True, out_of_bounds_reads="uninitialized")
    try:
        for name, function in patched.items():
            setattr(gpu_callbacks, name, function)
        with (
            force_gpu_interpret_mode(params),
            jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)),
        ):
            yield
            jax.effects_barrier()
            assert not any(kernel.races_found for kernel in watched), "the kernel has a race"
    finally:
        for name, function in kept.items():
            setattr(gpu_callbacks, name, function)
        pending.clear()
        gpu_callbacks.reset_gpu_interpret_mode_state()


def _multiply(*, late, token, device_id, grid_point_coords, thread_id, acc_dtype, source_info=None, **operands):
    thread = int(thread_id)
    _finish(thread)

    def factor(name):
        value = operands[f"{name}_allocation_key_as_array"]
        if np.asarray(value).dtype.kind != "i":
            return np.asarray(value)  # in registers
        transforms = operands[f"{name}_transforms"]
        at = [t for t in transforms if not isinstance(t, TransposeTransform)]
        where = device_id, grid_point_coords, thread_id
        tile = np.asarray(gpu_callbacks._get(token, *where, value, at, source_info=source_info)[1])
        return tile.T if len(at) < len(transforms) else tile

    registers = {
        name: factor(name) for name in "a" if np.asarray(operands["a_allocation_key_as_array"]).dtype.kind != "i"
    }

    def product():
        a, b = registers["a"] if "a" in registers else factor("a"), factor("b")
        memory, key = (
            gpu_callbacks._get_shared_memory(),
            gpu_callbacks.HostAllocationKey.from_array(operands["acc_allocation_key_as_array"]),
        )
        me = memory.get_global_thread_id(int(device_id), thread)
        sums, _, _ = memory.get_buffer_content(key, (), me)
        memory.store_buffer_content(key, (), sums + a.astype(acc_dtype) @ b.astype(acc_dtype), me)

    pending[thread] = product
    if not late:
        _finish(thread)
    return token


def _finish(thread):
    pending.pop(thread, lambda: None)()


def _read_sums(*, thread_id, **rest):
    _finish(int(thread_id))
    return read_sums(thread_id=thread_id, **rest)
