"""General chat with verifiable instruction constraints: write about a thing, so long, beginning so, in small letters.

A task is made from a text: the oracle writes one, and the constraints are drawn from what is true of it. So every task
can be solved, and the text says something.
"""

from random import Random
from typing import Any

from glm_jax.envs.task import Environment, Episode, Message, Task, Turn, ended, failed, said
from glm_jax.rewards import pathology
from glm_jax.rewards.constraints import CONSTRAINTS, check, letters_absent, lines_of, words_of

TOPICS = ("rain", "snow", "wind", "fire", "sun", "sea", "cat", "dog", "moon", "star", "bird", "boat")
MASS = TOPICS[:4]  # stand well without "the"
DETERMINERS = ("the", "my", "our", "this", "that")
ADJECTIVES = ("red", "cold", "soft", "dark", "white", "warm", "small", "big", "old", "good")
VERBS = ("runs", "sits", "plays", "rests", "waits", "comes", "goes", "falls")
PLACES = ("hill", "road", "wall", "door", "day", "night", "wood", "house")
PREPOSITIONS = ("on", "in", "by", "at", "to")
ADVERBS = ("now", "here", "there", "again")
COMMON = "aeilnorst"  # letters that it takes care to do without

CONTENT = ("start", "end", "contain", "times")
LENGTHS = {1: (4, 6), 2: (4, 7), 3: (5, 8)}  # words of a text of one line


class Dialogue(Environment):
    """One request, one text; as many constraints as the level and one more, the topic not counted."""

    name = "chat"
    levels = (1, 2, 3)

    def task(self, seed: int, level: int) -> Task:
        random = self.random(seed, level)
        topic = random.choice(TOPICS)
        count = "lines" if random.random() < 0.25 else "words"
        text = _text(random, topic, level, count)
        offers = _offers(random, text, topic)
        chosen = [count, random.choice([name for name in CONTENT if name in offers])]
        chosen += random.sample([name for name in offers if name not in chosen], level - 1)
        offers[count] = _length(text, count)
        if "small" in chosen or "capitals" in chosen:
            text = text.lower() if "small" in chosen else text.upper()
        if "exclaim" in chosen:
            text = text[:-1] + "!"
        asked = [("topic", {"word": topic}), *((name, offers[name]) for name in CONSTRAINTS if name in chosen)]
        prompt = " ".join(CONSTRAINTS[name].say.format(**arguments) for name, arguments in asked)
        answer = {"constraints": tuple(asked), "text": text}
        return Task(self.name, count, level, seed, ({"role": "user", "content": prompt},), None, 1, answer)

    def start(self, task: Task) -> Episode:
        return Request(task)

    def solve(self, task: Task, thinking: bool = True) -> list[Message]:
        return self._answer(task, task.answer["text"], thinking)

    def slip(self, task: Task, thinking: bool = True) -> list[Message]:
        """The right plan, and a text with a word less: its length is always asked for."""
        words = task.answer["text"].split(" ")
        words.pop(self.random(task.seed, task.level).randrange(1, len(words) - 1))
        return self._answer(task, " ".join(words), thinking)

    def _answer(self, task: Task, text: str, thinking: bool) -> list[Message]:
        plan = ", ".join(CONSTRAINTS[name].plan.format(**arguments) for name, arguments in task.answer["constraints"])
        return [said(text, plan[0].upper() + plan[1:] + ".", thinking)]


class Request(Episode):
    def reply(self, message: Message) -> Turn:
        reason = pathology.fault(message, share=0.5, repeats=2)
        if reason or message.get("tool_calls"):
            return failed(reason or "malformed")
        content = message["content"].strip()
        if pathology.echoes(content, self.task.messages[-1]["content"]):
            return failed("echo")
        if content[-1] not in ".!?":
            return failed("unfinished")
        return ended(all(check(name, content, **arguments) for name, arguments in self.task.answer["constraints"]))


def _offers(random: Random, text: str, topic: str) -> dict[str, dict[str, Any]]:
    """What can be asked of the text beside its length, with arguments; of its letters' case and end anything can."""
    words = words_of(text)
    inner = sorted({*words[1:-1]} - {topic})
    twice = sorted(word for word in {*words} - {topic} if words.count(word) > 1)
    absent = letters_absent(text, COMMON)
    offers: dict[str, dict[str, Any]] = {"end": {"word": words[-1]}, "no_commas": {}, "exclaim": {}}
    offers[random.choice(["small", "capitals"])] = {}
    if words[0] != topic:
        offers["start"] = {"word": words[0]}
    if inner:
        offers["contain"] = {"word": random.choice(inner)}
    if twice:
        word = random.choice(twice)
        offers["times"] = {"word": word, "count": words.count(word)}
    if absent:
        offers["without"] = {"letter": random.choice(absent)}
    return offers


def _text(random: Random, topic: str, level: int, count: str) -> str:
    """A sentence of so many words, or a few short ones on lines of their own; the topic is the first one's subject."""
    if count == "words":
        return _sentence(random, topic, random.randint(*LENGTHS[level]))
    subjects = [topic, *random.sample([word for word in TOPICS if word != topic], level)]
    length = random.randint(3, 4)
    return "\n".join(_sentence(random, subject, length) for subject in subjects)


def _length(text: str, count: str) -> dict[str, int]:
    lines, words = len(lines_of(text)), len(words_of(text))
    return {"count": words} if count == "words" else {"count": lines, "words": words // lines}


def _sentence(random: Random, subject: str, length: int) -> str:
    """ "Our soft rain comes by the old wall." in `length` words, 3 to 9."""
    adjectives = random.sample(ADJECTIVES, 2)
    tail = [[], [random.choice(ADVERBS)], [random.choice(PREPOSITIONS), "the", random.choice(PLACES)]]
    tail.append([*tail[2][:2], random.choice(adjectives), tail[2][2]])
    end = random.choice([words for words in tail if 1 <= length - 2 - len(words) <= 3])
    front = [random.choice(DETERMINERS), *adjectives][: length - 2 - len(end)]
    if subject in MASS and random.random() < 0.5:  # "Soft rain comes ..."
        front = random.sample(ADJECTIVES, len(front))
    return " ".join([*front, subject, random.choice(VERBS), *end]).capitalize() + "."
