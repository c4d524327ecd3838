"""Grouped matmul against XLA's dense product of the same operations: `python -m pallas_kernels.grouped_matmul.bench --help`.

Both sides take turns in one process, so a busy machine slows both, and the ratio is that of their medians. The dense side
multiplies the same rows by one matrix; for `expert_mlp` it is one expert's network over all routed rows, forward and backward.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels import grouped_matmul
from pallas_kernels.grouped_matmul.cases import GMM, MLP, Gmm, Mlp


def seconds_in_turns(sides: dict[str, tuple[Callable, tuple]], repetitions: int) -> dict[str, float]:
    """Median seconds of each side, after one call that compiles."""
    compiled = {name: (jax.jit(f), inputs) for name, (f, inputs) in sides.items()}
    taken = {name: [] for name in sides}
    for _ in range(repetitions + 1):
        for name, (f, inputs) in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(f(*inputs))
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in taken.items()}


def _normal(rng: np.random.Generator, dtype: str, *shapes: tuple[int, ...]) -> list[Array]:
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def gmm_sides(case: Gmm, dtype: str, implementation: str | None) -> dict[str, dict]:
    """Per operation its two sides."""
    rng = np.random.default_rng(0)
    x, w, y = _normal(rng, dtype, (case.R, case.D), (len(case.sizes), case.D, case.M), (case.R, case.M))
    sizes = jnp.asarray(case.sizes, jnp.int32)

    def ours(f):
        return lambda a, b: f(a, b, sizes, implementation=implementation)

    return {
        "gmm": {"ours": (ours(grouped_matmul.gmm), (x, w)), "dense": (lambda x, w: x @ w, (x, w[0]))},
        "gmm_t": {"ours": (ours(grouped_matmul.gmm_t), (y, w)), "dense": (lambda y, w: y @ w.T, (y, w[0]))},
        "tgmm": {"ours": (ours(grouped_matmul.tgmm), (x, y)), "dense": (lambda x, y: x.T @ y, (x, y))},
    }


def mlp_sides(case: Mlp, dtype: str, implementation: str | None) -> dict[str, dict]:
    """Forward, and forward with backward, of a routed layer and of one expert over as many rows."""
    rng = np.random.default_rng(0)
    x, gate, up, down = _normal(
        rng, dtype, (case.X, case.D), (case.E, case.D, case.M), (case.E, case.D, case.M), (case.E, case.M, case.D)
    )
    experts = jnp.asarray(np.argsort(rng.random((case.X, case.E)) ** case.skew, axis=1)[:, : case.A], jnp.int32)
    weights = jnp.asarray(rng.random((case.X, case.A)), dtype)

    def ours(x, gate, up, down):
        return grouped_matmul.expert_mlp(x, gate, up, down, experts, weights, implementation=implementation)

    def dense(x, gate, up, down):
        return (jax.nn.silu(x @ gate) * (x @ up)) @ down

    def backward(f):
        def run(*inputs):
            y, vjp = jax.vjp(f, *inputs)
            return vjp(y)

        return run

    routed, plain = (x, gate, up, down), (jnp.repeat(x, case.A, 0), gate[0], up[0], down[0])
    return {
        "expert_mlp": {"ours": (ours, routed), "dense": (dense, plain)},
        "expert_mlp and gradient": {"ours": (backward(ours), routed), "dense": (backward(dense), plain)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [name for name, case in (GMM | MLP).items() if "bench" in case.tags]
    parser.add_argument("--cases", nargs="+", choices=known, default=known)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--implementation", choices=list(grouped_matmul.IMPLEMENTATIONS), default=None)
    parser.add_argument("--repetitions", type=int, default=11)
    args = parser.parse_args()
    for name in args.cases:
        operations = {}
        if name in GMM:
            operations |= gmm_sides(GMM[name], args.dtype, args.implementation)
        if name in MLP:
            operations |= mlp_sides(MLP[name], args.dtype, args.implementation)
        for operation, sides in operations.items():
            seconds = seconds_in_turns(sides, args.repetitions)
            row = {"case": name, "operation": operation, "dtype": args.dtype}
            row |= {f"{side}_ms": round(1e3 * s, 3) for side, s in seconds.items()}
            print(json.dumps(row | {"ratio": round(seconds["dense"] / seconds["ours"], 3)}), flush=True)


if __name__ == "__main__":
    main()
