"""Reinforcement learning from verified rewards: GRPO without KL, in one loop.

    python -m experiments.grpo --from runs/a --domain reasoning          # RUN/reasoning/sft -> RUN/reasoning/rl

A step samples groups of answers to the same task, scores them in the task's environment, keeps groups whose rewards
differ (sampling again while there are too few), and moves the policy towards the better answers of each group. The
difference between the sampler's and the trainer's log-probabilities stands in every line of the log. After
1 - `hard_share` of the steps the tasks that were never solved are probed, and the solvable ones become the pool.

The same command continues what was interrupted and ends in the same bits.
"""

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import cli
from glm_jax.config import GRPO, ConfigError, Run, Stage, replace

if TYPE_CHECKING:
    from glm_jax.rl.collect import Collected
    from glm_jax.rl.rollout import Policy


@dataclass(frozen=True)
class Args:
    """Options of reinforcement learning."""

    from_: cli.From = None
    """The run's folder (its RUN/DOMAIN/sft is begun with), or the stage folder to begin with. Its settings are taken over."""
    domain: str = "reasoning"
    """Expert of the recipe: its RL settings and its environment."""
    out: Path | None = None
    """The stage's folder; by default `rl` beside the stage that it begins with."""


def main(args: Args, run: Run) -> dict[str, Any]:
    """Train one expert with GRPO; returns the stage's result."""
    from experiments import sft
    from glm_jax.train import checkpoint, loop

    folder = cli.given(args.from_, "a run that has been fine-tuned")
    settings = sft.expert(run, args.domain).grpo
    start = folder if (folder / checkpoint.RUN_FILE).exists() else folder / args.domain / "sft"
    if not checkpoint.committed(start):
        first = f"run experiments.sft --from {folder} --domain {args.domain} first, or give a stage's folder"
        raise ConfigError(f"{start} holds no checkpoint for RL to begin with; {first}")
    if checkpoint.load_run(start)[1] == "sft" and not (start / loop.RESULT_FILE).exists():
        raise ConfigError(f"{start} has not ended; run its experiments.sft again, which continues it")
    return train(
        run, settings, [(args.domain, level) for level in settings.levels], args.out or start.parent / "rl", start
    )


def train(run: Run, settings: GRPO, sources: Sequence[tuple[str, int]], out: Path, start: Path) -> dict[str, Any]:
    """GRPO on tasks of `sources` (environment, level), from the weights in the stage folder `start`, in the folder `out`."""
    import jax

    from glm_jax import mesh
    from glm_jax.train import checkpoint, loop

    before, name, data = checkpoint.load_run(start)
    run = as_stage(run, settings, before.stage(name).rope_theta)
    if result := loop.ended(run, out):
        return result
    if jax.process_count() > 1:
        raise ConfigError(
            f"RL runs in one process so far, not in {jax.process_count()}; start one for all of its devices"
        )
    loop.check_layout(run, *run.stages)
    with checkpoint.sole_writer(out), jax.set_mesh(mesh.make(run.mesh)):
        checkpoint.save_run(out, run, "rl", data, after=start)
        learner = Learner(run, settings, sources, out, data, start)
        try:
            return learner.train()
        finally:
            learner.close()


