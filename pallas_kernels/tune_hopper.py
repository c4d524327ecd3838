"""Check the Hopper kernels on the chip, time them with many tiles, and write down the best.

    python -m pallas_kernels.tune_hopper --out FILE

Each operation is first checked with every tile against a product per group, or attention's definition, in float32 on a small
uneven case. Then it is timed on the published models' shapes: medians, the cache
overwritten before each run, rates of the operations that the result needs (attention's counted by what each query sees).
A tile that does not fit the chip's shared memory is told, and left out.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.attention import gpu as attention
from pallas_kernels.attention import reference
from pallas_kernels.bench import flush, normal, seconds_in_turns
from pallas_kernels.grouped_matmul import gpu as grouped
from pallas_kernels.grouped_matmul import reference as grouped_reference
from pallas_kernels.grouped_matmul.cases import uneven

TOLERANCE = 2e-2  # of the largest value: bfloat16 results of float32 sums
SHAPES = {"tokamax": (524288, 4096, 1536, 128), "glm45": (131072, 5120, 1536, 160), "air": (131072, 4096, 1408, 128)}
GROUPED = {
    "gmm": (grouped.gmm, grouped_reference.gmm, "xw"),
    "gmm_t": (grouped.gmm_t, grouped_reference.gmm_t, "yw"),
    "tgmm": (grouped.tgmm, grouped_reference.tgmm, "xy"),
}


def grouped_configs() -> Iterator[grouped.Config]:
    for (rows, columns), stages, stores in itertools.product(
        ((128, 256), (128, 128), (256, 128), (128, 192)), (3, 4, 5), (1, 2, 4)
    ):
        yield grouped.Config(rows=rows, columns=columns, stages=stages, stores=stores)


def attention_configs() -> Iterator[attention.Config]:
    for forward, forward_stages, dq, backward_stages in itertools.product((64, 128), (2, 3, 4), (64, 128), (2, 3)):
        yield attention.Config(forward, forward_stages, dq, 64, backward_stages)


def grouped_inputs(operands: str, R: int, D: int, M: int, sizes: tuple[int, ...]) -> tuple[Array, ...]:
    shapes = {"x": (R, D), "y": (R, M), "w": (len(sizes), D, M)}
    keys = jax.random.split(jax.random.key(0), 2)
    pair = (jax.random.normal(key, shapes[name], jnp.bfloat16) for key, name in zip(keys, operands, strict=True))
    return *pair, jnp.asarray(sizes, jnp.int32)


def attention_inputs(T: int, N: int, K: int, H: int, documents: int) -> tuple[Array, ...]:
    """q, k, v, the gradient, positions and segments of one packed row of documents of uneven length."""
    lengths = uneven(T, documents)
    positions = np.concatenate([np.arange(length) for length in lengths])
    segments = np.repeat(np.arange(documents) + 1, lengths)
    shapes = (1, T, N, H), (1, T, K, H), (1, T, K, H), (1, T, N, H)
    return *normal("bfloat16", *shapes), *(jnp.asarray(z[None], jnp.int32) for z in (positions, segments))


def attend(q, k, v, dy, positions, segments, config: attention.Config, module: Any = attention) -> Array:
    tiles = {} if module is reference else {"config": config}
    places = positions, positions, segments, segments, segments
    return module.attention(q, k, v, *places, scale=q.shape[-1] ** -0.5, **tiles)


def attend_and_gradients(q, k, v, dy, positions, segments, config, module: Any = attention) -> tuple[Array, ...]:
    y, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, dy, positions, segments, config, module), q, k, v)
    return y, *vjp(dy)


def error(got: Any, want: Any) -> float:
    """The largest, as a part of the largest value; infinite where something is not a number."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    worst = max(float(jnp.abs(a.astype("float32") - b).max() / jnp.abs(b).max()) for a, b in pairs)
    return worst if np.isfinite(worst) else float("inf")


def cases() -> Iterator[tuple[str, str, Callable, Callable, tuple, Callable, Callable, float]]:
    """Operation, case, function of inputs and config, configs, inputs to check and to time, the definition, operations."""
    for name, (function, definition, operands) in GROUPED.items():
        check = grouped_inputs(operands, 2000, 512, 768, (0, 700, 3, 0, 129, 1000))
        for case, (R, D, M, E) in SHAPES.items():
            time = partial(grouped_inputs, operands, R, D, M, uneven(R, E))
            yield name, case, function, grouped_configs, check, time, definition, 2.0 * R * D * M
    for name, function, factor in (("attention", attend, 1.0), ("attention and gradient", attend_and_gradients, 3.5)):
        check = attention_inputs(1000, 4, 2, 128, 3)
        for T, documents in ((8192, 1), (8192, 6), (32768, 1)):
            pairs = sum(length * (length + 1) / 2 for length in uneven(T, documents))
            time = partial(attention_inputs, T, 96, 8, 128, documents)
            definition = partial(function, config=None, module=reference)
            yield (
                name,
                f"{T} in {documents}",
                function,
                attention_configs,
                check,
                time,
                definition,
                factor * 4 * pairs * 96 * 128,
            )


def tune(repetitions: int) -> Iterator[dict[str, Any]]:
    """A row for each operation, case and tile: its largest error and its rate, or why there is none."""
    for name, case, function, configs, check, time, definition, operations in cases():
        want = jax.jit(definition)(*(z.astype("float32") if z.dtype == jnp.bfloat16 else z for z in check))
        inputs = time()
        for config in configs():
            row = {"operation": name, "case": case, "config": asdict(config)}
            run = jax.jit(partial(function, config=config))
            try:
                row["error"] = error(run(*check), want)
                if row["error"] < TOLERANCE:
                    seconds = seconds_in_turns({"ours": partial(run, *inputs)}, repetitions, between=flush)["ours"]
                    row |= {"ms": round(1e3 * seconds, 4), "TFLOP/s": round(operations / seconds / 1e12, 1)}
            except Exception as problem:  # what the compiler says of a tile too large is part of the table
                row["refused"] = str(problem).strip().splitlines()[-1][:160]
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repetitions", type=int, default=21)
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        raise SystemExit(f"tune_hopper: jax runs on {jax.default_backend()} here; it needs a Hopper GPU")
    rows, best = [], {}
    for row in tune(args.repetitions):
        rows.append(row)
        print(json.dumps(row), flush=True)
        key = row["operation"], row["case"]
        if row.get("TFLOP/s", 0) > best.get(key, {"TFLOP/s": 0})["TFLOP/s"]:
            best[key] = row
        args.out.write_text(
            json.dumps({"device": jax.devices()[0].device_kind, "best": list(best.values()), "rows": rows}, indent=1)
        )
    for row in best.values():
        print(f"{row['operation']:24} {row['case']:12} {row['TFLOP/s']:7.1f} TFLOP/s  {row['config']}")


if __name__ == "__main__":
    main()
