"""GLM-4.5 in miniature: every part of the model and of both pre-training stages, on two CPU cores."""

from glm_jax.config import (
    GRPO,
    SFT,
    Data,
    Evaluation,
    Expert,
    Loop,
    Mesh,
    Model,
    Optim,
    Posttrain,
    Run,
    Schedule,
    Stage,
    Unify,
    replace,
)  # fmt: skip


def tiny() -> Run:
    """3.1 M parameters, 1 dense + 4 MoE layers + MTP, on the documents that come with Python, and three experts in one."""
    model = Model(
        V=2048, D=128, L=5, dense_layers=1, N=4, K=2, H=32, F=384, M=64, E=16, A=4,
        max_positions=4096, rope_theta=1e4, dtype="float32", remat="none",
    )  # fmt: skip
    pretrain = (
        Stage("stage1", 1_064_960, 256, 1e4, microbatch_rows=8, mixture={"general": 0.7, "code": 0.25, "math": 0.05}),
        Stage("stage2", 819_200, 256, 1e4, microbatch_rows=8, mixture={"general": 0.15, "code": 0.65, "math": 0.2}),
    )
    midtrain = (
        Stage(
            "midtrain", 409_600, 1024, 1e6, microbatch_rows=4, mixture={"general": 0.2, "code": 0.6, "math": 0.2},
            packing="best_fit", isolate=True, long_documents=True,
        ),
    )  # fmt: skip
    return Run(
        name="tiny",
        model=model,
        pretrain=pretrain,
        midtrain=midtrain,
        optim=Optim(ns_dtype="float32"),
        schedule=Schedule(
            peak_lr=8e-3, final_lr=1e-3, warmup_tokens=81_920, batch_tokens_start=2048, batch_tokens=4096,
            batch_ramp_tokens=409_600, mtp_switch_tokens=1_064_960, bias_rate=1e-2, bias_freeze_tokens=2_129_920,
        ),
        data=Data(),
        mesh=Mesh(),
        loop=Loop(eval_bytes=100_000),
        post=posttrain(),
    )  # fmt: skip


def posttrain() -> Posttrain:
    """Three experts and their unification, on tasks that fit two hundred tokens (agent: six hundred).

    The teacher of the cold starts slips in some of its dialogues: that is what imitation cannot get rid of, and RL can.
    """
    sft = SFT(
        dialogues=3200, held_out=192, slips=0.3, epochs=2, seq_len=256, microbatch_rows=4, batch_rows=4, peak_lr=8e-3,
        final_lr=4e-4, mtp_weight=0.0,  # and Muon in bfloat16, as it is trained at scale
    )  # fmt: skip
    grpo = GRPO(
        steps=28, levels=(1, 2), groups=8, oversample=4, rounds=2, max_new_tokens=144, max_tokens=224, seq_len=256,
        microbatch_rows=8, peak_lr=2e-4, warmup_steps=3, hard_share=0.1, hard_attempts=32, hard_pool=32,
        optim=Optim(name="adamw", adam_b2=0.98, weight_decay=0.0),
    )  # fmt: skip
    chat = replace(grpo, steps=38, max_new_tokens=72, max_tokens=144, peak_lr=4e-4)
    long_sft = replace(sft, seq_len=1024, microbatch_rows=2, batch_rows=2)
    agent = replace(
        grpo, steps=12, groups=4, peak_lr=3e-4, seq_len=1024, max_tokens=640, max_new_tokens=96, microbatch_rows=2,
        hard_pool=16,
    )  # fmt: skip
    agent_sft = replace(long_sft, dialogues=1000, held_out=64, epochs=4, slips=0.4)
    chat_sft = replace(sft, dialogues=4500, epochs=2.5)
    return Posttrain(
        experts=(
            Expert("reasoning", sft=sft, sft_levels=(1, 2), grpo=grpo, unify_share=2.8, direct_share=0.2),
            Expert("agent", sft=agent_sft, sft_levels=(1, 2), grpo=agent, unify_share=0.7, direct_share=0.4),
            Expert("chat", sft=chat_sft, sft_levels=(1, 2), grpo=chat, unify_share=3.8, direct_share=0.4),
        ),
        unify=Unify(
            prompts=2048, answers=1, sft=replace(long_sft, slips=0.0, epochs=2.3),
            grpo=replace(agent, steps=8, peak_lr=2e-4, thinking_share=0.5, hard_share=0.0),
        ),
        evaluation=Evaluation(tasks=256, answers=2),
    )  # fmt: skip


def smoke() -> Run:
    """`tiny` with two MoE layers, on a fraction of the tokens and a few steps of RL: the same code for continuous integration."""
    full = tiny()
    sft = {"dialogues": 64, "held_out": 16, "epochs": 1.0, "evals": 1}
    grpo = {"steps": 2, "groups": 2, "rounds": 1, "hard_share": 0.5, "hard_attempts": 16, "hard_pool": 2}
    experts = tuple(
        replace(one, sft=replace(one.sft, **sft), grpo=replace(one.grpo, **grpo)) for one in full.post.experts
    )
    general = replace(full.post.unify.grpo, **{**grpo, "hard_share": 0.0})
    unify = replace(full.post.unify, prompts=16, sft=replace(full.post.unify.sft, **sft), grpo=general)
    post = Posttrain(experts=experts, unify=unify, evaluation=replace(full.post.evaluation, tasks=8))
    return replace(
        full,
        **{
            "name": "smoke",
            "model.L": 3,
            "schedule.batch_ramp_tokens": 8192,
            "pretrain.0.tokens": 40_960,
            "pretrain.1.tokens": 40_960,
            "midtrain.0.tokens": 40_960,
            "schedule.warmup_tokens": 8192,
            "schedule.mtp_switch_tokens": 40_960,
            "schedule.bias_freeze_tokens": 90_112,
            "loop.eval_bytes": 4000,
            "post": post,
            "post.experts.0.sft.dialogues": 200,  # enough for the format, so that unification has something to teach
            "post.experts.0.sft.epochs": 6.0,
        },
    )
