"""Checkpoints with orbax: a step is committed whole or not at all, and found again after any interruption.

A stage's folder holds `run.json` (the run's canonical configuration and the stage's name) and `checkpoints/<step>`. In each
folder of a step `sums.json` notes what its files hold, and a file that holds something else is refused before it is read.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from glm_jax import config, mesh, model
from glm_jax.config import ConfigError, Model, Run, from_canonical
from glm_jax.train import integrity, state
from glm_jax.train.state import State

RUN_FILE = "run.json"
POST_TRAINING = ("sft", "rl")  # stages whose model knows the dialogue template
CHUNK_BYTES = 2**25  # of an array, at most, in one piece: whoever reads a part of a piece decodes it whole
SUMS_FILE = "sums.json"
CONTROL = "control"  # name of a stage folder that is only compared with: never the latest of a run


class _Arrays(ocp.PyTreeCheckpointHandler):
    """orbax's own, which any orbax reads; the sums of what it wrote are noted before the step is committed."""

    @classmethod
    def typestr(cls) -> str:
        return ocp.PyTreeCheckpointHandler.typestr()

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)
        note_sums(Path(directory))


class _Json(ocp.JsonCheckpointHandler):
    """The same of JSON."""

    @classmethod
    def typestr(cls) -> str:
        return ocp.JsonCheckpointHandler.typestr()

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)
        note_sums(Path(directory))


class Checkpoints:
    """The checkpoints of one stage's folder. Saving is asynchronous; `close` waits for what is under way.

    Restoring raises ConfigError with the name of a file that is missing or does not hold what was written.
    """

    def __init__(self, folder: Path, keep: int | None = None):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        self._folder = (folder / "checkpoints").absolute()
        handlers, arrays, meta = ocp.handlers.DefaultCheckpointHandlerRegistry(), _Arrays(), _Json()
        for args in (ocp.args.PyTreeSave, ocp.args.PyTreeRestore):
            handlers.add("state", args, arrays)
        for args in (ocp.args.JsonSave, ocp.args.JsonRestore):
            handlers.add("meta", args, meta)
        self._manager = ocp.CheckpointManager(self._folder, options=options, handler_registry=handlers)

    def latest(self) -> int | None:
        """The last committed step."""
        return self._manager.latest_step()

    def save(self, step: int, now: State, meta: dict[str, Any]) -> None:
        """Write `now` and `meta` (JSON: position in the data, seconds so far) as checkpoint `step`."""
        held = _held(now)
        how = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), held)
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(held, save_args=how), meta=ocp.args.JsonSave(meta))
        self._manager.save(step, args=items)

    def restore(self, step: int, like: State) -> tuple[State, dict[str, Any]]:
        """The state of `step` in the layout of `like` (arrays or shapes with shardings), and its meta."""
        for item in ("state", "meta"):
            check_sums(self._folder / str(step) / item)
        held = _held(like)
        how = ocp.checkpoint_utils.construct_restore_args(held)
        items = ocp.args.Composite(state=ocp.args.PyTreeRestore(held, restore_args=how), meta=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=items)
        now = restored["state"]
        if now.router_bias_LE is None:
            now = dataclasses.replace(
                now, router_bias_LE=jnp.zeros(like.router_bias_LE.shape, like.router_bias_LE.dtype)
            )
        return now, restored["meta"]

    def restore_params(self, step: int, cfg: Model) -> tuple[model.GLM, jax.Array]:
        """Parameters and router bias alone, on the mesh that is set or the default device; the optimizer's state is
        never read."""
        check_sums(self._folder / str(step) / "state")
        params, router_bias_LE = jax.eval_shape(lambda: state.fresh(cfg, jax.random.key(0)))
        wanted = {"params": mesh.concrete(params)}
        if cfg.router_rows:
            wanted["router_bias_LE"] = mesh.concrete(router_bias_LE)
        how = ocp.checkpoint_utils.construct_restore_args(wanted)
        args = ocp.args.Composite(state=ocp.args.PyTreeRestore(wanted, restore_args=how, partial_restore=True))
        restored = self._manager.restore(step, args=args)["state"]
        return restored["params"], restored["router_bias_LE"] if cfg.router_rows else model.router_bias(cfg)

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def _held(now: State) -> State:
    """`now` as orbax saves it, who refuses an empty array: without the balance bias of a model that has no router."""
    return now if now.router_bias_LE.size else dataclasses.replace(now, router_bias_LE=None)


