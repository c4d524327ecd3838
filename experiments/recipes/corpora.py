"""What the data pipeline can do beyond `tiny`'s: the report's forms of rows, in miniature and at full length."""

from experiments.recipes.tiny import tiny
from glm_jax.config import Run, replace


def mini() -> Run:
    """`tiny` on rows in ArrayRecord shards: the documents that come with Python, no network."""
    return replace(tiny(), **{"name": "mini", "data.shard_tokens": 1_000_000})
