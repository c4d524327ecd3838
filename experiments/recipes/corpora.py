"""What the data pipeline can do beyond `tiny`'s: the report's forms of rows, in miniature and at full length."""

from experiments.recipes.tiny import tiny
from glm_jax.config import Run, replace


def mini() -> Run:
    """`tiny` on rows in ArrayRecord shards, without templated pages: the documents that come with Python, no network."""
    changes = {"minhash": (20, 6), "semantic_kept": 0.92, "removals": True, "shard_tokens": 1_000_000}
    return replace(tiny(), **{"name": "mini", **{f"data.{name}": value for name, value in changes.items()}})
