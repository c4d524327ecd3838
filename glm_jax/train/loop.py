"""The training loop of one stage: plan, restore, step, log one step late, checkpoint, evaluate."""

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from glm_jax import config, mesh, model
from glm_jax.config import ConfigError, Run, Stage
from glm_jax.data.input import Microbatches
from glm_jax.optim import Step, optimizer, steps
from glm_jax.parallel import pipeline
from glm_jax.train import checkpoint, interrupt, metrics, processes, state
from glm_jax.train.step import Knobs, stacked, train_step

Evaluate = Callable[[config.Model, model.GLM, jax.Array], dict[str, float]]
RESULT_FILE = "result.json"


def train_stage(
    run: Run,
    stage: Stage,
    out: Path,
    data: Path,
    *,
    start: Path | None = None,
    weights: Path | None = None,
    evaluate: Evaluate | None = None,
    measure: str = "bits_per_byte",
) -> dict[str, Any]:
    """Train `stage` of `run` in the folder `out` on the rows of `data`, and return its result (also `result.json`).

    Continues `out`'s own last checkpoint if there is one; else the last of the stage folder `start`; else begins anew
    with the weights (and nothing else) of the stage folder `weights`; else from scratch. Killed at any moment and
    called again, it ends in the same bits. `measure` names what `evaluate` returns. ConfigError where these settings cannot go
    on from what is there, or it has ended with other ones; FloatingPointError where the loss is no number.
    """
    if result := ended(run, out):
        return result
    device_mesh = mesh.make(run.mesh)
    cfg = config.replace(run.model, rope_theta=stage.rope_theta)
    specs = model.specs(cfg)
    check_layout(run, stage)
    tx = optimizer(run.optim, specs)
    with checkpoint.sole_writer(out), jax.set_mesh(device_mesh):
        share = mesh.process_share(device_mesh, stage.microbatch_rows)
        batches = Microbatches(data, stage, run.loop.seed, share, run.loop.read_workers)
        trainer = _Trainer(run, stage, cfg, tx, out, batches, measure)
        try:
            trainer.restore(start, weights)
            if processes.writer():  # now that nothing is refused: a mistyped command must not change what is there
                checkpoint.save_run(out, run, stage.name, data, start or weights)
            return trainer.train(evaluate)
        finally:
            trainer.close()


def ended(run: Run, out: Path) -> dict[str, Any] | None:
    """The result of a stage that has ended in the folder `out`. ConfigError where what is there has another shape than `run` gives,
    or has ended with settings that make other weights."""
    if checkpoint.committed(out):
        _check_shape(run, out)
    if not (out / RESULT_FILE).exists():
        return None
    _check(run, out, "has ended", lambda path: path.startswith(_DECIDES_WEIGHTS))
    return checkpoint.read_json(out / RESULT_FILE)


def check_layout(run: Run, *stages: Stage) -> None:
    """Raise ConfigError where one of `stages` cannot be laid out over the devices there are, before anything is done."""
    here = mesh.make(run.mesh)
    for stage in stages:
        mesh.check(here, model.specs(run.model), stage.microbatch_rows, stage.seq_len)
        pipeline.check(here, run.model, stage.microbatch_rows)


