"""SemDedup: pages that say the same by one template, which MinHash cannot see (report, section 2.2; Abbas et al. 2023).

Pages are weighted word counts, without the words of one or two pages: the names that a template was filled with say
nothing about likeness. Latent semantic analysis and k-means make clusters of manageable size; inside one a page goes if
it is too close to another that is farther from the centre. How close is no number that carries over from one way of
embedding to another: it follows from the share of pages to keep.
"""

import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from glm_jax.data.dedup import WORD, Removal
from glm_jax.data.document import Document
from glm_jax.data.stages import Tokens

REASON = "says the same"
_FEATURES = 1 << 18  # buckets that words are hashed into
_DIMENSIONS = 128
_FEWEST = 3  # pages that must have a word for it to say something about likeness
_CHARS = 20_000  # of a page: its beginning stands for it
_PASSES = 8  # of k-means


def templated(pages: Sequence[Document], words: Tokens, counts: np.ndarray, kept: float) -> dict[int, Removal]:
    """The share 1 - `kept` of the pages that are closest to others, by their place. `words` and `counts`: of each page."""
    count = round((1 - kept) * len(pages))
    if count == 0:
        return {}
    closeness, other = closest(word_weights(words, counts))
    going = np.argsort(-closeness, kind="stable")[:count]
    going = going[closeness[going] > 0].tolist()
    gone, removed = set(going), {}
    for place in going:
        first = int(other[place])
        while first in gone:  # farther from the centre each time, so it ends
            first = int(other[first])
        removed[place] = Removal.of(pages[place], REASON, pages[first], float(closeness[place]))
    return removed


def closest(weights: Any) -> tuple[np.ndarray, np.ndarray]:
    """(cosine to, index of) the closest page of the same cluster that is farther from the centre; 0 where there is none."""
    vectors = principal(weights)
    centre_of, centres = k_means(vectors, max(1, round(len(vectors) ** 0.5 / 2)))
    closeness, other = np.zeros(len(vectors), np.float32), np.arange(len(vectors))
    for number in range(len(centres)):
        members = np.flatnonzero(centre_of == number)
        if len(members) < 2:
            continue
        members = members[np.argsort(vectors[members] @ centres[number], kind="stable")]
        cosine = np.tril((weights[members] @ weights[members].T).toarray(), -1)
        best = cosine.argmax(axis=1)
        closeness[members] = cosine[np.arange(len(members)), best]
        other[members] = members[best]
    return closeness, other


def principal(weights: Any) -> np.ndarray:
    """[pages, dimensions] float32 of unit length: sparse `weights` on the directions in which they vary most, by a
    randomised decomposition (Halko et al. 2011) with a fixed seed."""
    random = np.random.Generator(np.random.PCG64(7))
    width = min(_DIMENSIONS, *weights.shape)
    basis = random.standard_normal((weights.shape[1], min(width + 16, weights.shape[1])), dtype=np.float32)
    for _ in range(3):
        basis, _ = np.linalg.qr(weights.T @ (weights @ basis))
    left, values, _ = np.linalg.svd(weights @ basis, full_matrices=False)
    return _unit((left * values)[:, :width])


def k_means(vectors: np.ndarray, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """(cluster of each vector, centres of unit length) of spherical k-means from evenly drawn vectors."""
    chosen = np.random.Generator(np.random.PCG64(11)).choice(len(vectors), clusters, replace=False)
    centres = vectors[np.sort(chosen)]
    for _ in range(_PASSES):
        centre_of = (vectors @ centres.T).argmax(axis=1)
        sums = np.zeros_like(centres)
        np.add.at(sums, centre_of, vectors)
        centres = np.where(np.abs(sums).sum(axis=1, keepdims=True) > 0, _unit(sums), centres)
    return (vectors @ centres.T).argmax(axis=1), centres


def word_counts(text: str) -> tuple[np.ndarray, np.ndarray]:
    """(int32 hash, float32 count) of each distinct word of a page's beginning."""
    found = Counter(WORD.findall(text[:_CHARS].lower()))
    hashed = np.fromiter((zlib.crc32(word.encode()) % _FEATURES for word in found), np.int32, len(found))
    return hashed, np.fromiter(found.values(), np.float32, len(found))


def word_weights(words: Tokens, counts: np.ndarray) -> Any:
    """Sparse [pages, words] float32: (1 + log count) x inverse document frequency, rows of unit length. `counts` are those
    of `words.flat`."""
    from scipy import sparse  # here, because scripts answer --help without it

    rows = np.repeat(np.arange(len(words)), words.lengths)
    table = sparse.csr_array((1 + np.log(counts), (rows, words.flat)), shape=(len(words), _FEATURES), dtype=np.float32)
    pages = np.bincount(table.indices, minlength=_FEATURES)
    common = np.flatnonzero(pages >= _FEWEST)
    weighted = table[:, common] * np.log(len(words) / pages[common]).astype(np.float32)
    length = np.sqrt(weighted.multiply(weighted).sum(axis=1))
    return (weighted / np.maximum(length, 1e-6)[:, None]).tocsr()


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)