class Learner:
    """The loop, and what a checkpoint holds: parameters and optimizer, the place among the problems, seconds so far, and
    the microbatches that a step's batch has room for."""

    def __init__(
        self, run: Run, settings: GRPO, sources: Sequence[tuple[str, int]], out: Path, data: Path, start: Path
    ):
        from glm_jax import model
        from glm_jax.data.prepare import load_tokenizer
        from glm_jax.optim import optimizer
        from glm_jax.rl.curriculum import Problems
        from glm_jax.train import checkpoint, loop, metrics, state

        self.run, self.settings, self.out = run, settings, out
        self.cfg = replace(run.model, rope_theta=run.stages[0].rope_theta)
        self.tx = optimizer(settings.optim, model.specs(self.cfg))
        self.tokenizer = load_tokenizer(data, self.cfg.V)
        self.problems = Problems(sources, FRESH_SEED, settings.hard_pool if settings.hard_share else 0)
        self.checkpoints = checkpoint.Checkpoints(out, keep=run.loop.keep_checkpoints)
        self.step, self.seconds, self.room = 0, 0.0, 16
        latest = self.checkpoints.latest()
        if latest is None:
            self.state = loop.from_weights(run, self.tx, start)
        else:
            self.state, meta = self.checkpoints.restore(latest, state.abstract(self.cfg, self.tx))
            self.problems.set_state(meta["problems"])
            self.step, self.seconds, self.room = latest, meta["seconds"], meta["room"]
        shown = ("reward", "entropy", "mismatch_max")
        self.log = metrics.Log(out, -1 if latest is None else self.step, settings.steps, str(out), "step", shown)
        if latest is None:
            self.log.event("run", 0, **loop.describe(run, run.stages[0]))

    def train(self) -> dict[str, Any]:
        from glm_jax.rl.collect import collect
        from glm_jax.train import checkpoint, interrupt, loop, metrics

        settings, begun = self.settings, time.monotonic() - self.seconds
        hard_from = settings.steps - math.floor(settings.steps * settings.hard_share)
        with interrupt.asked() as asked:
            while self.step < settings.steps:
                seed = hash_seed(self.run.loop.seed, self.step)
                policy = self.policy()
                if self.step == hard_from:
                    self.begin_hard_stage(policy, seed)
                size = settings.hard_attempts if self.problems.pool else settings.group_size
                found = collect(policy, self.problems, settings, seed, size)
                told = self.learn(found)
                self.step += 1
                self.seconds = time.monotonic() - begun
                told |= {"rollouts_in_8_bits": True} if settings.rollouts_in_8_bits else {}
                self.log.step({"step": self.step, **found.told(), **told, "seconds": round(self.seconds, 3)}, self.step)
                if told["k3"] > MOST_K3:
                    self.log.event("alarm", self.step, k3=told["k3"], most=MOST_K3)
                    print(
                        f"{self.out}: step {self.step}: k3={told['k3']:.2g} between sampler and trainer, above {MOST_K3}",
                        flush=True,
                    )
                stop = asked()
                if stop or self.step % settings.checkpoint_every == 0 or self.step == settings.steps:
                    self.save()
                if stop:
                    raise KeyboardInterrupt
            if asked():  # while the last step was saved
                raise KeyboardInterrupt
        self.checkpoints.wait()
        steps = metrics.read(self.out / "log.jsonl", "step")
        tail = steps[-max(1, len(steps) // 10) :]
        result = {
            "name": "rl", "seconds": round(self.seconds, 2), "steps": self.step,
            "sampled_tokens": sum(record["sampled_tokens"] for record in steps),
            "reward": {"start": steps[0]["reward"], "end": sum(r["reward"] for r in tail) / len(tail)},
            "mismatch": {name: max(r[name] for r in steps) for name in MISMATCH},
        }  # fmt: skip
        checkpoint.write_json(self.out / loop.RESULT_FILE, result)
        return result

    def policy(self) -> "Policy":
        """The model as it now is, ready to answer: sampler and trainer share one forward, but for the bits of its matrices."""
        from glm_jax.rl.rollout import Policy
        from glm_jax.sample.weights import prepare

        params = prepare(self.cfg, self.state.params, self.settings.rollouts_in_8_bits)
        return Policy(self.cfg, params, self.state.router_bias_LE, self.tokenizer)

    def learn(self, found: "Collected") -> dict[str, Any]:
        """Optimizer steps on the groups that vary; returns their means for the log. Without any, nothing moves."""
        kept = found.kept
        if not kept:
            return {"loss": 0.0, "lr": 0.0, "entropy": 0.0, "gradient_norm": 0.0, **dict.fromkeys(MISMATCH, 0.0)}
        parts = [kept[i :: self.settings.updates] for i in range(min(self.settings.updates, len(kept)))]
        told = [self.update(part) for part in parts]
        first, last = told[0], told[-1]  # the mismatch is that of the policy that sampled: before the first update
        return {**last, **{name: first[name] for name in MISMATCH}}

    def update(self, groups: list) -> dict[str, Any]:
        """One optimizer step on `groups`."""
        import jax
        import jax.numpy as jnp

        from glm_jax.losses import Policy as Sampled
        from glm_jax.rl.batch import microbatches
        from glm_jax.train import metrics
        from glm_jax.train.step import Knobs, stacked, train_step

        s = self.settings
        micro = microbatches(groups, s, self.tokenizer.end)
        while self.room < len(micro):
            self.room *= 2  # another program is compiled
        lr = s.peak_lr * min(1.0, (self.step + 1) / max(1, s.warmup_steps))
        knobs = Knobs(jnp.float32(lr), jnp.float32(0), jnp.float32(0), jnp.int32(len(micro)))  # the router bias stays
        sampled = Sampled((s.clip_low, s.clip_high), s.temperature, s.clip_c)
        self.state, fetched = train_step(
            self.state, stacked(micro, self.room), knobs, cfg=self.cfg, tx=self.tx, policy=sampled
        )
        told = {name: float(value) for name, value in jax.device_get(fetched).items() if name != "load_LE"}
        metrics.check_finite(told, f"step {self.step + 1} of {self.out}", self.checkpoints.latest(), "peak_lr")
        tokens = told["sampled_tokens"]
        means = {name: told[f"{name}_sum"] / tokens for name in ("entropy", "k3", "clipped")}
        means |= {"mismatch_mean": told["mismatch_sum"] / tokens, "mismatch_max": told["mismatch_max"]}
        return {"loss": told["loss"], "lr": lr, "gradient_norm": told["gradient_norm"], **means}

    def begin_hard_stage(self, policy: "Policy", seed: int) -> None:
        """From here on the problems with pass@k = 0 and pass@K > 0 alone, K answers to each; told if they are too few."""
        from glm_jax.rl import curriculum
        from glm_jax.rl.collect import sample_groups

        unsolved, more = self.problems.unsolved, self.settings.hard_attempts - self.settings.group_size
        groups = (
            sample_groups(policy, curriculum.probes(unsolved), more, self.settings, seed) if more and unsolved else []
        )
        pool = curriculum.hard(unsolved, [sum(s.reward > 0 for s in group) for group in groups]) if groups else []
        self.log.event("curriculum", self.step, unsolved=len(unsolved), probed=more * len(unsolved), kept=len(pool))
        if len(pool) >= self.settings.groups:
            self.problems.pool = pool
            return
        print(
            f"{self.out}: of {len(unsolved)} tasks with pass@{self.settings.group_size} = 0, {len(pool)} were solved in {more} "
            f"further attempts; fewer than a step's {self.settings.groups} would be learnt by heart: going on with fresh tasks",
            flush=True,
        )

    def save(self) -> None:
        meta = {"problems": self.problems.get_state(), "seconds": self.seconds, "room": self.room}
        self.checkpoints.save(self.step, self.state, meta)

    def close(self) -> None:
        self.checkpoints.close()
        self.log.close()


FRESH_SEED = 10**7  # of the first task: far beyond those that the cold start has seen, which it knows by heart
MISMATCH = ("mismatch_mean", "mismatch_max", "k3")
MOST_K3 = 2e-2  # of sampler and trainer, however few bits the sampler has: beyond, something is wrong


def as_stage(run: Run, settings: GRPO, rope_theta: float) -> Run:
    """The run whose one stage is this RL, so that its folder is a stage's folder like any other."""
    tokens = settings.microbatch_rows * settings.seq_len
    stage = Stage(
        "rl", tokens, settings.seq_len, rope_theta, settings.microbatch_rows, packing="best_fit", isolate=True
    )
    schedule = dataclasses.replace(
        run.schedule, peak_lr=settings.peak_lr, final_lr=settings.peak_lr, warmup_tokens=0, batch_tokens_start=tokens,
        batch_tokens=tokens, batch_ramp_tokens=0, bias_rate=0.0,
    )  # fmt: skip
    return dataclasses.replace(run, pretrain=(), midtrain=(stage,), schedule=schedule, optim=settings.optim)


def hash_seed(*parts: int) -> int:
    """A seed below 2^31 that depends on all of `parts`."""
    from glm_jax.data.document import digest

    return int(digest(json.dumps(parts))[:8], 16) % 2**31


if __name__ == "__main__":
    cli.main(main)
