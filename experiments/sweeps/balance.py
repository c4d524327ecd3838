"""What loss-free balancing buys: expert load with the bias moving and with it off."""

from experiments.sweeps import Sweep
from experiments.sweeps.muon import SHORT, WHOLE_BATCHES

COMMON = SHORT | WHOLE_BATCHES | {"schedule.peak_lr": 1e-2}  # the best rate of sweep muon, with which it shares a run
SWEEP = Sweep(baseline="tiny", common=COMMON, grids=({"schedule.bias_rate": (0.0, 1e-2)},), seeds=(0,))