class _Trainer:
    """A stage under way: what must be closed, and what a checkpoint holds beside the state."""

    def __init__(
        self,
        run: Run,
        stage: Stage,
        cfg: config.Model,
        tx: optax.GradientTransformation,
        out: Path,
        rows: Microbatches,
        measure: str,
    ):
        self.run, self.stage, self.cfg, self.tx, self.out = run, stage, cfg, tx, out
        self.plan = steps(run, stage)
        self.last = self.plan.first + len(self.plan)
        self.most_microbatches = max(self.plan[i].microbatches for i in (-1, -min(2, len(self.plan))))
        self.measure = measure
        self.checkpoints = checkpoint.Checkpoints(out, keep=run.loop.keep_checkpoints)
        self.batches = rows
        self.log: metrics.Log | None = None
        self.seconds = 0.0

    def restore(self, start: Path | None, weights: Path | None = None) -> None:
        """Find where to begin: this stage's last checkpoint, an earlier stage's, another model's weights, or fresh ones."""
        step = self.checkpoints.latest()
        if step is not None:
            self.state, meta = self.checkpoints.restore(step, state.abstract(self.cfg, self.tx))
            self.batches.set_state(meta["data"])
            self.seconds = meta["seconds"]
        elif start is not None:
            self.state = _from_stage(self.run, self.cfg, self.tx, start)
        elif weights is not None:
            self.state = from_weights(self.run, self.tx, weights)
        else:
            self.state = state.create(self.cfg, self.tx, self.run.loop.seed)
        self.step = int(self.state.step)
        if step is not None:
            done, read = self.step - self.plan.first, self.batches.get_state()["microbatch"]
            planned = self.plan[done].first_microbatch if 0 <= done < len(self.plan) else self.plan.microbatches
            if planned != read or done < 0:
                raise ConfigError(
                    f"{self.out} has read {read} microbatches by step {self.step}, where these settings would have read {planned}: "
                    "tokens or batch sizes have changed; give those that it was begun with, or another folder"
                )
        expected = self.plan.first if step is None else step
        if self.step != expected:
            if step is None and start is not None and not (start / RESULT_FILE).exists():
                raise ConfigError(f"{start} has not ended: step {self.step} of {expected}; run its command again first")
            raise ConfigError(
                f"stage {self.stage.name} begins at step {expected}, but the checkpoint is of step {self.step}; "
                "the earlier stages' tokens or batch sizes have changed: give the settings they were trained with"
            )

    def train(self, evaluate: Evaluate | None) -> dict[str, Any]:
        resumed = self.checkpoints.latest()
        step, writes = -1 if resumed is None else self.step, processes.writer()
        self.log = metrics.Log(self.out, step, self.stage.tokens, self.stage.name, writes=writes)
        begun = time.monotonic() - self.seconds
        about, before = describe(self.run, self.stage), metrics.read(self.log.path, "run")
        if not before or any(before[-1][name] != about[name] for name in ("fingerprint", "commit", "devices", "jax")):
            self.log.event("run", self.step, **about)
        if resumed is None:
            self._evaluate(evaluate, "start")
        if writes:
            print(
                f"{self.out}: compiling the train step, which takes minutes the first time", file=sys.stderr, flush=True
            )
        with interrupt.asked() as asked:
            self._steps(evaluate, begun, asked)
        self._evaluate(evaluate, "end")
        return self._finish(time.monotonic() - begun)

    def _steps(self, evaluate: Evaluate | None, begun: float, asked: Callable[[], bool]) -> None:
        """What is left of the plan; a Ctrl-C that `asked` tells of ends it behind a checkpoint."""
        pending = None
        for planned in self.plan.since(self.step):
            batch, knobs = self._batch(planned), _knobs(planned)
            self.state, fetched = train_step(
                self.state, batch, knobs, cfg=self.cfg, tx=self.tx, sequence_balance=self.run.loss.sequence_balance
            )
            pending = self._report(pending)
            pending = (planned, fetched)
            self.step = planned.index + 1
            self.seconds = time.monotonic() - begun
            stop = asked()
            save = stop or self.step % self.run.loop.checkpoint_every == 0 or self.step == self.last
            look = self.run.loop.eval_every and self.step % self.run.loop.eval_every == 0 and self.step != self.last
            if save or look:
                pending = self._report(pending)  # a state is saved only once its loss is known to be finite
            if look:
                self._evaluate(evaluate, "during")
            if save:
                self._save()
            if stop:
                raise KeyboardInterrupt
        if asked():  # while the last step was saved
            raise KeyboardInterrupt

    def close(self) -> None:
        self.checkpoints.close()
        self.batches.close()
        if self.log:
            self.log.close()

    def _batch(self, planned: Step) -> dict[str, jax.Array]:
        """A step's microbatches, stacked and padded to the most that any step of the stage has: one compiled shape.
        Where the MTP loss has no weight they go without its targets, and the step without the MTP layer."""
        here = [next(self.batches) for _ in range(planned.microbatches)]
        if not planned.mtp_weight:
            here = [{name: z for name, z in one.items() if not name.startswith("mtp_")} for one in here]
        return stacked(here, self.most_microbatches, rows=self.stage.microbatch_rows)

    def _report(self, pending: tuple | None) -> None:
        """Fetch and log a step that has been dispatched; stop at a loss that is no number."""
        if pending is None:
            return
        planned, fetched = pending
        values = jax.device_get(fetched)
        step = planned.index + 1
        record: dict[str, Any] = {name: float(value) for name, value in values.items() if name != "load_LE"}
        record |= {"step": step, "stage": self.stage.name, "lr": planned.lr, "batch_tokens": planned.tokens}
        record |= {"tokens_seen": planned.tokens_before + planned.tokens, "mtp_weight": planned.mtp_weight}
        record |= {"seconds": round(self.seconds, 3)}
        record |= metrics.load_record(values["load_LE"])
        where = f"step {step} of {self.stage.name}"
        rate = "sft's peak_lr" if self.stage.name in checkpoint.POST_TRAINING else "schedule.peak_lr"
        metrics.check_finite(record, where, self.checkpoints.latest(), rate)
        assert self.log is not None
        self.log.step(record, record["tokens_seen"] - self.run.tokens_before(self.stage.name))

    def _save(self) -> None:
        meta = {"data": self.batches.get_state(), "seconds": self.seconds, "stage": self.stage.name}
        self.checkpoints.save(self.step, self.state, meta)

    def _evaluate(self, evaluate: Evaluate | None, when: str) -> None:
        assert self.log is not None
        done = [r["when"] for r in metrics.read(self.log.path, "eval")]
        if evaluate is None or processes.agreed(when in done and when != "during"):
            return
        values = evaluate(self.cfg, self.state.params, self.state.router_bias_LE)
        self.log.event("eval", self.step, when=when, **{self.measure: values})

    def _finish(self, seconds: float) -> dict[str, Any]:
        self.checkpoints.wait()
        return processes.in_turn(lambda: self._result(seconds))

    def _result(self, seconds: float) -> dict[str, Any]:
        if not processes.writer():
            return checkpoint.read_json(self.out / RESULT_FILE)
        evals = {r["when"]: r[self.measure] for r in metrics.read(self.out / "log.jsonl", "eval")}
        tokens = self.plan.microbatches * self.stage.microbatch_tokens
        result = {
            "name": self.stage.name, "seconds": round(seconds, 2), "tokens": tokens,
            "tokens_per_second": round(tokens / seconds, 1), "steps": len(self.plan),
            "start": evals.get("start", {}), "end": evals.get("end", {}),
        }  # fmt: skip
        checkpoint.write_json(self.out / RESULT_FILE, result)
        return result


