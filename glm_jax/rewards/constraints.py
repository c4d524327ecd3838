"""Verifiable instruction constraints: each is a sentence of the prompt and a function that checks a text.

Words are what stands between blanks, without the punctuation around it; case counts only where it is what is asked.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from glm_jax.config import ConfigError, nearest


@dataclass(frozen=True)
class Constraint:
    say: str  # the instruction, a format string of the arguments
    plan: str  # the same in the few words of a plan
    holds: Callable[..., bool]  # (text, **arguments)


def words_of(text: str) -> list[str]:
    return [word for word in (part.strip(".,!?;:'\"").lower() for part in text.split()) if word]


def lines_of(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.strip()]


def _lines(text: str, count: int, words: int) -> bool:
    lines = lines_of(text)
    return len(lines) == count and all(len(words_of(line)) == words for line in lines)


def _times(text: str, word: str, count: int) -> bool:
    return words_of(text).count(word.lower()) == count


def _contains(text: str, word: str) -> bool:
    return word.lower() in words_of(text)


CONSTRAINTS: dict[str, Constraint] = {
    "topic": Constraint("Write about the {word}.", "about {word}", _contains),
    "words": Constraint("Use {count} words.", "{count} words", lambda text, count: len(words_of(text)) == count),
    "lines": Constraint("Use {count} lines of {words} words.", "{count} lines of {words} words", _lines),
    "start": Constraint("Start with {word}.", "first {word}", lambda text, word: words_of(text)[:1] == [word.lower()]),
    "end": Constraint("End with {word}.", "last {word}", lambda text, word: words_of(text)[-1:] == [word.lower()]),
    "contain": Constraint("Say {word}.", "with {word}", _contains),
    "times": Constraint("Say {word} {count} times.", "{count} times {word}", _times),
    "small": Constraint("Use only small letters.", "all small", lambda text: text.islower()),
    "capitals": Constraint("Use only capitals.", "all capitals", lambda text: text.isupper()),
    "exclaim": Constraint("End with !", "end !", lambda text: text.rstrip().endswith("!")),
    "no_commas": Constraint("Use no commas.", "no commas", lambda text: "," not in text),
    "without": Constraint("Do not use the letter {letter}.", "no {letter}", lambda text, letter: letter not in text.lower()),
}  # fmt: skip


def check(name: str, text: str, **arguments: Any) -> bool:
    """Whether `text` keeps the constraint; an empty text keeps none."""
    if name not in CONSTRAINTS:
        raise ConfigError(f"no constraint {name!r}; {nearest(name, list(CONSTRAINTS))}")
    return bool(text.strip()) and CONSTRAINTS[name].holds(text, **arguments)


def letters_absent(text: str, alphabet: str) -> list[str]:
    """The letters of `alphabet` that `text` does without."""
    return [letter for letter in alphabet if not re.search(letter, text, re.IGNORECASE)]
