"""Synthetic reasoning for mid-training (report, section 2.3), in miniature: worked exercises with verified answers.

Two kinds, every line of which can be checked: chains of one-digit sums with each intermediate result, and words spelled
letter by letter. They are the knowledge that a tokenizer and a few million real tokens hide from a small model; what to
do with it, it learns in post-training.
"""

import re
from collections.abc import Iterator, Sequence
from random import Random

from glm_jax.data.document import Document

_WORD = re.compile(r"\b[A-Za-z]{2,10}\b")
_EXERCISES = 24  # of a document
_TERMS = (2, 6)  # of a chain
_WORDS = (2, 5)  # of a line that is spelled


def exercises(documents: Sequence[Document], count: int, seed: int) -> Iterator[Document]:
    """`count` documents of domain "reasoning", half of them sums; the words are those of the domain "general"."""
    words = [word for d in documents if d.domain == "general" for word in _WORD.findall(d.text)]
    for number in range(count):
        random = Random(f"exercises {seed} {number}")
        sums = number % 2 == 0 or not words
        name = f"{'sums' if sums else 'letters'}/{number}"
        text = "\n".join(_sum(random) if sums else _letters(random, words) for _ in range(_EXERCISES))
        yield Document.of(text, domain="reasoning", source="synthetic", path=name, group=f"synthetic:{name}")


def _sum(random: Random) -> str:
    """A chain of one-digit terms, then one line for each step."""
    total = random.randrange(10)
    chain, steps = str(total), []
    for _ in range(random.randint(*_TERMS) - 1):
        sign, term = random.choice("+-"), random.randrange(10)
        before, total = total, total + term if sign == "+" else total - term
        chain += f" {sign} {term}"
        steps.append(f"{before} {sign} {term} = {total}")
    return "\n".join([chain, *steps, ""])


def _letters(random: Random, words: Sequence[str]) -> str:
    """A few words that stand together in a text, then each of them spelled on its line."""
    count = random.randint(*_WORDS)
    first = random.randrange(max(1, len(words) - count))
    chosen = words[first : first + count]
    return "\n".join([" ".join(chosen), *(" ".join(word) for word in chosen), ""])