def note_sums(folder: Path, part: Path | None = None) -> None:
    """Note what all files below `folder` hold; of those in `part` of it alone, beside what is noted already."""
    known = read_json(folder / SUMS_FILE) if part and (folder / SUMS_FILE).exists() else {}
    paths = (path for path in (part or folder).rglob("*") if path != folder / SUMS_FILE)
    write_json(folder / SUMS_FILE, known | integrity.sums(folder, paths))


def check_sums(folder: Path) -> None:
    """ConfigError where a file below `folder` is not as noted. Where nothing is, as older code left it, nothing is checked."""
    path = folder / SUMS_FILE
    if not path.exists():
        return
    try:
        noted = read_json(path)
    except ValueError as error:
        raise ConfigError(f"{path} holds other bytes than were written ({error}); copy it again") from None
    integrity.check(folder, noted)


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold a stage's folder while it is written to: ConfigError where another process does. However that process ends, the
    system lets go of it. Of several processes of one run the first holds it for all."""
    if jax.process_index():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another process is training in {folder}; wait for its end, or stop it") from error
        yield


def write_json(path: Path, value: Any) -> None:
    """Write atomically: a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(path.suffix + ".tmp")
    with open(temporary, "w") as f:
        f.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def save_run(folder: Path, run: Run, stage: str, data: Path, after: Path | None = None) -> None:
    """Write what made this folder, so that a later stage, `chat` or a notebook needs nothing but its path.

    `after`: the stage folder that this one goes on from; it decides which of a run's stages is the latest.
    """
    described = {"run": config.canonical(run), "fingerprint": config.fingerprint(run), "stage": stage}
    order = 0 if after is None else read_json(after / RUN_FILE).get("order", 0) + 1
    write_json(folder / RUN_FILE, {**described, "order": order, "data": os.path.relpath(data, folder)})


def load_run(folder: Path) -> tuple[Run, str, Path]:
    """(run, stage name, data folder) of a stage's folder."""
    path = folder / RUN_FILE
    if not path.exists():
        raise ConfigError(
            f"{folder} has no {RUN_FILE}: no stage has been trained there; run its command first, or name another folder"
        )
    saved = read_json(path)
    return from_canonical(saved["run"]), saved["stage"], (folder / saved["data"]).resolve()


def stage_folder(path: Path) -> Path:
    """The stage folder that `path` means: itself, or the latest stage with a checkpoint inside a run's folder. There those of
    post-training come last: one fine-tuned beside the stages it began with does not become what they are begun with."""
    if (path / RUN_FILE).exists():
        return path
    folders = [child.parent for child in path.glob(f"*/{RUN_FILE}") if child.parent.name != CONTROL]
    stages = [folder for folder in folders if committed(folder)]
    if not stages:
        what = "holds no checkpoint" if path.is_dir() else "does not exist"
        raise ConfigError(f"{path} {what}; give the --out folder of experiments.pretrain, or one of its stages")

    def rank(folder: Path) -> tuple[bool, int, int]:
        saved = read_json(folder / RUN_FILE)
        return saved["stage"] not in POST_TRAINING, saved.get("order", 0), committed(folder)[-1]

    return max(stages, key=rank)


def final_folder(path: Path) -> Path:
    """The stage folder of the model that `path` ends with: as `stage_folder`, but a run's unified model comes first."""
    unified = path / "unified"
    return stage_folder(unified if any(map(committed, unified.glob("*"))) else path)


def load_params(path: Path) -> tuple[Run, model.GLM, jax.Array, Path]:
    """(run, params, router_bias_LE, data folder) of the last checkpoint under `path`; run.model has the stage's RoPE base."""
    folder = stage_folder(Path(path))
    run, stage, data = load_run(folder)
    steps = committed(folder)
    if not steps:
        raise ConfigError(f"{folder} holds no checkpoint yet")
    run = config.replace(run, **{"model.rope_theta": run.stage(stage).rope_theta})
    checkpoints = Checkpoints(folder)
    params, router_bias_LE = checkpoints.restore_params(steps[-1], run.model)
    checkpoints.close()
    return run, params, router_bias_LE, data


def committed(folder: Path) -> list[int]:
    """Committed steps, without opening a manager: orbax writes under another name and renames when all is there."""
    return sorted(int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdigit())
