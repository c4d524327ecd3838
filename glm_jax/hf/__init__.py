"""Published checkpoints of GLM-4.5, 4.6 and 4.7 in Hugging Face's form: `load` and `save`."""

from glm_jax.hf.read import Checkpoint, load
from glm_jax.hf.write import save

__all__ = ["Checkpoint", "load", "save"]
