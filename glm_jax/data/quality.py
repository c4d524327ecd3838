"""A transparent quality score, its rank within a domain, and buckets of equal size (report 2.2; spec section 5).

The report's scorers are trained models. Here the score is the mean of named signals in [0, 1] that one can read off
a document, so that every bucket can be explained; the pipeline from score to buckets to epochs is the same.
"""

import dataclasses
import re
import zlib
from collections import defaultdict

import numpy as np

from glm_jax.data.document import Document

_COMMON_WORDS = """
    the of and a to in is that it for as with be are on this by or an not from at which if when can have has was were
    will would should may must there their then than these those into only also all any each such but so you we
"""
_FUNCTION_WORDS = frozenset(_COMMON_WORDS.split())
_WORD = re.compile(r"[^\W\d_]+")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_COMMENT = re.compile(r'#[^\n]*|"""[\s\S]*?"""|//[^\n]*|/\*[\s\S]*?\*/')
_LATEX = re.compile(r"\\[A-Za-z]+|:math:|[_^{}$]")


def signals(document: Document) -> dict[str, float]:
    """The named signals of a document, each in [0, 1], more is better."""
    return (_code_signals if document.domain == "code" else _text_signals)(document)


def score(document: Document) -> float:
    """Mean of the signals."""
    values = signals(document).values()
    return sum(values) / len(values)


def with_buckets(documents: list[Document], scores: np.ndarray, buckets: int) -> list[Document]:
    """The documents with buckets: by rank of the `scores` within the domain, each bucket an equal share of its bytes."""
    ranked: dict[str, list[tuple[float, str, int]]] = defaultdict(list)
    for index, document in enumerate(documents):
        ranked[document.domain].append((float(scores[index]), document.id, index))
    result = list(documents)
    for entries in ranked.values():
        total = sum(documents[index].size for _, _, index in entries)
        below = 0
        for _, _, index in sorted(entries):
            size = documents[index].size
            middle = (below + size / 2) / total
            result[index] = dataclasses.replace(documents[index], bucket=min(int(middle * buckets), buckets - 1))
            below += size
    return result


def _ramp(value: float, low: float, high: float) -> float:
    return min(max((value - low) / (high - low), 0.0), 1.0)


def _variety(text: str) -> float:
    """How little the text repeats itself: tables and boilerplate compress far better than prose."""
    head = text[:8192].encode()
    return _ramp(len(zlib.compress(head, 1)) / len(head), 0.15, 0.4)


def _text_signals(document: Document) -> dict[str, float]:
    text = document.text
    words = _WORD.findall(text.lower())
    count = max(len(words), 1)
    found = {
        "prose": _ramp(sum(word in _FUNCTION_WORDS for word in words) / count, 0.05, 0.35),
        "letters": _ramp(sum(map(len, words)) / len(text), 0.35, 0.75),
        "variety": _variety(text),
        "length": _ramp(count, 30, 400),
    }
    if document.domain == "math":
        found["formulas"] = _ramp(len(_LATEX.findall(text)) / count, 0.0, 0.2)
    return found


def _code_signals(document: Document) -> dict[str, float]:
    text = document.text
    names = _NAME.findall(text)
    comments = sum(len(found) for found in _COMMENT.findall(text))
    lines = [line for line in text.splitlines() if line.strip()]
    return {
        "explained": _ramp(comments / len(text), 0.0, 0.25),
        "names": _ramp(sum(map(len, names)) / max(len(names), 1), 2.5, 6.0),
        "variety": _variety(text),
        "line length": 1 - _ramp(len(text) / max(len(lines), 1), 45, 80),
        "distinct lines": _ramp(len(set(lines)) / max(len(lines), 1), 0.6, 0.95),
    }
