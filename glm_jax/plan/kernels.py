"""What a call of each kernel does. A TPU's compiled program says it too; of Mosaic GPU's kernels it says only how often they run."""

from collections import defaultdict
from statistics import fmean

from jax.extend import core


def operations(jaxpr: core.Jaxpr) -> dict[str, float]:
    """Operations of one call of each Pallas kernel of a program, by name, as its cost estimates have it, the mean of those at
    different places; on one device where `shard_map` calls them."""
    found: defaultdict[str, list[float]] = defaultdict(list)

    def collect(jaxpr: core.Jaxpr) -> None:
        for eqn in jaxpr.eqns:
            if (cost := eqn.params.get("cost_estimate")) is not None:
                found[str(eqn.params["name"])].append(cost.flops)
            else:
                for inside in core.jaxprs_in_params(eqn.params):
                    collect(inside)

    collect(jaxpr)
    return {name: fmean(costs) for name, costs in found.items()}
