"""How weights move: Muon and AdamW, the schedule over all stages, loss-free balancing."""

from glm_jax.optim.balance import balance
from glm_jax.optim.build import muon, optimizer, owner
from glm_jax.optim.muon import newton_schulz, scale_by_muon
from glm_jax.optim.schedule import Scheduled, Step, Steps, scheduled, steps

__all__ = [
    "Scheduled", "Step", "Steps", "balance", "muon", "newton_schulz", "optimizer", "owner", "scale_by_muon", "scheduled",
    "steps",
]  # fmt: skip
