import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from itertools import chain

import pytest
import reasoning_gym

from glm_jax.config import ConfigError
from glm_jax.envs import ENVIRONMENTS, dialogue, get, guard, reasoning, split
from glm_jax.envs.agent import ITEMS
from glm_jax.envs.task import Environment
from glm_jax.rewards.constraints import CONSTRAINTS, check
from glm_jax.text import chat
from glm_jax.text.parse import parse

NAMES = list(ENVIRONMENTS)
LEXICON = (dialogue.TOPICS, dialogue.DETERMINERS, dialogue.ADJECTIVES, dialogue.VERBS, dialogue.PLACES, ITEMS[:9])
WORDS = [*chain(*LEXICON, dialogue.PREPOSITIONS, dialogue.ADVERBS), "1", "2", "10", "47", "is", "answer", "box", "find"]
EXAMPLE = {"role": "user", "content": "?"}


def tasks(env, count):
    """So many tasks, over all levels in turn."""
    return [env.task(seed, env.levels[seed % len(env.levels)]) for seed in range(count)]


def written(message):
    """What the model writes for an assistant turn, less the closing token."""
    return chat.render([EXAMPLE, message], add_generation_prompt=False).split("<|assistant|>", 1)[1]


def play(env, task, texts):
    """The last turn of an episode in which the model writes these texts."""
    episode = env.start(task)
    for text in texts:
        turn = episode.step(parse(text, task.tools))
        if turn.done:
            return turn
    return turn


def calling(*calls):
    return written({"role": "assistant", "content": "", "tool_calls": [{"name": n, "arguments": a} for n, a in calls]})


# ---- the oracle


@pytest.mark.parametrize("name", NAMES)
def test_the_oracle_solves_1000_tasks_in_both_modes_written_and_parsed(name):
    env = get(name)
    for task in tasks(env, 1000):
        thinking = bool(task.seed % 2)
        whole = [*task.messages, *env.solve(task, thinking)]
        episode, observations, turn = env.start(task), [], None
        for place, message in enumerate(whole[len(task.messages) :], len(task.messages)):
            if message["role"] == "tool":
                assert message["content"] == observations.pop(0)
                continue
            prompt = chat.render(whole[:place], task.tools, thinking)
            text = chat.render(whole[: place + 1], task.tools, thinking, add_generation_prompt=False)
            assert text.startswith(prompt) and text.isascii() and not observations
            read = parse(text.removeprefix(prompt), task.tools)
            assert bool(read["reasoning_content"]) == thinking
            turn = episode.step(read)
            observations = list(turn.observations)
        assert (turn.done, turn.reward, turn.reason) == (True, 1.0, "solved"), whole
        assert episode.turns <= task.max_turns


@pytest.mark.parametrize("name", [name for name in NAMES if type(get(name)).slip is not Environment.slip])
def test_a_slip_reads_like_a_solution_and_earns_nothing(name):
    env = get(name)
    for task in tasks(env, 300):
        turns = env.slip(task)
        assert turns == env.slip(task) != env.solve(task)
        assert turns[0].get("tool_calls") == env.solve(task)[0].get("tool_calls")  # it begins like one
        last = play(env, task, [written(turn) for turn in turns if turn["role"] == "assistant"])
        assert (last.done, last.reward) == (True, 0.0), turns


@pytest.mark.parametrize("name", NAMES)
def test_levels_grow_harder_and_every_kind_occurs(name):
    env, lengths = get(name), []
    for level in env.levels:
        made = [env.task(seed, level) for seed in range(300)]
        assert {(task.env, task.level) for task in made} == {(name, level)}
        assert len({task.messages[-1]["content"] for task in made}) > 200 / (1 + 3 * (level == 1))
        assert min(Counter(task.kind for task in made).values()) > 40
        assert max(len(task.messages[-1]["content"]) for task in made) < 200
        lengths.append(sum(len(str(env.solve(task))) for task in made))
    assert lengths == sorted(set(lengths))


