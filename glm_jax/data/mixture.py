"""How often a stage reads each document, and in which order.

Shares of the stage's tokens go to the domains; within a domain `bucket_epochs` weigh the quality buckets against each
other and are scaled together until the domain's tokens are reached. 3.2 epochs are three full passes and one over a
sample of a fifth, chosen by hash. Everything is a pure function of the seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from glm_jax.config import ConfigError, Stage, nearest
from glm_jax.data.document import DIALOGUES, DOMAINS, DataError, unit
from glm_jax.data.packing import LOOKAHEAD

LONG_EPOCHS = 2.0  # what a long document counts for in a stage of long documents


@dataclass(frozen=True)
class Pool:
    """What a stage may draw from, in parallel sequences."""

    ids: Sequence[str]
    domains: Sequence[str]
    buckets: Sequence[int]
    tokens: np.ndarray  # int64


def epochs(pool: Pool, stage: Stage, bucket_epochs: Sequence[float]) -> np.ndarray:
    """How many times the stage reads each document, float64: their token-weighted sum fills the stage's rows."""
    weight = np.array([bucket_epochs[bucket] for bucket in pool.buckets], np.float64)
    if stage.long_documents:
        weight *= np.where(pool.tokens >= stage.seq_len / 2, LONG_EPOCHS, 1.0)
    known = (*DOMAINS, *DIALOGUES)
    for name in stage.mixture:
        if name not in known:
            raise ConfigError(f"stage {stage.name}: mixture has the domain {name!r}; {nearest(name, list(known))}")
    domains = np.array(pool.domains)
    available = {name: float((weight * pool.tokens)[domains == name].sum()) for name in known}
    shares = stage.mixture or available
    whole = sum(shares.values())
    needed = -(-stage.tokens // stage.seq_len) * stage.seq_len + LOOKAHEAD
    result = np.zeros(len(weight))
    for name, share in shares.items():
        if share > 0 and available[name] == 0:
            raise DataError(
                f"stage {stage.name}: mixture gives {name!r} {share:g}, but no document of it is left; "
                f"{'set --data.dialogues' if name in DIALOGUES else 'add --data.paths'}, or set it to 0"
            )
        if share > 0:
            chosen = domains == name
            result[chosen] = weight[chosen] * (needed * share / whole / available[name])
    return result


def instances(pool: Pool, wanted: np.ndarray, seed: int, name: str) -> np.ndarray:
    """[instances, 3] int64: (document, pass, tokens) of every reading in the stage `name`, shuffled by `seed`.

    `wanted` epochs are so many whole passes, and for the fraction a sample of each bucket in hash order, whose last
    document is clipped: every bucket has its exact quota of tokens, rounded up.
    """
    full = np.floor(wanted).astype(np.int64)
    fraction = np.round(wanted - full, 9)
    document = np.repeat(np.arange(len(full)), full)
    number = np.arange(len(document)) - np.repeat(np.cumsum(full) - full, full)
    found = [np.stack([document, number, pool.tokens[document]], axis=1)]
    groups: dict[tuple[str, int, float], list[int]] = {}
    for index in np.flatnonzero(fraction).tolist():
        groups.setdefault((pool.domains[index], pool.buckets[index], float(fraction[index])), []).append(index)
    for (_, _, share), members in groups.items():
        members.sort(key=lambda index: unit("sample", seed, name, pool.ids[index]))
        chosen = np.array(members)
        sizes = pool.tokens[chosen]
        left = np.ceil(share * sizes.sum()).astype(np.int64) - (np.cumsum(sizes) - sizes)
        read = np.clip(left, 0, sizes)
        found.append(np.stack([chosen, full[chosen], read], axis=1)[read > 0])
    together = np.concatenate(found).astype(np.int64)
    return together[np.random.Generator(np.random.PCG64(seed)).permutation(len(together))]
