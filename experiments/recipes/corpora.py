"""Runs whose data is made in the ways that `tiny` does not take."""

from experiments.recipes.tiny import tiny
from glm_jax.config import Run, Scoring, replace


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
