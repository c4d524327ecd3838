"""GLM-4.5 and GLM-4.5-Air as the report gives them (sections 2.1-2.4). What it does not disclose is marked."""

from glm_jax.config import Mesh, Model, Optim, Run, Stage, replace

TRILLION = 10**12


def glm45() -> Run:
    """355B-A32B: 15T general and 7T code-and-reasoning tokens at 4K, then 0.5T + 0.5T at 32K and 0.1T at 128K."""
    pretrain = (
        # the shares are ours: the report gives none
        _stage("stage1", 15 * TRILLION, 4096, 1e4, {"general": 0.8, "code": 0.15, "math": 0.05}),
        _stage("stage2", 7 * TRILLION, 4096, 1e4, {"general": 0.3, "code": 0.5, "math": 0.2}),
    )
    midtrain = (
        _stage("repositories", TRILLION // 2, 32_768, 1e6, {"code": 1.0}, midtrain=True),
        _stage("reasoning", TRILLION // 2, 32_768, 1e6, {"math": 0.7, "code": 0.3}, midtrain=True),
        _stage("long_context", TRILLION // 10, 131_072, 1e6, {"general": 0.5, "code": 0.5}, midtrain=True),
    )
    return Run(
        name="glm45",
        model=Model(),
        pretrain=pretrain,
        midtrain=midtrain,
        optim=Optim(ns_polish=2),  # the report's five steps alone leave an update RMS of 0.18 and not its 0.2
        mesh=Mesh(data=1, fsdp=-1, expert=8),
    )


def air() -> Run:
    """106B-A12B: narrower, half as deep, no QK-norm, routed weights not scaled."""
    return replace(
        glm45(),
        **{
            "name": "air",
            "model.D": 4096,
            "model.L": 46,
            "model.dense_layers": 1,
            "model.F": 10_944,
            "model.M": 1408,
            "model.E": 128,
            "model.qk_norm": False,
            "model.routed_scale": 1.0,
        },
    )


def glm45_4k() -> Run:
    """Pre-training of `glm45` alone: rows of 4,096 at the base of RoPE that they are trained with."""
    return _short(glm45())


def air_4k() -> Run:
    """The same of `air`."""
    return _short(air())


def _short(run: Run) -> Run:
    first = run.pretrain[0]
    changes = {"midtrain": (), "model.rope_theta": first.rope_theta, "model.max_positions": first.seq_len}
    return replace(run, **changes, name=f"{run.name}_4k")


def _stage(
    name: str, tokens: int, seq_len: int, theta: float, mixture: dict[str, float], midtrain: bool = False
) -> Stage:
    return Stage(
        name=name, tokens=tokens, seq_len=seq_len, rope_theta=theta, microbatch_rows=2**21 // seq_len, mixture=mixture,
        packing="best_fit" if midtrain else "truncate", isolate=midtrain, long_documents=midtrain,
    )  # fmt: skip
