"""Does Muon beat AdamW? Each at three learning rates, equal tokens, three seeds."""

from experiments.sweeps import Sweep

# A short run with its own full cosine: the other stages' tokens are all but removed, so that it decays to the end.
SHORT = {
    "pretrain.0.tokens": 614_400,
    "pretrain.1.tokens": 16_384,
    "midtrain.0.tokens": 16_384,
    "schedule.batch_ramp_tokens": 204_800,
    "schedule.warmup_tokens": 40_960,
    "schedule.bias_freeze_tokens": 614_400,
    "schedule.mtp_switch_tokens": 614_400,
    "loop.checkpoint_every": 1000,
}

SWEEP = Sweep(
    baseline="tiny",
    common=SHORT,
    grids=(
        {"optim.name": ("muon",), "schedule.peak_lr": (5e-3, 1e-2, 2e-2)},
        {"optim.name": ("adamw",), "schedule.peak_lr": (1.5e-3, 3e-3, 6e-3)},
    ),
)
