"""Dialogues that are made: each is confirmed by its environment, none is held out, and its tags become special tokens."""

from collections import Counter

from glm_jax.data import synthetic
from glm_jax.data.document import DIALOGUES
from glm_jax.envs import get
from glm_jax.envs.split import held_out, tasks
from glm_jax.text.parse import parse


def _made(count):
    drops = Counter()
    return list(synthetic.documents(count, 4, drops, lambda done, total: None)), drops


def test_dialogues_are_different_the_same_again_and_of_training_tasks_alone():
    documents, drops = _made(30)
    assert [d.id for d in documents] == [d.id for d in _made(30)[0]]
    assert len({d.id for d in documents}) == len(documents) == 60 - drops["exact duplicate"]
    assert {d.domain for d in documents} == set(DIALOGUES)
    assert all(d.text.startswith("[gMASK]<sop>") and d.bucket == 4 for d in documents)
    for document in documents:
        name, level, seed = [*document.path.split("/"), ""][:3]
        if name in DIALOGUES:
            assert not held_out(get(name).task(int(seed), int(level)))


def test_an_agents_calls_were_executed_and_its_answer_is_right():
    task = next(tasks(get("agent"), 1, evaluation=False))
    solution = get("agent").solve(task)
    assert synthetic.holds(get("agent"), task, solution)
    place = next(i for i, message in enumerate(solution) if message["role"] == "tool")
    told = [*solution]
    told[place] = {**solution[place], "content": solution[place]["content"] + "1"}
    assert not synthetic.holds(get("agent"), task, told)  # an observation that the store never gave
    assert not synthetic.holds(get("agent"), task, get("agent").slip(task))  # a wrong answer
    assert not synthetic.holds(get("agent"), task, solution[:-1])  # no answer


def test_what_is_rendered_can_be_parsed_back():
    documents, _ = _made(6)
    text = next(d.text for d in documents if d.domain == "agent")
    turn = parse(text.split("<|assistant|>")[1].split("<|observation|>")[0])
    assert turn["tool_calls"] and turn["reasoning_content"]
