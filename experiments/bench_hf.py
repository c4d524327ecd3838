"""Tokens per second of ours and of Hugging Face's `Glm4MoeForCausalLM`, training and sampling, in separate processes.

The peer's side needs torch and transformers only, in an environment of its own:

    python -m venv hf && hf/bin/pip install torch==2.13.0 'transformers==5.23.*'
    python -m experiments.bench_hf --alternate 5 --peer-python hf/bin/python --out experiments/results/bench_hf.json

Protocol: 17.2 M parameters in float32, random tokens; training is forward, backward and AdamW on 8 rows of 512 tokens;
sampling is 128 new tokens for each of 8 prompts of 64, at temperature 1, through the cache; two threads, sdpa attention.
Ours trains on a CPU device for each thread, rows and weights divided among them (fsdp), as `JAX_NUM_CPU_DEVICES=2` makes any run
do: threads that share one device's operations wait for each other after each of them. Sampling has one device.
The fastest of the timed repetitions counts: other work on the machine can only slow one down. One JSON line on stdout.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "moe_intermediate_size": 192,
    "num_hidden_layers": 6,
    "first_k_dense_replace": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "use_qk_norm": True,
    "attention_bias": True,
    "tie_word_embeddings": False,
    "num_mtp_layers": 0,
    "max_position_embeddings": 2048,
    "pad_token_id": None,
    "eos_token_id": None,
}
ROWS, LENGTH = 8, 512
PROMPTS, PROMPT_LENGTH, NEW_TOKENS = 8, 64, 128
THREADS = 2


def fastest(work: Callable[[], object], repetitions: int) -> float:
    """Seconds of the fastest repetition, after one that is not timed."""
    work()
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def hugging_face(train_steps: int, samples: int) -> dict:
    """The peer's tokens per second, its parameter count and versions."""
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    config = transformers.Glm4MoeConfig(**SHAPE, attn_implementation="sdpa", dtype="float32")
    model = transformers.Glm4MoeForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(0, config.vocab_size, (ROWS, LENGTH))
    prompts = ids[:PROMPTS, :PROMPT_LENGTH]

    def train_step():
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    def sample():
        out = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
        )
        assert out.shape == (PROMPTS, PROMPT_LENGTH + NEW_TOKENS)

    model.train()
    train_seconds = fastest(train_step, train_steps)
    model.eval()
    with torch.inference_mode():
        sample_seconds = fastest(sample, samples)
    return {
        "side": "hf",
        "train_tokens_per_second": round(ROWS * LENGTH / train_seconds, 1),
        "sample_tokens_per_second": round(PROMPTS * NEW_TOKENS / sample_seconds, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def ours(train_steps: int, samples: int) -> dict:
    """The same of our own train step and sampler."""
    import jax
    import numpy as np

    jax.config.update("jax_num_cpu_devices", THREADS)
    from glm_jax import config, mesh, model, spec
    from glm_jax.optim import optimizer
    from glm_jax.sample.engine import Sampling, generate
    from glm_jax.sample.weights import prepare
    from glm_jax.train import state
    from glm_jax.train.step import Knobs, train_step

    cfg = config.Model(
        V=4096, D=256, L=6, dense_layers=1, N=8, K=2, H=64, F=768, M=192, E=16, A=4, mtp_layers=0, routed_scale=1.0,
        rope_theta=1e4, max_positions=2048, dtype="float32", remat="none",
    )  # fmt: skip
    tx = optimizer(config.Optim(name="adamw"), model.specs(cfg))
    ids = np.random.default_rng(0).integers(0, cfg.V, (ROWS, LENGTH), dtype=np.int32)
    ones = np.ones((1, ROWS, LENGTH), np.float32)
    batch = {"ids": ids[None], "targets": np.roll(ids, -1, 1)[None], "weights": ones, "mtp_weights": ones}
    batch["positions"] = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (1, ROWS, LENGTH))
    batch |= {"segments": ones.astype(np.int32), "mtp_targets": batch["targets"]}
    with jax.set_mesh(mesh.make(config.Mesh(), jax.devices())):
        now = state.create(cfg, tx, 0)
        knobs = Knobs(*np.float32([1e-3, 0, 0]), microbatches=np.int32(1))

        def train():
            nonlocal now
            now, metrics = train_step(now, batch, knobs, cfg=cfg, tx=tx, sequence_balance=0.0)
            return float(metrics["loss"])

        train_seconds = fastest(train, train_steps)
    params, router_bias_LE = jax.device_get((now.params, now.router_bias_LE))
    params, prompts = prepare(cfg, params), ids[:PROMPTS, :PROMPT_LENGTH].tolist()
    settings = Sampling(temperature=1.0, max_new_tokens=NEW_TOKENS)

    def sample():
        done = generate(cfg, params, router_bias_LE, prompts, settings=settings)
        assert all(len(completion.ids) == NEW_TOKENS for completion in done)

    return {
        "side": "ours",
        "train_tokens_per_second": round(ROWS * LENGTH / train_seconds, 1),
        "sample_tokens_per_second": round(PROMPTS * NEW_TOKENS / fastest(sample, samples), 1),
        "parameters": spec.count(model.specs(cfg)),
        "versions": {"jax": jax.__version__},
    }


def alternate(turns: int, peer_python: str, out: Path | None, rest: list[str]) -> dict:
    """Both sides in turn, each in a process of its own; the best of each and their ratios, printed and written."""
    runs: list[dict] = []
    for turn in range(turns):
        for python, side in ((sys.executable, "ours"), (peer_python, "hf")):
            command = [python, "-m", "experiments.bench_hf", "--side", side, *rest]
            runs.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
            print(f"turn {turn + 1} of {turns}: {runs[-1]}", file=sys.stderr)
    names = ("train_tokens_per_second", "sample_tokens_per_second")
    best = {side: {n: max(r[n] for r in runs if r["side"] == side) for n in names} for side in ("ours", "hf")}
    result = {"best": best, "ratio": {n: round(best["ours"][n] / best["hf"][n], 3) for n in names}, "runs": runs}
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=["ours", "hf"], default="ours", help="whose model runs")
    parser.add_argument("--train-steps", type=int, default=5, help="timed training steps")
    parser.add_argument("--samples", type=int, default=3, help="timed generations")
    parser.add_argument("--alternate", type=int, default=0, metavar="N", help="run both sides N times in turn")
    parser.add_argument("--peer-python", default=sys.executable, help="the interpreter that has torch and transformers")
    parser.add_argument("--out", type=Path, help="file for the result of --alternate")
    args = parser.parse_args()
    if args.alternate:
        rest = ["--train-steps", str(args.train_steps), "--samples", str(args.samples)]
        result = alternate(args.alternate, args.peer_python, args.out, rest)
        print(json.dumps({"best": result["best"], "ratio": result["ratio"]}))
        return
    side = {"ours": ours, "hf": hugging_face}[args.side]
    print(json.dumps(side(args.train_steps, args.samples)))


if __name__ == "__main__":
    main()
