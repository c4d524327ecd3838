"""Environments and rewards over whatever seeds, texts and calls may come."""

from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.envs import ENVIRONMENTS
from glm_jax.rewards import pathology
from glm_jax.rewards.constraints import check, words_of
from glm_jax.text.parse import parse

environments = st.sampled_from(list(ENVIRONMENTS.values()))
seeds = st.integers(-(2**70), 2**70)
levels = st.integers(0, 9)  # whose place in an environment's levels is taken, beginning anew
words = st.text("abcdefgh", min_size=1, max_size=4)
json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)
names = st.sampled_from(["find", "count", "move", "seek", ""])
arguments = st.dictionaries(st.sampled_from(["item", "box", "n"]), st.sampled_from(["cup", 47]) | json, max_size=3)
calls = st.lists(st.fixed_dictionaries({"name": names, "arguments": arguments | json}), min_size=1, max_size=3)


@given(environments, seeds, levels, st.booleans())
@settings(deadline=None)
def test_every_seed_is_a_task_made_alike_twice_that_the_oracle_solves(env, seed, level, thinking):
    level = env.levels[level % len(env.levels)]
    task = env.task(seed, level)
    assert task == env.task(seed, level)
    assert all(message["content"].isascii() for message in task.messages)
    episode, solution = env.start(task), env.solve(task, thinking)
    turns = [episode.step(message) for message in solution if message["role"] == "assistant"]
    assert [turn.done for turn in turns] == [False] * (len(turns) - 1) + [True]
    assert (turns[-1].reward, turns[-1].reason) == (1.0, "solved")
    assert sum(len(turn.observations) for turn in turns) == sum(message["role"] == "tool" for message in solution)
    assert all(("reasoning_content" in m) == thinking for m in solution if m["role"] == "assistant")


@given(environments, seeds, levels, st.text())
@settings(deadline=None)
def test_any_text_is_answered_and_only_the_answer_is_rewarded(env, seed, level, text):
    task = env.task(seed, env.levels[level % len(env.levels)])
    turn = env.start(task).step(parse(text, task.tools))
    assert turn.done and turn.reason and turn.reward in (0.0, 1.0)
    assert not turn.reward or env.name not in ("chat", "agent")  # no such text keeps constraints; the agent needs calls
    if turn.reward and env.name == "reasoning":
        assert task.answer["answer"].lower() in text.lower() or float(text) == float(task.answer["answer"])


@given(seeds, levels, calls)
@settings(deadline=None)
def test_any_calls_are_answered_one_by_one_or_end_it(seed, level, calls):
    env = ENVIRONMENTS["agent"]
    turn = env.start(env.task(seed, env.levels[level % len(env.levels)])).step(
        {"content": None, "tool_calls": calls, "status": "ok"}
    )
    assert turn.reward == 0
    if turn.done:
        assert turn.reason == "malformed" and not turn.observations
    else:
        assert len(turn.observations) == len(calls)
        assert all(text.isdigit() or text.startswith("error: no such ") for text in turn.observations)


@given(st.lists(words, min_size=1, max_size=pathology.LONGEST_UNIT), st.integers(5, 8), st.lists(words, max_size=5))
def test_a_phrase_five_times_in_a_row_is_repetition_wherever_it_stands(phrase, times, before):
    assert pathology.repetitive(" ".join([*before, *phrase * times]))


@given(st.lists(words, unique=True))
def test_distinct_words_are_no_repetition(text):
    assert not pathology.repetitive(" ".join(text), share=0.5, repeats=2)


@given(st.text(st.characters(codec="latin-1"), max_size=20), st.text("абвгд", min_size=1))
def test_scripts_mix_where_a_latin_and_a_cyrillic_letter_meet(latin, cyrillic):
    assert not pathology.mixes_scripts(cyrillic + " 1 2.")
    assert pathology.mixes_scripts(latin + "x" + cyrillic)


@given(st.lists(words, min_size=1, max_size=8), st.sampled_from([" ", "  ", "\n", ", ", ". "]))
def test_constraints_hold_of_the_words_that_a_text_was_joined_of(parts, joint):
    text = joint.join(parts) + "!"
    assert words_of(text) == parts
    assert check("words", text, count=len(parts)) and not check("words", text, count=len(parts) + 1)
    assert check("start", text, word=parts[0]) and check("end", text, word=parts[-1]) and check("exclaim", text)
    assert all(check("times", text, word=word, count=parts.count(word)) for word in parts)
    assert all(check("without", text, letter=letter) == (letter not in text) for letter in "abcdefgh")