def test_tasks_are_the_same_in_another_process():
    program = (
        "from glm_jax.envs import ENVIRONMENTS as E; "
        "print([repr(E[n].task(s, l)) for n in E for l in E[n].levels for s in (0, 1, 2, 3, 2**40)])"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    here = [repr(E.task(s, level)) for E in ENVIRONMENTS.values() for level in E.levels for s in (0, 1, 2, 3, 2**40)]
    assert done.stdout.strip() == str(here)


# ---- honesty: 10,000 texts that do not answer the question


def noise(draw, task, right):
    """Texts made without looking at the task, or only at its prompt."""
    prompt = task.messages[-1]["content"]
    yield draw.randbytes(draw.randint(0, 40)).decode("utf-8", "replace")
    yield "".join(chr(draw.randint(32, 126)) for _ in range(draw.randint(0, 40)))
    for _ in range(6):
        yield " ".join(draw.choices(WORDS, k=draw.randint(1, 10)))
    yield " ".join(draw.choices(WORDS, k=draw.randint(3, 8))).capitalize() + "."
    yield "\n".join(" ".join(draw.choices(WORDS, k=3)) for _ in range(draw.randint(2, 4)))
    yield from (prompt, prompt.replace(". ", ".\n"), prompt.lower(), prompt.split()[-1], "\n".join(prompt.split()))
    yield from (" ".join(map(str, range(-9, 50))), ",".join(map(str, range(10))), "1,2", "", " \n", "<think></think>")


def around(draw, task, right):
    """The right answer where it does not count: in a longer text, in the reasoning, behind a broken format."""
    yield from (
        f"The answer is {right}.",
        f"{right} {right}",
        f"{right} or not",
        f"is it {right}",
        right + "\n\n" + right,
    )
    yield from (f"\n<think>{right}</think>", f"\n<think>{right}</think>\nI know it", f"\n<think>{right}")
    yield from (f"{right}</think>", f"{right}<think>", f"{right}<|user|>", f"<tool_call>{right}</tool_call>")
    yield from (f"\n<think>\n<think>a</think>\n{right}", f"[gMASK]{right}", f"<arg_value>{right}</arg_value>")
    yield from ("\n".join([right] * 6), "\n<think>" + "so " * 12 + f"</think>\n{right}", f"{right} \u0434\u0430")
    yield f"\n<think>{'x ' * 20}</think>\n{right}"


def wrong_words(draw, task, right):
    """The right text, one thing changed."""
    words = right.split()
    yield from (" ".join(words[:-1]), " ".join([*words, "now"]), " ".join(["oh", *words]), right[: len(right) // 2])
    yield right.replace("o", "\u043e").replace("e", "\u0435").replace("a", "\u0430")  # Cyrillic twins
    if task.env == "chat":
        topic = task.answer["constraints"][0][1]["word"]
        yield from (re.sub(topic, "thing", right, flags=re.IGNORECASE), re.sub(r"\S+", topic, right))
        yield task.messages[0]["content"] + " " + right
    elif task.kind == "spell":
        yield from (right + "s", right[1:], "q" + right[1:], f"{right}.", " ".join(right), f'"{right}"')
    else:
        yield from (str(int(right) + draw.choice([-2, -1, 1, 2])), right + "1", "--" + right, right + "%", f"={right}")


def test_answers_that_miss_the_question_score_nothing():
    reasons = Counter()
    for name in ("reasoning", "chat"):
        env, seen = get(name), 0
        for seed in range(10**6):
            draw, task = random.Random(seed), env.task(seed, env.levels[seed % 3])
            right = env.solve(task)[-1]["content"]
            for family in (noise, around, wrong_words):
                for text in family(draw, task, right):
                    said = (parse(text)["content"] or "").strip()
                    if family is not around and said.lower() == right.lower():
                        continue  # by chance the right answer
                    turn = play(env, task, [text])
                    assert turn.done and turn.reward == 0, (task, text)
                    reasons[turn.reason] += 1
                    seen += 1
            if seen >= 10_000:
                break
    assert {"wrong", "malformed", "empty", "repetition", "scripts", "echo", "unfinished"} <= set(reasons)


def cheating(draw, task) -> Iterator[list[str]]:
    """Episodes of the agent that skip what makes the task one: looking first, acting on it, and no more than that."""
    env, answer = get("agent"), task.answer
    turns = [message for message in env.solve(task) if message["role"] == "assistant"]
    look, act, end = map(written, turns)
    finds, acts = ([(c["name"], c["arguments"]) for c in message["tool_calls"]] for message in turns[:2])
    number, boxes = str(sum(answer.counts.values())), [arguments["box"] for _, arguments in acts]
    stranger = draw.choice([item for item in ITEMS if item not in answer.store])
    astray = [("move", {"item": i, "box": box}) for i, goal in answer.goal.items() for box in boxes if box != goal][:1]
    yield from ([end], [number], ["Done."], [act, end], [act, act, end], [look, end], [calling(*finds, *acts), end])
    yield from ([look, act, ""], [look, act, "\n<think>6</think>"], [look, act, "Done. Done."], [look, number])
    yield from ([look, act, f"{end} {end}"], [look, act, " ".join(map(str, range(40)))], [look] * 9, [act] * 9)
    yield from ([look, act, calling(*astray), end], [look, calling(*acts[:-1]) if acts[1:] else "So.", end])
    yield [calling(*finds, ("find", {"item": stranger})), calling(("move", {"item": stranger, "box": 10})), end]
    if answer.counts:
        yield from ([look, act, str(int(number) + 1)], [look, act, f"There are {number}."], [look, act, "Done."])
        yield [calling(*[("count", {"box": box}) for box in boxes]), number]
    for _ in range(4):
        item, box = draw.choice(ITEMS), draw.randint(10, 99)
        known = [("find", {"item": item}), ("count", {"box": box}), ("move", {"item": item, "box": box})]
        yield [calling(*draw.choices(known, k=draw.randint(1, 3))) for _ in range(2)] + [
            draw.choice([end, "Done.", "3"])
        ]


def test_an_agent_that_cheats_or_rambles_gets_nothing():
    env, reasons, seen = get("agent"), Counter(), 0
    for seed in range(10**6):
        draw, task = random.Random(seed), env.task(seed, env.levels[seed % 3])
        right = env.solve(task)[-1]["content"]
        plain = [[text] for family in (noise, around) for text in family(draw, task, right)]
        for texts in [*plain, *cheating(draw, task)]:
            turn = play(env, task, texts)
            assert turn.reward == 0, (task, texts)
            reasons[turn.reason] += 1
            seen += 1
        if seen >= 10_000:
            break
    assert {"wrong", "malformed", "empty", "guessed", "turn limit", "scripts"} <= set(reasons)


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>seek\n<arg_key>item</arg_key>\n<arg_value>cup</arg_value>\n</tool_call>",
        "<tool_call>find\n</tool_call>",
        "<tool_call>find\n<arg_key>thing</arg_key>\n<arg_value>cup</arg_value>\n</tool_call>",
        "<tool_call>\n<arg_key>item</arg_key>\n<arg_value>cup</arg_value>\n</tool_call>",
        "<tool_call>find\n<arg_key>item</arg_key>\n<arg_value>cup",
        "<tool_call>find cup</tool_call>",
        calling(("find", {"item": "cup", "box": 12})),
        calling(("count", {"box": "red"})),
        calling(("count", {"box": True})),
        calling(("count", {"box": 12.5})),
        calling(("count", {"box": [12]})),
        calling(("find", {"item": "cup"}), ("move", {"item": "cup"})),
        calling(*[("find", {"item": "cup"})] * 9),
    ],
)
def test_a_malformed_call_halts_with_nothing(text):
    env = get("agent")
    task = env.task(0, 1)
    episode = env.start(task)
    turn = episode.step(parse(text, task.tools))
    assert (turn.done, turn.reward, turn.reason, turn.observations) == (True, 0.0, "malformed", ())
    with pytest.raises(ConfigError, match="ended after turn 1"):
        episode.step(parse("Done."))


def test_a_call_about_nothing_is_answered_and_the_episode_goes_on():
    env = get("agent")
    task = next(task for task in tasks(env, 50) if task.kind == "move")
    lamp, cup = task.answer.items
    stranger = next(item for item in ITEMS if item not in task.answer.store)
    box = task.answer.store[cup]
    episode = env.start(task)
    turn = episode.step(parse(calling(("find", {"item": stranger}), ("find", {"item": cup}), ("count", {"box": box}))))
    assert turn.observations == ("error: no such item", str(box), "error: no such box") and not turn.done
    move = ("move", {"item": lamp, "box": box})
    turn = episode.step(parse(calling(("move", {"item": stranger, "box": box}), move, ("count", {"box": box}))))
    assert turn.observations[:2] == ("error: no such item", "done") and int(turn.observations[2]) >= 2
    assert episode.step(parse("It is there now.")).reason == "solved"
    assert task.answer.store[lamp] != box  # the task's own store is not the episode's


def test_the_turn_limit_ends_an_episode():
    env = get("agent")
    task = env.task(3, 2)
    episode = env.start(task)
    turns = [episode.step(parse(calling(("find", {"item": "cup"})))) for _ in range(task.max_turns)]
    assert [turn.done for turn in turns] == [False] * (task.max_turns - 1) + [True]
    assert (turns[-1].reward, turns[-1].reason) == (0.0, "turn limit")


# ---- reasoning


@pytest.mark.parametrize("kind", reasoning.KINDS)
def test_questions_are_reasoning_gyms_own(kind):
    env = get("reasoning")
    task = next(task for task in tasks(env, 100) if task.kind == kind)
    index = task.answer["metadata"]["source_index"]
    config = reasoning.KINDS[kind].levels[task.level]
    entry = reasoning_gym.create_dataset(reasoning.KINDS[kind].dataset, seed=index, size=1, **config)[0]
    assert (entry["question"], entry["answer"]) == (task.messages[0]["content"], task.answer["answer"])


@pytest.mark.parametrize(
    "kind, metadata, steps",
    [
        ("sum", {"expression": "4 + 2 - 3"}, "4 + 2\n2 4\n1 5\n0 6\n6 - 3\n3 6\n2 5\n1 4\n0 3"),
        ("spell", {"word": "stone"}, "s t o n e\ne n o t s"),
        ("count", {"span": ["The", "Tent"], "target_letter": "t"}, "T 1 h e\nT 2 e n t 3"),
    ],
)
def test_the_oracle_writes_its_steps_out(kind, metadata, steps):
    assert reasoning.KINDS[kind].steps(metadata) == steps


# ---- chat


def test_every_constraint_is_asked_for_and_the_prompt_says_it():
    env, asked = get("chat"), Counter()
    for task in tasks(env, 300):
        names = [name for name, _ in task.answer["constraints"]]
        assert len(names) == len(set(names)) == task.level + 2
        assert len({"words", "lines"} & {*names}) == 1 and {"start", "end", "contain", "times"} & {*names}
        prompt, asked = task.messages[0]["content"], asked + Counter(names)
        assert all(CONSTRAINTS[n].say.format(**arguments) in prompt for n, arguments in task.answer["constraints"])
    assert set(asked) == set(CONSTRAINTS) and min(asked.values()) >= 10


def test_a_text_may_differ_from_the_oracles_and_one_broken_constraint_is_enough():
    env = get("chat")
    for task in tasks(env, 300):
        names = {name for name, _ in task.answer["constraints"]}
        if task.level == 3 and "small" in names and "exclaim" not in names:
            break
    text = task.answer["text"]
    assert play(env, task, [text.rstrip(".") + " ..."]).reason == "solved"
    turn = play(env, task, [text.upper()])
    assert [name for name, a in task.answer["constraints"] if not check(name, text.upper(), **a)] == ["small"]
    assert (turn.reward, turn.reason) == (0.0, "wrong")


# ---- names, levels, and environments that fail


def test_unknown_names_and_levels_are_refused_with_a_way_out():
    with pytest.raises(ConfigError, match="did you mean 'reasoning'"):
        get("reason")
    for env in ENVIRONMENTS.values():
        with pytest.raises(ConfigError, match=r"no level 9; use one of \(1, 2, 3\)"):
            env.task(0, 9)


class Broken(Environment):
    name = "broken"
    levels = (1,)

    def task(self, seed, level):
        raise ValueError(f"seed {seed}")

    def start(self, task):
        for _ in range(8):
            try:
                time.sleep(task)
            except Exception:  # what a careless environment does, and the limit must outlive
                continue

    def solve(self, task, thinking=True):
        for _ in range(2):
            try:
                time.sleep(10)
            except:  # noqa: E722  (and a worse one)
                continue
        return []


def on_a_thread(check):
    """Run the check on another thread, and raise here what it raises there."""
    failures = []

    def work():
        try:
            check()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("run", [lambda check: check(), on_a_thread], ids=["main thread", "another"])
def test_an_environment_that_raises_or_hangs_costs_a_task_not_the_run(run):
    def attempt():
        with pytest.raises(guard.EnvironmentFailure) as failure:
            guard.call(Broken().task, 3, 1)
        assert failure.value.reason == "raised ValueError: seed 3"
        begun = time.monotonic()
        for method, argument in ((Broken().start, 0.5), (Broken().solve, None)):
            with pytest.raises(guard.EnvironmentFailure) as failure:
                guard.call(method, argument, seconds=0.05)
            assert failure.value.reason == "timed out after 0.05 s"
        assert time.monotonic() - begun < 5
        assert guard.call(get("agent").task, 0, 1) == get("agent").task(0, 1)

    run(attempt)


def test_the_guard_gives_back_the_handler_and_the_timer_that_it_found():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(time.monotonic()))
    begun = time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        assert guard.call(pow, 2, 5) == 32
        with pytest.raises(guard.EnvironmentFailure, match="timed out"):
            guard.call(time.sleep, 5, seconds=0.05)
        assert not rung
        while not rung and time.monotonic() < begun + 5:
            time.sleep(0.01)
        assert rung and rung[0] - begun >= 0.2
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_task_that_cannot_be_made_is_left_out_and_told():
    class Fragile(reasoning.Reasoning):
        broken = range(3, 5)

        def task(self, seed, level):
            if seed in self.broken:
                raise OSError("no such word list")
            return super().task(seed, level)

    stream = split.tasks(Fragile(), 1, evaluation=False)
    with pytest.warns(UserWarning, match="seed [34]: raised OSError: no such word list; this task is left out"):
        seeds = [next(stream).seed for _ in range(10)]
    assert not {3, 4} & {*seeds} and seeds == sorted(seeds)
    Fragile.broken = range(100)
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(ConfigError, match="20 seeds in a row gave no task"),
    ):
        next(split.tasks(Fragile(), 1, evaluation=False))
    with pytest.raises(ConfigError, match="has no level 9"):
        next(split.tasks(reasoning.Reasoning(), 9, evaluation=False))


def test_an_environment_of_one_prompt_has_no_second_split():
    class Constant(reasoning.Reasoning):
        def task(self, seed, level):
            return super().task(0, level)

    side = split.held_out(Constant().task(0, 1))
    assert next(split.tasks(Constant(), 1, evaluation=side)) == Constant().task(0, 1)
    with pytest.raises(ConfigError, match="its prompts must differ more"):
        next(split.tasks(Constant(), 1, evaluation=not side))
