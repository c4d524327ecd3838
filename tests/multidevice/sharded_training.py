"""A small model's training, which tests repeat on other meshes and in other processes: its rows, its steps, what is left."""

import itertools
import math
from collections.abc import Iterator

import jax
import numpy as np

from glm_jax import config, mesh, model, spec
from glm_jax.config import Mesh
from glm_jax.optim import optimizer
from glm_jax.train import state
from glm_jax.train.step import Knobs, stacked, train_step

CFG = config.Model(
    V=64, D=32, L=4, dense_layers=1, N=4, K=2, H=8, F=32, M=16, E=8, A=2, dtype="float32", max_positions=64
)
TX = optimizer(config.Optim(ns_dtype="float32"), model.specs(CFG))
MICROBATCHES, ROWS, LENGTH = 2, 8, 16
STEPS = 10


def meshes(devices: int) -> Iterator[Mesh]:
    """Every mesh of so many devices, a power of two, over which the model can be split."""
    powers = [2**n for n in range(devices.bit_length())]
    for sizes in itertools.product(powers, repeat=len(mesh.AXES)):
        made = Mesh(**dict(zip(mesh.AXES, sizes, strict=True)))
        if math.prod(sizes) == devices and CFG.K % made.tensor == 0 and CFG.moe_layers >= made.pipeline:
            yield made


def make(sizes: Mesh) -> jax.sharding.Mesh:
    """The mesh on as many of the devices as it takes."""
    return mesh.make(sizes, jax.devices()[: math.prod(mesh.sizes_of(sizes).values())])


def microbatches() -> list[dict[str, np.ndarray]]:
    """Rows of two documents each, of tokens some of which are more frequent; behind a third of the rows padding."""
    random = np.random.default_rng(0)
    made = []
    for _ in range(MICROBATCHES):
        text = random.zipf(1.5, (ROWS, LENGTH + 2)).clip(max=CFG.V - 1).astype(np.int32)
        split_B1 = random.integers(3, 12, (ROWS, 1))
        end_B1 = np.where(np.arange(ROWS)[:, None] % 3, LENGTH, 13)
        at_T = np.arange(LENGTH)
        segments = ((1 + (at_T >= split_B1)) * (at_T < end_B1)).astype(np.int32)
        left = np.where(segments == 1, split_B1, end_B1) - at_T  # tokens of its document from here on
        made.append(
            {
                "ids": text[:, :-2], "targets": text[:, 1:-1], "mtp_targets": text[:, 2:], "segments": segments,
                "positions": (at_T - np.where(segments == 2, split_B1, 0)).astype(np.int32),
                "weights": ((segments > 0) & (left > 1)).astype(np.float32),
                "mtp_weights": ((segments > 0) & (left > 2)).astype(np.float32),
            }
        )  # fmt: skip
    return made


def start() -> state.State:
    """The state before the first step, on the mesh that is set."""
    return state.create(CFG, TX, 0)


def train(
    now: state.State, steps: int = STEPS, bias_rate: float = 0.0, cfg: config.Model = CFG
) -> tuple[state.State, list[float], np.ndarray]:
    """After `steps` of Muon without warm-up on the mesh that is set: the state, losses, and expert counts of each step.
    Of several processes each gives its share of the rows."""
    index, count = mesh.process_share(jax.sharding.get_mesh(), ROWS)
    mine = [{name: np.split(z, count)[index] for name, z in one.items()} for one in microbatches()]
    batch = stacked(mine, MICROBATCHES, rows=ROWS)
    knobs = Knobs(*np.float32([1e-2, 0.3, bias_rate]), microbatches=np.int32(MICROBATCHES))
    losses, loads = [], []
    for _ in range(steps):
        now, told = train_step(now, batch, knobs, cfg=cfg, tx=TX, sequence_balance=1e-4)
        losses.append(float(told["loss"] + 0.3 * told["mtp_loss"]))
        loads.append(np.asarray(told["load_LE"]))
    return now, losses, np.stack(loads)


def weights(now: state.State) -> dict[str, np.ndarray]:
    """Every weight by its path, whole."""
    whole = jax.jit(lambda params: jax.tree.map(lambda w: mesh.whole(w, ()), params))(now.params)
    return {spec.path_name(path): np.asarray(w) for path, w in jax.tree_util.tree_leaves_with_path(whole)}


def check_weights(got: dict[str, np.ndarray], want: dict[str, np.ndarray], tolerance: float, where: object) -> float:
    """Every weight within `tolerance` of its root mean square; the largest error."""
    errors = {
        name: float(np.sqrt(np.mean((got[name] - w) ** 2)) / np.sqrt(np.mean(w**2) + 1e-12)) for name, w in want.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] < tolerance, (where, worst, errors[worst])
    return errors[worst]
