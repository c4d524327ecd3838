"""Procedural reasoning tasks of reasoning-gym: sums, spelling backward, counting letters; scored by its own rules.

The question is reasoning-gym's, word for word. The oracle writes its steps in a regular form that a small model can
learn: every intermediate result stands on the page.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

from glm_jax.envs.task import Environment, Episode, Message, Task, Turn, ended, failed, said
from glm_jax.rewards import pathology


@dataclass(frozen=True)
class Kind:
    dataset: str  # reasoning-gym's name
    levels: dict[int, dict[str, Any]]  # level -> reasoning-gym's configuration
    steps: Callable[[dict[str, Any]], str]  # an entry's metadata -> what the oracle writes while thinking
    slip: Callable[[dict[str, Any]], str]  # and a wrong conclusion from it


def _totals(metadata: dict[str, Any]) -> list[int]:
    """The first number, and the total after every step."""
    first, *rest = metadata["expression"].split()
    signed = (int(term) if sign == "+" else -int(term) for sign, term in zip(rest[::2], rest[1::2], strict=True))
    return list(accumulate([int(first), *signed]))


def _sum_steps(metadata: dict[str, Any]) -> str:
    """Each term is counted up or down by ones: what is left of it, and the total so far."""
    lines, rest = [], metadata["expression"].split()[1:]
    for total, sign, term in zip(_totals(metadata), rest[::2], rest[1::2], strict=False):
        lines.append(f"{total} {sign} {term}")
        step = 1 if sign == "+" else -1
        lines += [f"{left} {total + step * (int(term) - left)}" for left in range(int(term), -1, -1)]
    return "\n".join(lines)


def _sum_slip(metadata: dict[str, Any]) -> str:
    """The total before the last step, or one more where that is the same."""
    *_, before, total = _totals(metadata)
    return str(before if before != total else total + 1)


def _spelling_steps(metadata: dict[str, Any]) -> str:
    return " ".join(metadata["word"]) + "\n" + " ".join(metadata["word"][::-1])


def _spelling_slip(metadata: dict[str, Any]) -> str:
    """The last letter is lost."""
    return metadata["word"][:0:-1]


def _counting_steps(metadata: dict[str, Any]) -> str:
    """Each word spelled on its line, the running count behind every hit."""
    count, lines = 0, []
    for word in metadata["span"]:
        line = []
        for letter in word:
            line.append(letter)
            if letter.lower() == metadata["target_letter"]:
                count += 1
                line.append(str(count))
        lines.append(" ".join(line))
    return "\n".join(lines)


def _counting_slip(metadata: dict[str, Any]) -> str:
    """The last hit is lost, or one seen where there is none."""
    count = "".join(metadata["span"]).lower().count(metadata["target_letter"])
    return str(count - 1 if count else 1)


KINDS: dict[str, Kind] = {
    "sum": Kind(
        "chain_sum",
        {
            1: {"min_terms": 2, "max_terms": 3, "max_digits": 1},
            2: {"min_terms": 3, "max_terms": 4, "max_digits": 1},
            3: {"min_terms": 5, "max_terms": 5, "max_digits": 1},
        },
        _sum_steps,
        _sum_slip,
    ),
    "spell": Kind(
        "spell_backward",
        {
            3: {"min_word_len": 3, "max_word_len": 4},  # the letters of every token by heart: the hardest of the three
        },
        _spelling_steps,
        _spelling_slip,
    ),
    "count": Kind(
        "letter_counting",
        {
            1: {"min_words": 1, "max_words": 2},
            2: {"min_words": 3, "max_words": 3},
            3: {"min_words": 4, "max_words": 5},
        },
        _counting_steps,
        _counting_slip,
    ),
}


@cache
def _dataset(kind: str, level: int) -> Any:
    """Entry i of this dataset is entry 0 of the dataset of seed i; reading its word list once is what saves time."""
    import reasoning_gym  # brings all its 100 generators: a second that only who makes tasks should wait

    config = KINDS[kind].levels[level]
    return reasoning_gym.create_dataset(KINDS[kind].dataset, seed=0, size=2**31, **config)


def _plain(entry: dict[str, Any]) -> bool:
    """Letters are counted in a story with a few French words and numbers, which are left out."""
    return entry["question"].isascii() and "".join(entry["metadata"].get("span", "a")).isalpha()


class Reasoning(Environment):
    """One user turn, one answer."""

    name = "reasoning"
    levels = (1, 2, 3)

    def task(self, seed: int, level: int) -> Task:
        random = self.random(seed, level)
        kind = random.choice(sorted(name for name, kind in KINDS.items() if level in kind.levels))
        entry = _dataset(kind, level)[random.getrandbits(31)]
        while not _plain(entry):
            entry = _dataset(kind, level)[random.getrandbits(31)]
        question = {"role": "user", "content": entry["question"].strip()}
        return Task(self.name, kind, level, seed, (question,), None, max_turns=1, answer=entry)

    def start(self, task: Task) -> Episode:
        return Answer(task)

    def solve(self, task: Task, thinking: bool = True) -> list[Message]:
        return [said(task.answer["answer"], KINDS[task.kind].steps(task.answer["metadata"]), thinking)]

    def slip(self, task: Task, thinking: bool = True) -> list[Message]:
        """The right steps and the wrong conclusion."""
        kind, metadata = KINDS[task.kind], task.answer["metadata"]
        return [said(kind.slip(metadata), kind.steps(metadata), thinking)]


class Answer(Episode):
    def reply(self, message: Message) -> Turn:
        reason = pathology.fault(message)
        if reason or message.get("tool_calls"):
            return failed(reason or "malformed")
        content = message["content"].strip()
        bare = content.isascii() and not any(c.isspace() or c in ",_" for c in content)  # "1,2" is a list, not 12
        dataset = _dataset(self.task.kind, self.task.level)
        return ended(bare and dataset.score_answer(content, self.task.answer) == 1.0)
