"""Settings of post-training (report, section 3): cold-start SFT, GRPO, three experts, one unified model.

The report names the methods and keeps most numbers to itself (spec section 8 and 14.13): the defaults are slime's and
DeepDive's, from the same laboratory, for a large model; a miniature's recipe changes them.
"""

from dataclasses import dataclass, field
from typing import Literal

from glm_jax.config.functions import SILENT_AT_DEFAULT, check_choices, require
from glm_jax.config.pretrain import Optim


@dataclass(frozen=True)
class SFT:
    """Supervised fine-tuning on dialogues: only what the assistant says is trained, the closing role token included."""

    dialogues: int = 4096
    held_out: int = 256  # further dialogues, for the validation loss
    thinking_share: float = 1.0  # of the dialogues; the others answer directly
    slips: float = 0.0  # share of the oracle's dialogues with a wrong step in them, as people's demonstrations have
    epochs: float = 2.0
    seq_len: int = 8192
    microbatch_rows: int = 8
    batch_rows: int = 32
    peak_lr: float = 2e-5
    final_lr: float = 2e-6
    warmup_share: float = 0.05  # of the tokens
    evals: int = 4  # looks at the validation loss on the way
    mtp_weight: float = 0.1  # of the MTP loss; 0 leaves its layer out of the step
    optim: Optim = Optim()

    def __post_init__(self):
        for name in ("dialogues", "held_out", "seq_len", "microbatch_rows", "batch_rows"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        for name in ("evals", "mtp_weight"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative; 0 is none")
        require(0 <= self.final_lr <= self.peak_lr, f"final_lr={self.final_lr} must lie in 0..peak_lr={self.peak_lr}")
        require(self.epochs > 0, f"epochs={self.epochs} must be positive")
        for name in ("thinking_share", "slips"):
            require(0 <= getattr(self, name) <= 1, f"{name}={getattr(self, name)} must lie in 0..1")
        require(0 <= self.warmup_share < 1, f"warmup_share={self.warmup_share} must lie in [0, 1)")
        require(
            self.batch_rows % self.microbatch_rows == 0,
            f"batch_rows={self.batch_rows} is not a multiple of microbatch_rows={self.microbatch_rows}; use a multiple",
        )


@dataclass(frozen=True)
class GRPO:
    """GRPO without KL (report, section 3.2; spec section 8)."""

    steps: int = 1000
    levels: tuple[int, ...] = (1,)  # of difficulty, that fresh tasks are drawn from
    groups: int = 32  # with different rewards inside, of a step, at least: with fewer it samples again
    oversample: float = 2.0  # tasks sampled in a round, for each group that is wanted
    rounds: int = 3  # of sampling at most, while too few groups have different rewards
    group_size: int = 8
    thinking_share: float = 1.0  # of the tasks; the others are answered directly
    temperature: float = 1.0
    max_new_tokens: int = 65_536  # of a turn: one stage at 64K, no ladder
    max_tokens: int = 131_072  # of an answer: the prompt and all turns
    seq_len: int = 131_072  # of the rows that answers are trained in
    microbatch_rows: int = 8
    peak_lr: float = 1e-6  # constant after the warm-up
    warmup_steps: int = 0
    clip_low: float = 0.2
    clip_high: float = 0.28
    std_normalize: bool = False  # advantages divided by the group's standard deviation
    aggregate: Literal["token", "sequence"] = "token"  # mean over tokens, or over answers of each one's mean
    clip_c: float = field(default=0.0, metadata=SILENT_AT_DEFAULT)  # no ratio counts for more (dual clip); 0: none
    # answers are drawn with FP8 matrices, and ratios are to that policy
    rollouts_in_8_bits: bool = field(default=False, metadata=SILENT_AT_DEFAULT)
    routing_replay: bool = True  # training takes the experts that sampling took: near-ties would differ, and the ratios
    updates: int = 1  # optimizer steps on the answers of one sampling
    hard_share: float = 0.25  # last share of the steps, on problems with pass@k = 0 and pass@K > 0; 0: no second stage
    hard_attempts: int = 512  # K; k is group_size
    hard_pool: int = 256  # problems probed at most
    checkpoint_every: int = 10  # steps
    optim: Optim = Optim(name="adamw", adam_b2=0.98)

    def __post_init__(self):
        check_choices(self)
        for name in ("steps", "groups", "rounds", "max_new_tokens", "microbatch_rows", "updates", "checkpoint_every"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        for name in ("peak_lr", "warmup_steps"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative; 0 is none")
        require(self.group_size >= 2, f"group_size={self.group_size}: a baseline needs at least 2 answers")
        require(
            self.max_new_tokens < self.max_tokens <= self.seq_len,
            f"max_tokens={self.max_tokens} must lie above max_new_tokens={self.max_new_tokens} and within "
            f"seq_len={self.seq_len}: an answer has a prompt, and fits a row",
        )
        require(bool(self.levels), "levels is empty; name at least one level of the environment")
        require(self.oversample >= 1, f"oversample={self.oversample} must be at least 1")
        require(
            self.temperature > 0, f"temperature={self.temperature} must be positive: GRPO needs answers that differ"
        )
        require(0 <= self.thinking_share <= 1, f"thinking_share={self.thinking_share} must lie in 0..1")
        require(0 < self.clip_low < 1, f"clip_low={self.clip_low} must lie in (0, 1)")
        require(self.clip_high > 0, f"clip_high={self.clip_high} must be positive")
        require(
            self.clip_c == 0 or self.clip_c > 1 + self.clip_high,
            f"clip_c={self.clip_c} must lie above 1 + clip_high={1 + self.clip_high}, or be 0 for none",
        )
        require(
            self.clip_c > 0 or not self.rollouts_in_8_bits,
            "rollouts_in_8_bits without clip_c: a token that 8 bits made likelier than it is would count for any ratio; set clip_c=2",
        )
        require(0 <= self.hard_share < 1, f"hard_share={self.hard_share} must lie in [0, 1)")
        require(
            self.hard_attempts >= self.group_size,
            f"hard_attempts={self.hard_attempts} must be at least group_size={self.group_size}",
        )

    @property
    def tasks(self) -> int:
        """Tasks of one round of sampling."""
        return round(self.groups * self.oversample)


@dataclass(frozen=True)
class Expert:
    """One of the models that are trained apart and distilled into one: a domain's cold start and its RL."""

    domain: str  # a name in glm_jax.envs.ENVIRONMENTS
    sft: SFT = SFT()
    sft_levels: tuple[int, ...] = (1,)
    grpo: GRPO = GRPO()
    unify_share: float = 1.0  # its prompts in unification, as a multiple of unify.prompts
    direct_share: float = (
        0.5  # of its answers there, retold without reasoning: a task that must be reasoned out wants fewer
    )

    def __post_init__(self):
        require(self.unify_share > 0, f"unify_share={self.unify_share} of expert {self.domain} must be positive")
        require(
            0 <= self.direct_share <= 1,
            f"direct_share={self.direct_share} of expert {self.domain} must lie in 0..1",
        )


@dataclass(frozen=True)
class Unify:
    """The experts distilled into one hybrid model: rejection sampling, SFT from the mid-trained base, general RL."""

    prompts: int = 1024  # of each expert
    answers: int = 4  # sampled for each prompt
    keep: int = 1  # accepted answers kept of each prompt
    min_answer_tokens: int = 2
    sft: SFT = SFT()
    grpo: GRPO = GRPO()

    def __post_init__(self):
        for name in ("prompts", "answers", "keep"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        require(self.sft.slips == 0, f"slips={self.sft.slips} in unify.sft: its teachers are the experts; set it to 0")


@dataclass(frozen=True)
class Evaluation:
    """How post-training is measured: tasks of held-out seeds, several answers to each."""

    tasks: int = 256  # of each domain and level
    answers: int = 4
    temperature: float = 1.0
    level: int = 1
    harder_level: int = 2

    def __post_init__(self):
        require(self.tasks >= 2, f"tasks={self.tasks} must be at least 2: one has no standard error")
        require(self.answers >= 1, f"answers={self.answers} must be at least 1")
        require(self.temperature >= 0, f"temperature={self.temperature} must not be negative; 0 is greedy")


@dataclass(frozen=True, kw_only=True)
class Posttrain:
    """From the mid-trained model to the final one (report, section 3)."""

    experts: tuple[Expert, ...] = ()  # none: the run ends with mid-training
    self_distillation: bool = False  # a second round of each expert: cold start from its own RL's answers, RL again
    unify: Unify = Unify()
    evaluation: Evaluation = Evaluation()

    def __post_init__(self):
        check_choices(self)
        domains = [expert.domain for expert in self.experts]
        require(len(set(domains)) == len(domains), f"experts of {domains}: one for each domain")
