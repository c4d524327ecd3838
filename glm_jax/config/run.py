"""A whole experiment, and the way back from what one wrote beside its checkpoints."""

import dataclasses
import itertools
from dataclasses import dataclass, field
from typing import Any

from glm_jax.config.functions import SILENT_AT_DEFAULT, ConfigError, divides, nearest, require
from glm_jax.config.posttrain import GRPO, SFT, Evaluation, Expert, Posttrain, Unify
from glm_jax.config.pretrain import Data, Loop, Loss, Mesh, Model, Optim, Schedule, Scoring, Stage


@dataclass(frozen=True)
class Run:
    """A whole experiment. A recipe returns one; a variant changes fields of another's."""

    name: str
    model: Model
    pretrain: tuple[Stage, ...]
    midtrain: tuple[Stage, ...]
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    loss: Loss = Loss()
    data: Data = Data()
    mesh: Mesh = Mesh()
    loop: Loop = Loop()
    post: Posttrain = field(default=Posttrain(), metadata=SILENT_AT_DEFAULT)

    def __post_init__(self):
        names = [stage.name for stage in self.stages]
        require(len(set(names)) == len(names), f"stage names {names} must differ")
        in_8_bits = any(
            rl.rollouts_in_8_bits for rl in (*(one.grpo for one in self.post.experts), self.post.unify.grpo)
        )
        require(
            self.mesh.tensor == 1 or not in_8_bits,
            f"mesh.tensor={self.mesh.tensor} would split the blocks of rollouts_in_8_bits; use mesh.expert or mesh.fsdp instead",
        )
        for stage in self.stages:
            require(
                stage.seq_len <= self.model.max_positions,
                f"stage {stage.name}: seq_len={stage.seq_len} exceeds max_positions={self.model.max_positions}",
            )
            ramping = self.tokens_before(stage.name) < self.schedule.batch_ramp_tokens
            for which in ("batch_tokens_start", "batch_tokens") if ramping else ("batch_tokens",):
                total = getattr(self.schedule, which)
                divides("microbatch_tokens", stage.microbatch_tokens, f"stage {stage.name}: schedule.{which}", total)

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self.pretrain + self.midtrain

    @property
    def total_tokens(self) -> int:
        return sum(stage.tokens for stage in self.stages)

    def stage(self, name: str) -> Stage:
        """The stage called `name`; ConfigError with the nearest name for another."""
        found = {stage.name: stage for stage in self.stages}
        if name not in found:
            raise ConfigError(f"run {self.name!r} has no stage {name!r}; {nearest(name, list(found))}")
        return found[name]

    def tokens_before(self, name: str) -> int:
        """Tokens of all stages before the one called `name`."""
        return sum(stage.tokens for stage in itertools.takewhile(lambda s: s.name != name, self.stages))


_CLASSES = {
    cls.__name__: cls
    for cls in (
        Model, Optim, Schedule, Loss, Stage, Data, Scoring, Mesh, Loop, Run, SFT, GRPO, Expert, Unify, Evaluation, Posttrain,
    )
}  # fmt: skip


def from_canonical(value: Any) -> Any:
    """The configuration whose canonical form `value` is: reads what a run wrote beside its checkpoints."""
    if isinstance(value, dict) and "class" in value:
        cls = _CLASSES.get(value["class"])
        if cls is None:
            raise ConfigError(f"unknown config class {value['class']!r}; {nearest(value['class'], list(_CLASSES))}")
        fields = {k: from_canonical(v) for k, v in value.items() if k != "class"}
        known = [f.name for f in dataclasses.fields(cls)]
        for name in fields:
            require(name in known, f"{cls.__name__} has no field {name!r}; {nearest(name, known)}")
        return cls(**fields)
    if isinstance(value, dict):
        return {k: from_canonical(v) for k, v in value.items()}
    if isinstance(value, list):
        return tuple(from_canonical(v) for v in value)
    return value
