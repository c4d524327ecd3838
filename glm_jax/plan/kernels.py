"""What the kernels of a traced program do. A TPU's compiled program says it too; of Mosaic GPU's kernels it says nothing."""

from collections import Counter

from jax.extend import core


def operations(jaxpr: core.Jaxpr, times: int = 1) -> Counter[str]:
    """Operations of the Pallas kernels of a program, by name, as their cost estimates have it: in a loop of known length as
    often as it runs, in any other once; on one device where `shard_map` calls them. The compiler may still drop calls whose
    results nothing needs: they are counted too."""
    found: Counter[str] = Counter()
    for eqn in jaxpr.eqns:
        if (cost := eqn.params.get("cost_estimate")) is not None:
            found[str(eqn.params["name"])] += times * cost.flops
            continue
        inner = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
        for inside in core.jaxprs_in_params(eqn.params):
            found += operations(inside, inner)
    return found
