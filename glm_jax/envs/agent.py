"""Multi-turn tool use over a store of boxes: the second call depends on the first one's result.

A box answers only to who has found it: its number has to come out of an earlier turn's observation, so guessing is
of no use. What changes the store is scored by its terminal state, a question by the number that the tools returned.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from glm_jax.envs.task import Environment, Episode, Message, Task, Turn, ended, failed, said
from glm_jax.rewards import pathology

ITEMS: tuple[str, ...] = (
    "cup", "pen", "hat", "key", "map", "bag", "cat", "dog", "car", "book",
    "lamp", "coin", "ring", "ball", "fish", "bird", "bell", "card", "rope", "rock",
    "milk", "shoe", "coat", "boat", "drum", "flag", "cake", "corn", "rose", "seed",
    "soap", "comb", "fork", "bowl", "doll", "kite", "nail", "salt", "tape", "wire",
)  # fmt: skip
BOXES = range(10, 100)
MOST_GUESSED = 6
MOST_CALLS = 8  # in one turn
MOST_WORDS = 8  # of the last turn after a change
SPARE_TURNS = 2  # beyond the oracle's


def _tool(name: str, description: str, **parameters: str) -> dict[str, Any]:
    """As short as a schema can be, for it stands in every prompt; every parameter is required."""
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    return {"name": name, "description": description, "parameters": {"type": "object", "properties": properties}}


TOOLS = (
    _tool("find", "box of an item", item="string"),
    _tool("count", "things in a box", box="integer"),
    _tool("move", "put an item in a box", item="string", box="integer"),
)
_TYPES: dict[str, type] = {"string": str, "integer": int}
_PARAMETERS = {tool["name"]: tool["parameters"]["properties"] for tool in TOOLS}


@dataclass(frozen=True)
class Kind:
    """A question about items in boxes of their own, and the calls that settle it."""

    ask: str  # with {0}, {1}, ... for the items
    items: int
    find: tuple[int, ...]  # whose boxes are looked for
    moves: tuple[tuple[int, int], ...] = ()  # (item, the item in whose box it goes)
    counts: tuple[int, ...] = ()  # items whose boxes are counted, and added up


KINDS: dict[int, dict[str, Kind]] = {
    1: {
        "move": Kind("Put the {0} in the box of the {1}.", 2, find=(1,), moves=((0, 1),)),
        "count": Kind("How many things are in the box of the {0}?", 1, find=(0,), counts=(0,)),
    },
    2: {
        "swap": Kind("Swap the {0} and the {1}.", 2, find=(0, 1), moves=((0, 1), (1, 0))),
    },
    3: {
        "both": Kind("Put the {0} and the {1} in the box of the {2}.", 3, find=(2,), moves=((0, 2), (1, 2))),
        "pairs": Kind(
            "Put the {0} in the box of the {1} and the {2} in the box of the {3}.",
            4,
            find=(1, 3),
            moves=((0, 1), (2, 3)),
        ),
        "round": Kind(
            "Put the {0} in the box of the {1}, the {1} in the box of the {2} and the {2} in the box of the {0}.",
            3,
            find=(0, 1, 2),
            moves=((0, 1), (1, 2), (2, 0)),
        ),
        "sum": Kind("How many things are in the boxes of the {0} and the {1}?", 2, find=(0, 1), counts=(0, 1)),
    },
}


@dataclass(frozen=True)
class Answer:
    items: tuple[str, ...]  # of the question
    store: dict[str, int]  # item -> box, at the start
    goal: dict[str, int]  # and at the end
    counts: dict[int, int]  # box -> things in it, of the boxes that must be counted


class Agent(Environment):
    """Find, count and move the things of a store."""

    name = "agent"
    levels = (1, 2, 3)

    def task(self, seed: int, level: int) -> Task:
        random = self.random(seed, level)
        name = random.choice(sorted(KINDS[level]))
        kind = KINDS[level][name]
        items, store = _store(random, kind)
        goal = store | {items[item]: store[items[target]] for item, target in kind.moves}
        boxes = [store[items[i]] for i in kind.counts]
        counts = {box: list(store.values()).count(box) for box in boxes}
        question = {"role": "user", "content": kind.ask.format(*items)}
        answer = Answer(items, store, goal, counts)
        return Task(self.name, name, level, seed, (question,), TOOLS, max_turns=3 + SPARE_TURNS, answer=answer)

    def start(self, task: Task) -> Episode:
        return Store(task)

    def solve(self, task: Task, thinking: bool = True) -> list[Message]:
        """Look for all boxes in one turn, act in the next, answer in the third."""
        return self._play(task, thinking, None)

    def slip(self, task: Task, thinking: bool = True) -> list[Message]:
        """The last call is forgotten: what remains to be told is a guess."""
        return self._play(task, thinking, self.random(task.seed, task.level))

    def _play(self, task: Task, thinking: bool, slip: Random | None) -> list[Message]:
        kind, items = KINDS[task.level][task.kind], task.answer.items
        box = {i: task.answer.store[items[i]] for i in kind.find}
        looks = [("find", {"item": items[i]}) for i in kind.find]
        acts = [("move", {"item": items[item], "box": box[target]}) for item, target in kind.moves]
        acts += [("count", {"box": box[i]}) for i in kind.counts]
        if slip:
            acts.pop()
        found = ", ".join(f"the {items[i]} is in box {box[i]}" for i in kind.find)
        counts = task.answer.counts
        total = slip.randint(1, MOST_GUESSED) if slip else sum(counts.values())
        result = "It is done." if kind.moves else f"{' + '.join(map(str, counts.values()))} = {total}."
        if (slip and counts) or len(counts) == 1:
            result = f"There are {total}."
        dialogue = [
            said("", "I look for " + " and ".join(f"the {items[i]}" for i in kind.find) + ".", thinking, looks),
            *([said("", found[0].upper() + found[1:] + ".", thinking, acts)] if acts else []),
            said("Done." if kind.moves else str(total), result, thinking),
        ]
        episode = self.start(task)
        whole: list[Message] = []
        for message in dialogue:
            turn = episode.step(message)
            whole += [message, *({"role": "tool", "content": text} for text in turn.observations)]
        return whole


def _store(random: Random, kind: Kind) -> tuple[tuple[str, ...], dict[str, int]]:
    """The question's items in boxes of their own, and others among them so that a count says something."""
    names = random.sample(ITEMS, kind.items + random.randint(4, 10))
    boxes = random.sample(BOXES, kind.items + 1)
    items = tuple(names[: kind.items])
    store = dict(zip(items, boxes, strict=False))
    store |= {name: random.choice(boxes) for name in names[kind.items :]}
    return items, store


