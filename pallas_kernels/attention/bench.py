"""Attention against `jax.nn.dot_product_attention` on the same packed rows: `python -m pallas_kernels.attention.bench --help`.

The other side gets the mask that packing is, [B, 1, T, S]. Both take turns in one process, so a busy machine slows both, and
the ratios are those of medians of time and of the compiler's figures for temporary memory.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import attention as kernels
from pallas_kernels.attention.cases import CASES, Case
from pallas_kernels.attention.reference import visible_BTS


def inputs(case: Case, dtype: str):
    """q, k, v, and positions and segments of queries and keys: the queries are the last T of S tokens."""
    rng = np.random.default_rng(0)
    shapes = (case.B, case.T, case.N, case.H), (case.B, case.S, case.K, case.H), (case.B, case.S, case.K, case.H)
    at, length = np.arange(case.S), -(-case.S // case.documents)
    segments = np.where(at < case.S - case.padding, at // length + 1, 0)
    k_at = [jnp.asarray(np.broadcast_to(z, (case.B, case.S)), jnp.int32) for z in (at % length, segments)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes], [z[:, -case.T :] for z in k_at], k_at


def sides(q_at, k_at, scale: float, implementation: str | None):
    """Both as functions of q, k and v."""

    def ours(q, k, v):
        queries = {"q_positions_BT": q_at[0], "q_segments_BT": q_at[1]}
        keys = {"k_positions_BS": k_at[0], "k_segments_BS": k_at[1]}
        return kernels.attention(q, k, v, **queries, **keys, scale=scale, implementation=implementation)

    def stock(q, k, v):
        mask_BTS = visible_BTS(q_at[0], k_at[0], q_at[1], k_at[1], q_at[1])
        return jax.nn.dot_product_attention(q, k, v, mask=mask_BTS[:, None], scale=scale)

    return {"ours": ours, "stock": stock}


def with_gradients(run):
    def both(q, k, v):
        y, vjp = jax.vjp(run, q, k, v)
        return y, *vjp(y)

    return both


def measure(runs, arrays, repetitions: int) -> dict[str, float]:
    """Per side milliseconds and MiB of temporaries; and what the other side takes for one of ours."""
    compiled = {name: jax.jit(run).lower(*arrays).compile() for name, run in runs.items()}
    taken = {name: [] for name in runs}
    for _ in range(repetitions + 1):
        for name, run in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*arrays))
            taken[name].append(time.perf_counter() - start)
    row = {}
    for name, run in compiled.items():
        row[f"{name}_ms"] = round(1e3 * statistics.median(taken[name][1:]), 2)
        memory = run.memory_analysis()
        assert memory is not None, "this back end does not tell what a program takes"
        row[f"{name}_MiB"] = round(memory.temp_size_in_bytes / 2**20, 1)
    return row | {f"{unit}_ratio": round(row[f"stock_{unit}"] / row[f"ours_{unit}"], 2) for unit in ("ms", "MiB")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [name for name, case in CASES.items() if "bench" in case.tags]
    parser.add_argument("--cases", nargs="+", choices=known, default=known)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--implementation", choices=list(kernels.IMPLEMENTATIONS), default=None)
    parser.add_argument("--repetitions", type=int, default=7)
    args = parser.parse_args()
    for name in args.cases:
        case = CASES[name]
        arrays, q_at, k_at = inputs(case, args.dtype)
        runs = sides(q_at, k_at, case.H**-0.5, args.implementation)
        for operation, change in (("forward", lambda run: run), ("forward and backward", with_gradients)):
            figures = measure({side: change(run) for side, run in runs.items()}, arrays, args.repetitions)
            print(json.dumps({"case": name, "operation": operation, "dtype": args.dtype} | figures), flush=True)


if __name__ == "__main__":
    main()
