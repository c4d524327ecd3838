"""What loss-free balancing buys: expert load with the bias moving and with it off."""

from experiments.sweeps import Sweep
from experiments.sweeps.muon import SHORT

SWEEP = Sweep(baseline="tiny", common=SHORT, grids=({"schedule.bias_rate": (0.0, 1e-2)},), seeds=(0,))
