"""Which language a page is written in, by one to four neighbouring letters: a classifier of our own, in a file beside this one.

`experiments.languages` trains it on the translations of programs that a Debian machine has, and measures it on translated
manual pages (30 languages). A page in none of them, or without text, is "unknown".
"""

import functools
import gzip
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from glm_jax.data import features
from glm_jax.data.classifier import Classifier, train
from glm_jax.data.document import unit

UNKNOWN = "unknown"
MODEL = Path(__file__).with_name("languages.npz")
_BITS = 14
_LEAST = -5.0  # log-odds of the best language, below which a page is in none
_FEWEST = 4  # different n-grams of a text that is in any language
_MESSAGES = 3  # of a catalog that make one example
_MARKUP = re.compile(r"<[^>]{1,80}>|%[-+ #0-9.*$]*[a-zA-Z]+|\{[^}]{0,40}\}|https?://\S+|\S+@\S+|&(?=\w)|_(?=\w)")
_ROFF = re.compile(r"^[.'].*$|\\f[A-Z]|\\f\(..|\\[-&|^:%c ]|\\\(..|\\\[[^\]]*\]|\\[es]\S?", re.MULTILINE)


@functools.cache
def _model() -> Classifier:
    return Classifier.load(MODEL)


def identify(texts: Sequence[str], model: Classifier | None = None) -> list[str]:
    """ISO 639 code of each text's language; "zh" is Chinese in either script."""
    model = model or _model()
    bags = model.bags(texts)
    scores = model.scores(bags)
    known = (scores.max(axis=1, initial=-np.inf) > _LEAST) & (np.diff(bags.offsets) >= _FEWEST)
    best = scores.argmax(axis=1).tolist()
    return [model.classes[index] if sure else UNKNOWN for index, sure in zip(best, known.tolist(), strict=True)]


def learn(examples: Sequence[tuple[str, str]]) -> Classifier:
    """A model from (language, text) pairs."""
    classes = tuple(sorted({language for language, _ in examples}))
    place = {name: number for number, name in enumerate(classes)}
    targets = np.zeros((len(examples), len(classes)), np.float32)
    for row, (language, _) in enumerate(examples):
        targets[row, place[language]] = 1
    bags = features.of_characters([text for _, text in examples], _BITS)
    return train(bags, targets, classes, reads="characters", bits=_BITS, epochs=6)


def catalogs(folder: Path, languages: Sequence[str], most: int) -> Iterator[tuple[str, str]]:
    """(language, text) from gettext's catalogs LANGUAGE/LC_MESSAGES/*.mo below `folder`, at most `most` a language:
    a few messages each. English is what was translated."""
    found: dict[str, list[str]] = {language: [] for language in languages}
    for path in sorted(folder.glob("*/LC_MESSAGES/*.mo")):
        language = re.split("[_@.]", path.parts[-3])[0]
        if language not in found or "@" in path.parts[-3]:
            continue
        messages = list(_messages(path))
        found[language] += _joined([translated for _, translated in messages])
        if language == "de":
            found["en"] += _joined([original for original, _ in messages])
    for language, texts in found.items():
        distinct = sorted(set(texts), key=lambda text: unit("catalog", text))
        for text in distinct[:most]:
            yield language, text


def _joined(messages: list[str]) -> list[str]:
    texts = [_MARKUP.sub("", message).strip() for message in messages if len(message) > 12]
    return ["\n".join(texts[begin : begin + _MESSAGES]) for begin in range(0, len(texts), _MESSAGES)]


def _messages(path: Path) -> Iterator[tuple[str, str]]:
    """(original, translation) of a catalog that is in UTF-8."""
    data = path.read_bytes()
    order = "<" if data[:4] == b"\xde\x12\x04\x95" else ">"
    count, originals, translations = struct.unpack_from(order + "3I", data, 8)
    for index in range(count):
        pair = []
        for table in (originals, translations):
            length, begin = struct.unpack_from(order + "2I", data, table + 8 * index)
            pair.append(data[begin : begin + length].split(b"\0")[0])
        if pair[0] and pair[0] != pair[1]:
            try:
                yield pair[0].decode(), pair[1].decode()
            except UnicodeDecodeError:
                return


def manuals(folder: Path, languages: Sequence[str], most: int) -> Iterator[tuple[str, str]]:
    """(language, text) of manual pages below `folder`: LANGUAGE/man1/*, of English man1/*. What a translation left in
    English, line by line as in the original, is taken out."""
    for language in languages:
        roots = [folder] if language == "en" else sorted({*folder.glob(language), *folder.glob(f"{language}_*")})
        pages = [path for root in roots for path in root.glob("man[1-8]/*.gz")]
        taken = 0
        for path in sorted(pages, key=lambda path: (unit("manual", path.name), path)):
            lines = _manual(path)
            original = folder / path.parts[-2] / path.name
            if language != "en" and original.is_file():
                english = set(_manual(original))
                lines = [line for line in lines if line not in english]
            text = "\n".join(lines)
            if len(text) >= 300:
                yield language, text
                taken += 1
            if taken == most:
                break


def _manual(path: Path) -> list[str]:
    try:
        text = gzip.decompress(path.read_bytes()).decode()
    except (OSError, UnicodeDecodeError):
        return []
    return [line for line in _ROFF.sub("", text).splitlines() if line.strip()]
