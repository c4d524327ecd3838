"""What a run is made of: frozen dataclasses, and four functions over them (`replace`, `grid`, `fingerprint`, `diff`).

`__post_init__` checks and never sets; what follows from other fields is a property. The defaults are
GLM-4.5's where the report gives them (spec sections 1-4); recipes (`experiments/recipes`) change them.
Nothing here imports jax, so reading or printing a configuration costs nothing.
"""

from glm_jax.config.functions import ConfigError, canonical, diff, fingerprint, flatten, grid, nearest, replace
from glm_jax.config.posttrain import GRPO, SFT, Evaluation, Expert, Posttrain, Unify
from glm_jax.config.pretrain import Data, DType, Loop, Loss, Mesh, Model, Optim, Schedule, Scoring, Stage
from glm_jax.config.run import Run, from_canonical

__all__ = [
    "GRPO",
    "SFT",
    "ConfigError",
    "DType",
    "Data",
    "Evaluation",
    "Expert",
    "Loop",
    "Loss",
    "Mesh",
    "Model",
    "Optim",
    "Posttrain",
    "Run",
    "Schedule",
    "Scoring",
    "Stage",
    "Unify",
    "canonical",
    "diff",
    "fingerprint",
    "flatten",
    "from_canonical",
    "grid",
    "nearest",
    "replace",
]