def _from_stage(run: Run, cfg: config.Model, tx: optax.GradientTransformation, start: Path) -> state.State:
    """The last state of an earlier stage's folder, after checking that it is of the same shape."""
    _check_shape(run, start)
    before = checkpoint.Checkpoints(start)
    try:
        step = before.latest()
        if step is None:
            raise ConfigError(f"{start} holds no checkpoint; run that stage first")
        return before.restore(step, state.abstract(cfg, tx))[0]
    finally:
        before.close()


def from_weights(run: Run, tx: optax.GradientTransformation, folder: Path) -> state.State:
    """A new beginning at step 0, with the parameters and router bias of a stage's folder."""
    _check_shape(run, folder, _MODEL_FIELDS)
    _, params, router_bias_LE, _ = checkpoint.load_params(folder)
    return state.State(jnp.zeros((), jnp.int32), params, router_bias_LE, jax.jit(tx.init)(params))  # pyright: ignore[reportArgumentType] (as in state.py)


def _check_shape(run: Run, folder: Path, fields: tuple[str, ...] | None = None) -> None:
    """Refuse the checkpoints of a stage's folder whose arrays, by `fields` all of them, are not those of `run`."""
    _check(run, folder, "is of another shape", lambda path: path in (fields or _SHAPE_FIELDS))


def _check(run: Run, folder: Path, what: str, matters: Callable[[str], bool]) -> None:
    saved, _, _ = checkpoint.load_run(folder)
    differ = {path: both for path, both in config.diff(run, saved).items() if matters(path)}
    if differ:
        told = ", ".join(f"{path} {theirs} there, {ours} here" for path, (theirs, ours) in differ.items())
        raise ConfigError(f"the checkpoint in {folder} {what}: {told}; give the same settings, or another folder")


_SHAPES = (*"VDLNKHFMEA", "dense_layers", "shared_experts", "mtp_layers", "qk_norm", "qkv_bias")
_MODEL_FIELDS = tuple(f"model.{name}" for name in _SHAPES)
_SHAPE_FIELDS = (*_MODEL_FIELDS, "optim.name", "optim.lm_head", "optim.router")
_DECIDES_WEIGHTS = (  # beside the shapes
    "optim.", "schedule.", "loss.", "pretrain.", "midtrain.", "loop.seed", "model.init_std", "model.norm_eps",
    "model.routed_scale", "model.rope_fraction", "model.balance_on", "model.dtype",
)  # fmt: skip


def _knobs(planned: Step) -> Knobs:
    values = (planned.lr, planned.mtp_weight, planned.bias_rate)
    return Knobs(*(jnp.float32(v) for v in values), microbatches=jnp.int32(planned.microbatches))


def describe(run: Run, stage: Stage) -> dict[str, Any]:
    """A record of the log, at its beginning and where it is gone on with otherwise: what runs, from which commit, on what."""
    return {
        "fingerprint": config.fingerprint(run),
        "recipe": run.name,
        "stage": dataclasses.asdict(stage),
        "commit": _commit(),
        "devices": [str(d) for d in jax.devices()],
        "jax": jax.__version__,
    }


def _commit() -> str | None:
    """The commit of the source tree, if it is a git checkout."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # a machine without git
        return None
    return done.stdout.strip() or None
