"""The Flax rim: GLM-4.5 as one `nn.Module`, for whoever expects `init` and `apply`. Bit-equal to the functions."""

from typing import Any

import flax.linen as nn
import jax
from jax import Array

from glm_jax.config import Model
from glm_jax.model import glm


class GLMModule(nn.Module):
    """Variables: "params"/"glm" holds the `GLM` tree, "router"/"bias_LE" the balance bias, outside every gradient."""

    cfg: Model

    @nn.compact
    def __call__(self, ids_BT: Array, **places: Any) -> tuple[Array, glm.Aux]:
        """`glm.forward` on this module's variables."""
        params = self.param("glm", lambda key: glm.init(self.cfg, key)[0])
        bias_LE = self.variable("router", "bias_LE", lambda: glm.router_bias(self.cfg))
        return glm.forward(self.cfg, params, jax.lax.stop_gradient(bias_LE.value), ids_BT, **places)
