"""Against optax.contrib.muon, which keeps an average with bias correction where Moonlight keeps a sum.

Without Nesterov the two differ by a factor per step, which Newton-Schulz removes. With it they differ by
(1 - b^t) / (1 - b^(t+1)) between gradient and momentum, which is gone after a while.
"""

import jax
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from glm_jax.optim import scale_by_muon
from glm_jax.spec import Spec

SPECS = {
    "w_DF": Spec("", "D", "F", "matrix"),
    "q_LDNH": Spec("L", "D", "NH", "matrix"),
    "x_EMD": Spec("E", "M", "D", "matrix"),
}
SHAPES = {"w_DF": (12, 20), "q_LDNH": (2, 12, 4, 3), "x_EMD": (3, 8, 12)}
AXES = {
    "w_DF": MuonDimensionNumbers(0, 1),
    "q_LDNH": MuonDimensionNumbers((1,), (2, 3)),
    "x_EMD": MuonDimensionNumbers(1, 2),
}


@pytest.mark.parametrize(("nesterov", "momentum", "since"), [(False, 0.95, 0), (True, 0.5, 20)])
def test_updates_equal_optax(nesterov, momentum, since):
    ours = scale_by_muon(SPECS, momentum=momentum, nesterov=nesterov, ns_dtype="float32")
    theirs = optax.contrib.muon(
        1.0, beta=momentum, nesterov=nesterov, consistent_rms=0.2, muon_weight_dimension_numbers=AXES
    )

    def grads(i):
        random = np.random.default_rng(i)
        return {name: random.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}

    one, two = ours.init(grads(0)), theirs.init(grads(0))
    update, other = jax.jit(ours.update), jax.jit(theirs.update)
    for i in range(since + 5):
        d, one = update(grads(i), one)
        u, two = other(grads(i), two, grads(0))
        if i >= since:
            for name in SPECS:
                np.testing.assert_allclose(d[name], -u[name], atol=2e-5)  # float32 through five steps of Newton-Schulz
