"""Does Muon beat AdamW? Each at three learning rates, equal tokens, three seeds."""

from experiments.sweeps import Sweep
from glm_jax.config import Posttrain

# A short run with its own full cosine: the other stages' tokens are all but removed, so that it decays to the end.
SHORT = {
    "post": Posttrain(),
    "pretrain.0.tokens": 409_600,
    "pretrain.1.tokens": 16_384,
    "midtrain.0.tokens": 16_384,
    "schedule.batch_tokens_start": 4096,
    "schedule.batch_tokens": 4096,
    "schedule.warmup_tokens": 40_960,
    "schedule.bias_freeze_tokens": 409_600,
    "schedule.mtp_switch_tokens": 409_600,
    "loop.checkpoint_every": 1000,
    "loop.eval_bytes": 50_000,
}

WHOLE_BATCHES = {"pretrain.0.microbatch_rows": 16, "pretrain.1.microbatch_rows": 16}

SWEEP = Sweep(
    baseline="tiny",
    common=SHORT | WHOLE_BATCHES,
    grids=(
        {"optim.name": ("muon",), "schedule.peak_lr": (4e-3, 1e-2, 2.5e-2)},
        {"optim.name": ("adamw",), "schedule.peak_lr": (2e-3, 5e-3, 1.2e-2)},
    ),
)
