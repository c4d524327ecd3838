"""Runs whose data is made in the ways that `tiny` does not take."""

from experiments.recipes.tiny import tiny
from glm_jax.config import Data, Loop, Model, Optim, Run, Schedule, Scoring, Stage, replace

_M = 2**20


def mini() -> Run:
    """`tiny` on rows in ArrayRecord shards, in buckets by trained scorers, without templated pages and with hardly an import
    before what it needs: the documents that come with Python, no network."""
    data = replace(
        tiny().data,
        cycles="least_feedback",
        minhash=(20, 6),
        semantic_kept=0.92,
        removals=True,
        shard_tokens=1_000_000,
        scoring=Scoring(by="classifiers"),
    )
    return replace(tiny(), name="mini", data=data)


def default() -> Run:
    """60 M parameters on 300 MB of text that is fetched: web pages in English and Chinese, mathematics, repositories and
    commits with what was said about them, in the five stages of `glm45`, at its row lengths and proportions; reasoning and an
    agent's trajectories are made and checked."""
    pretrain = (
        _stage("stage1", 60 * _M, 4096, 1e4, {"general": 0.7, "code": 0.2, "math": 0.1}),
        _stage("stage2", 28 * _M, 4096, 1e4, {"general": 0.3, "code": 0.5, "math": 0.2}),
    )
    midtrain = (
        _stage("repositories", 2 * _M, 32_768, 1e6, {"code": 1.0}, midtrain=True),
        _stage("reasoning", 2 * _M, 32_768, 1e6, {"reasoning": 0.5, "math": 0.3, "code": 0.2}, midtrain=True),
        _stage("long_context", _M // 2, 131_072, 1e6, {"general": 0.4, "code": 0.4, "agent": 0.2}, midtrain=True),
    )
    return Run(
        name="default",
        model=Model(V=16_384, D=384, L=8, dense_layers=1, N=12, K=2, H=64, F=1536, M=256, E=16, A=4, rope_theta=1e4),
        pretrain=pretrain,
        midtrain=midtrain,
        optim=Optim(),
        schedule=Schedule(
            peak_lr=2e-3, final_lr=2e-4, warmup_tokens=2 * _M, batch_tokens_start=2**17, batch_tokens=2**18,
            batch_ramp_tokens=8 * _M, mtp_switch_tokens=60 * _M, bias_freeze_tokens=60 * _M,
        ),
        data=Data(
            corpus="default", held_out=0.02, tokenizer_bytes=16_000_000, cycles="least_feedback", minhash=(20, 6),
            semantic_kept=0.92, removals=True, shard_tokens=8_000_000, scoring=Scoring(by="classifiers"), dialogues=6000,
        ),
        loop=Loop(eval_bytes=1_000_000),
    )  # fmt: skip


def _stage(
    name: str, tokens: int, seq_len: int, theta: float, mixture: dict[str, float], midtrain: bool = False
) -> Stage:
    return Stage(
        name, tokens, seq_len, theta, microbatch_rows=2**17 // seq_len, mixture=mixture,
        packing="best_fit" if midtrain else "truncate", isolate=midtrain, long_documents=midtrain,
    )  # fmt: skip
