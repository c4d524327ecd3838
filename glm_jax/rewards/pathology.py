"""What makes an answer unfit whatever it says: broken format, emptiness, rambling, repetition, mixed scripts, echo.

GLM-4.5's report, section 3.5, penalises these in RL because no check of the answer itself sees them. Here
each costs the whole reward, and its name is the reason that is counted.
"""

import re
import unicodedata
from collections import Counter
from typing import Any

from glm_jax.text.tokenizer import SPECIAL_TOKENS

MOST_CHARACTERS = 2000  # of reasoning and content together
LONGEST_UNIT = 16  # words of a repeated phrase
_TAG = re.compile("|".join(re.escape(name) for name in SPECIAL_TOKENS))
_EAST_ASIAN = {"CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "FULLWIDTH", "HALFWIDTH", "IDEOGRAPHIC"}


def fault(message: dict[str, Any], *, share: float = 0.7, repeats: int = 5) -> str | None:
    """The first pathology of an assistant turn as `text.parse` returns it, or None.

    `share` and `repeats` bound repetition in the content; the reasoning, where sums and spellings repeat
    themselves for good reasons, keeps the loose defaults of `repetitive`.
    """
    content, reasoning = message.get("content") or "", message.get("reasoning_content") or ""
    if message.get("status", "ok") != "ok" or _TAG.search(reasoning + content):
        return "malformed"
    if not content.strip() and not message.get("tool_calls"):
        return "empty"
    if len(content) + len(reasoning) > MOST_CHARACTERS:
        return "overlong"
    if repetitive(content, share=share, repeats=repeats) or repetitive(reasoning):
        return "repetition"
    return "scripts" if mixes_scripts(reasoning + content) else None


def repetitive(text: str, share: float = 0.7, repeats: int = 5, least: int = 10) -> bool:
    """One word makes up more than `share` of `least` words or more, or a phrase stands `repeats` times in a row."""
    words = [word.strip(".,!?;:").lower() for word in text.split()]
    if len(words) >= least and Counter(words).most_common(1)[0][1] > share * len(words):
        return True
    for size in range(1, min(LONGEST_UNIT, len(words) // repeats) + 1):
        run = 0  # words in a row that equal the word `size` before
        for before, word in zip(words, words[size:], strict=False):
            run = run + 1 if word == before else 0
            if run >= size * (repeats - 1):
                return True
    return False


def mixes_scripts(text: str) -> bool:
    """Letters of more than one script (Chinese and Japanese count as one), or bytes that are no text at all."""
    if text.isascii():
        return False
    return "\ufffd" in text or len({_script(letter) for letter in text if letter.isalpha()}) > 1


def _script(letter: str) -> str:
    name = unicodedata.name(letter, "UNNAMED").split()[0].split("-")[0]
    return "CJK" if name in _EAST_ASIAN else name


def echoes(text: str, prompt: str, words: int = 4) -> bool:
    """So many consecutive words of the prompt stand in the text too."""
    said, asked = (re.findall(r"\w+", part.lower()) for part in (text, prompt))
    grams = {tuple(asked[i : i + words]) for i in range(len(asked) - words + 1)}
    return any(tuple(said[i : i + words]) in grams for i in range(len(said) - words + 1))
