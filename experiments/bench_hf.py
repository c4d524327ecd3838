"""Tokens per second of Hugging Face `Glm4MoeForCausalLM`, training and sampling: the figure ours is compared with.

The peer's side needs torch and transformers only, in an environment of its own:

    python -m venv hf && hf/bin/pip install torch==2.13.0 'transformers==5.23.*'
    hf/bin/python experiments/bench_hf.py --side hf

Protocol: 17.2 M parameters in float32, random tokens; training is forward, backward and AdamW on 8 rows of 512 tokens;
sampling is 128 new tokens for each of 8 prompts of 64, at temperature 1, through the cache; two threads, sdpa attention.
The fastest of the timed repetitions counts: other work on the machine can only slow one down. One JSON line on stdout.
"""

import argparse
import json
import time
from collections.abc import Callable

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=["hf"], default="hf", help="whose model runs")
    parser.add_argument("--train-steps", type=int, default=5, help="timed training steps")
    parser.add_argument("--samples", type=int, default=3, help="timed generations")
    args = parser.parse_args()
    print(json.dumps(hugging_face(args.train_steps, args.samples)))


if __name__ == "__main__":
    main()
