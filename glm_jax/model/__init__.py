"""The model: `forward` for trainer and sampler, `GLM` its parameters, `GLMModule` the Flax rim."""

from glm_jax.model.cache import Cache
from glm_jax.model.cache import empty as empty_cache
from glm_jax.model.flax_module import GLMModule
from glm_jax.model.glm import (
    GLM,
    LAYER,
    Aux,
    forward,
    head,
    hidden,
    init,
    output_matrix,
    router_bias,
    router_bias_spec,
    specs,
    unstack,
)

__all__ = [
    "GLM", "LAYER", "Aux", "Cache", "GLMModule", "empty_cache", "forward", "head", "hidden", "init", "output_matrix", "router_bias",
    "router_bias_spec", "specs", "unstack",
]  # fmt: skip
