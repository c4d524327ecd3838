"""Synthetic reasoning: every line is true, and the same seed writes the same documents."""

import re

import pytest

from glm_jax.data.document import Document
from glm_jax.data.synthetic import exercises

PROSE = Document.of(
    "The quick brown fox of this module jumps over lazy dogs", domain="general", source="t", path="p", group="g"
)


@pytest.fixture(scope="module")
def written() -> list[Document]:
    return list(exercises([PROSE], 40, seed=3))


def test_every_sum_is_right_and_follows_from_the_one_before(written):
    checked = 0
    for document in (d for d in written if "sums" in d.path):
        for exercise in document.text.strip().split("\n\n"):
            chain, *steps = exercise.split("\n")
            total = chain.split()[0]
            for step in steps:
                begin, said = step.split(" = ")
                assert begin.split()[0] == total and eval(begin) == int(said)
                total, checked = said, checked + 1
            assert eval(chain) == int(total)
    assert checked > 500


def test_every_word_is_spelled_and_stands_in_the_prose(written):
    for document in (d for d in written if "letters" in d.path):
        for exercise in document.text.strip().split("\n\n"):
            words, *spelled = exercise.split("\n")
            assert words in re.sub(r"\b\w\b", "", PROSE.text) and words.split() == [s.replace(" ", "") for s in spelled]


def test_same_seed_same_documents_and_no_words_only_sums(written):
    assert list(exercises([PROSE], 40, seed=3)) == written
    assert {d.id for d in exercises([PROSE], 40, seed=4)}.isdisjoint(d.id for d in written)
    assert all("sums" in d.path for d in exercises([], 6, seed=3))
    assert len({d.group for d in written}) == 40 and {d.domain for d in written} == {"reasoning"}
