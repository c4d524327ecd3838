"""How often a stage reads each document, and in which order.

Shares of the stage's tokens go to the domains; within a domain `bucket_epochs` weigh the quality buckets against each
other and are scaled together until the domain's tokens are reached. 3.2 epochs are three full passes and one over a
sample of a fifth, chosen by hash. Everything is a pure function of the seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from glm_jax.config import ConfigError, Stage, nearest
from glm_jax.data.document import DOMAINS, DataError, unit

LONG_EPOCHS = 2.0  # what a long document counts for in a stage of long documents


@dataclass(frozen=True)
class Pool:
    """What a stage may draw from, in parallel sequences."""

    ids: Sequence[str]
    domains: Sequence[str]
    buckets: Sequence[int]
    tokens: np.ndarray  # int64


def epochs(pool: Pool, stage: Stage, bucket_epochs: Sequence[float]) -> np.ndarray:
    """How many times the stage reads each document, float64: their token-weighted sum is the stage's tokens."""
    weight = np.array([bucket_epochs[bucket] for bucket in pool.buckets], np.float64)
    if stage.long_documents:
        weight *= np.where(pool.tokens >= stage.seq_len / 2, LONG_EPOCHS, 1.0)
    for name in stage.mixture:
        if name not in DOMAINS:
            raise ConfigError(f"stage {stage.name}: mixture has the domain {name!r}; {nearest(name, list(DOMAINS))}")
    domains = np.array(pool.domains)
    available = {name: float((weight * pool.tokens)[domains == name].sum()) for name in DOMAINS}
    shares = stage.mixture or available
    whole = sum(shares.values())
    result = np.zeros(len(weight))
    for name, share in shares.items():
        if share > 0 and available[name] == 0:
            raise DataError(f"stage {stage.name}: mixture gives {name!r} {share:g}, but no document of it is left; add --data.paths or set it to 0")
        if share > 0:
            chosen = domains == name
            result[chosen] = weight[chosen] * (stage.tokens * share / whole / available[name])
    return result


def passes(pool: Pool, wanted: np.ndarray, *keys: object) -> np.ndarray:
    """Whole passes over each document, int64. In each bucket a sample, in hash order, makes up the fraction, to at least its tokens."""
    full = np.floor(wanted).astype(np.int64)
    fraction = np.round(wanted - full, 9)
    groups: dict[tuple[str, int, float], list[int]] = {}
    for index in np.flatnonzero(fraction):
        groups.setdefault((pool.domains[index], pool.buckets[index], float(fraction[index])), []).append(int(index))
    for (_, _, share), members in groups.items():
        members.sort(key=lambda index: unit("sample", *keys, pool.ids[index]))
        sizes = pool.tokens[members]
        before = np.cumsum(sizes) - sizes
        full[np.array(members)[before < share * sizes.sum()]] += 1
    return full


def order(counts: np.ndarray, seed: int) -> np.ndarray:
    """[instances, 2] int64: (document, pass) of every pass, shuffled by `seed` alone."""
    document = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    shuffled = np.random.Generator(np.random.PCG64(seed)).permutation(len(document))
    return np.stack([document, number], axis=1)[shuffled].astype(np.int64)
