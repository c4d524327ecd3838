"""Dialogues that are made and checked here: synthetic reasoning with verified answers, and an agent's trajectories executed
against the environment they speak of (report, section 2.3). Each is a document in the chat format.

The oracle of an environment writes a dialogue; it is kept if the environment, asked again turn by turn, gives the same
observations and reward 1. Tasks that evaluation holds out are never among them. Beside these stand questions of
reasoning-gym of more kinds, with answers that its scorers confirm.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import count, cycle, islice
from typing import Any

from glm_jax.data.document import DIALOGUES, Document
from glm_jax.envs import Environment, Task, get
from glm_jax.envs.split import held_out
from glm_jax.envs.task import Message, said
from glm_jax.text.chat import render
from glm_jax.text.tokenizer import SPECIAL_TOKENS

# Of reasoning-gym: quick to make, with an answer that its own scorer confirms, and none that an environment evaluates on.
GENERATED = (
    "gsm_symbolic", "products", "gcd", "lcm", "prime_factorization", "calendar_arithmetic", "syllogism",
    "knights_knaves", "family_relationships", "number_sequence", "base_conversion", "fraction_simplification",
    "basic_arithmetic", "leg_counting", "time_intervals", "binary_matrix", "bitwise_arithmetic", "decimal_arithmetic",
    "complex_arithmetic", "power_function", "aiw", "needle_haystack", "list_functions",
)  # fmt: skip
_EVERY = 200  # dialogues between two words about them
_Dialogue = tuple[str, Sequence[Message], Any]  # path, messages, tools


def documents(most: int, bucket: int, drops: Counter[str], tell: Callable[[int, int], None]) -> Iterator[Document]:
    """Up to `most` different dialogues of each of `DIALOGUES`, the domains."""
    made = {
        "reasoning": _in_turn(_of_environment("reasoning", drops), _generated(most, drops)),
        "agent": _of_environment("agent", drops),
    }
    for place, domain in enumerate(DIALOGUES):
        seen = set()
        for number, (path, messages, tools) in enumerate(islice(made[domain], most)):
            document = _document(domain, path, messages, tools, bucket)
            if document is None:
                drops["dialogue with a special token typed in it"] += 1
            elif document.id in seen:
                drops["exact duplicate"] += 1
            else:
                seen.add(document.id)
                yield document
            if number % _EVERY == 0:
                tell(place * most + number, most * len(DIALOGUES))


def _in_turn(*sources: Iterator[_Dialogue]) -> Iterator[_Dialogue]:
    for source in cycle(sources):
        yield next(source)


def _of_environment(name: str, drops: Counter[str]) -> Iterator[_Dialogue]:
    """The oracle's dialogues of an environment, over all its levels in turn."""
    env = get(name)
    for number in count(0):  # not by `split.tasks`, whose time limit would let a busy machine decide
        task = env.task(number // len(env.levels), env.levels[number % len(env.levels)])
        if held_out(task):
            continue
        solution = env.solve(task)
        if holds(env, task, solution):
            yield f"{name}/{task.level}/{task.seed}", (*task.messages, *solution), task.tools
        else:
            drops["dialogue that its environment does not confirm"] += 1


def _generated(most: int, drops: Counter[str]) -> Iterator[_Dialogue]:
    """Questions of reasoning-gym with answers that its scorers confirm, and its steps where it tells them."""
    import reasoning_gym  # brings all its 100 generators: a second that only who makes tasks should wait

    datasets = {name: reasoning_gym.create_dataset(name, seed=0, size=most) for name in GENERATED}
    for index in range(most):
        for name, dataset in datasets.items():
            entry = dataset[index]
            if dataset.score_answer(entry["answer"], entry) == 1.0:
                answer = said(entry["answer"], entry["metadata"].get("answer_cot", ""), thinking=True)
                yield f"{name}/{index}", ({"role": "user", "content": entry["question"].strip()}, answer), None
            else:
                drops["answer that its scorer does not confirm"] += 1


def _document(domain: str, path: str, messages: Sequence[Message], tools: Any, bucket: int) -> Document | None:
    typed = json.dumps([messages, tools], ensure_ascii=False)
    if any(token in typed for token in SPECIAL_TOKENS):
        return None
    text = render(messages, tools, add_generation_prompt=False)
    return Document.of(text, domain=domain, source=f"made:{domain}", path=path, group=f"task:{path}", bucket=bucket)


def holds(env: Environment, task: Task, solution: list[Message]) -> bool:
    """Whether the environment answers the solution's turns as the solution says, and ends with reward 1."""
    episode, waiting = env.start(task), list(solution)
    while waiting and not episode.done:
        turn = episode.step(waiting.pop(0))
        told = [message["content"] for message in waiting[: len(turn.observations)]]
        if told != list(turn.observations):
            return False
        del waiting[: len(told)]
        if turn.done:
            return not waiting and turn.reward == 1.0
    return False