class Store(Episode):
    """The boxes of one episode, and which of their numbers the model can know."""

    def __init__(self, task: Task):
        super().__init__(task)
        self.store = dict(task.answer.store)
        self.shown: set[int] = set()  # boxes that an observation has named
        self.counted: dict[int, int] = {}  # box -> the number that was observed

    def reply(self, message: Message) -> Turn:
        reason = pathology.fault(message, share=0.5, repeats=2)
        if reason:
            return failed(reason)
        calls = message.get("tool_calls") or []
        if not calls:
            return self._end(message["content"].strip())
        if len(calls) > MOST_CALLS or not all(map(_well_formed, calls)):
            return failed("malformed")
        known = frozenset(self.shown)  # at the turn's beginning: its calls were written before their results
        actions: dict[str, Callable[..., str]] = {"find": self._find, "count": self._count, "move": self._move}
        return Turn(tuple(actions[call["name"]](known, **call["arguments"]) for call in calls))

    def _find(self, known: frozenset[int], item: str) -> str:
        if item not in self.store:
            return "error: no such item"
        self.shown.add(self.store[item])
        return str(self.store[item])

    def _count(self, known: frozenset[int], box: int) -> str:
        if box not in known:
            return "error: no such box"
        self.counted[box] = list(self.store.values()).count(box)
        return str(self.counted[box])

    def _move(self, known: frozenset[int], item: str, box: int) -> str:
        if item not in self.store:
            return "error: no such item"
        if box not in known:
            return "error: no such box"
        self.store[item] = box
        return "done"

    def _end(self, content: str) -> Turn:
        """Exactly the asked-for change; for a question, the bare number, and the counts behind it observed."""
        answer = self.task.answer
        if self.store != answer.goal:
            return ended(False)
        if not answer.counts:
            return ended(True) if len(content.split()) <= MOST_WORDS else failed("overlong")
        observed = all(self.counted.get(box) == count for box, count in answer.counts.items())
        if content == str(sum(answer.counts.values())):
            return ended(True) if observed else failed("guessed")
        return ended(False)


def _well_formed(call: dict[str, Any]) -> bool:
    """A tool that exists, with exactly its arguments, each of its type."""
    parameters, arguments = _PARAMETERS.get(call.get("name", "")), call.get("arguments")
    if parameters is None or not isinstance(arguments, dict) or set(arguments) != set(parameters):
        return False
    return all(type(arguments[key]) is _TYPES[schema["type"]] for key, schema in parameters.items())
