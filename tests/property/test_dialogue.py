"""What an assistant wrote, read again: whole, in pieces and as tokens, whatever is typed in it.

`FUZZ=100000 python -m pytest tests/property/test_dialogue.py -k fuzz` reads so many random texts; the slow run does.
"""

import itertools
import os
import random

import pytest
from chat_material import KINDS, TOKENIZER, TOOLS
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.text.chat import render, render_tokens
from glm_jax.text.parse import StreamParser, parse, parse_tokens
from glm_jax.text.tokenizer import SPECIAL_TOKENS

USER = TOKENIZER.id("<|user|>")
WORDS = ["a", "the weather", "12", "Zürich", "\n", "\n\n", "  ", "", "🙂", "</b>", "<", *SPECIAL_TOKENS]

# One assistant's turn, written and read again.

TEXT = st.text(st.sampled_from("ab <>/\n\t|é🙂\u2028"), max_size=12) | st.text(max_size=8)
UNTAGGED = TEXT.filter(lambda text: not any(name in text for name in SPECIAL_TOKENS))
TYPED = st.lists(TEXT | st.sampled_from(WORDS), max_size=4).map("".join)  # with tags spelt out in it
IN_VALUE = TYPED.filter(lambda text: "</arg_value>" not in text)  # the one text that a value cannot hold


def turns(said: st.SearchStrategy[str], typed: st.SearchStrategy[str]) -> st.SearchStrategy[dict]:
    floats = st.floats(allow_nan=False, allow_infinity=False)
    json = st.recursive(
        st.none() | st.booleans() | st.integers() | floats | typed,
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(typed, inner, max_size=2),
        max_leaves=4,
    )
    lists, objects = st.lists(json, max_size=3), st.dictionaries(typed, json, max_size=3)
    values = dict(zip(KINDS, (typed, st.integers(), floats, st.booleans(), lists, objects), strict=True))
    find = st.fixed_dictionaries({"name": st.just("find"), "arguments": st.fixed_dictionaries({}, optional=values)})
    calls = st.lists(find | st.just({"name": "now", "arguments": {}}), max_size=2)
    return st.fixed_dictionaries({"reasoning_content": said, "content": said, "tool_calls": calls})


def as_read(turn: dict, thinking: bool) -> dict:
    return {
        "reasoning_content": turn["reasoning_content"].strip() if thinking else None,
        "content": turn["content"].strip() or None,
        "tool_calls": turn["tool_calls"],
        "status": "ok",
    }


def dialogue_of(turn: dict, thinking: bool) -> list[dict]:
    reasoning = turn["reasoning_content"] if thinking else ""
    return [{"role": "user", "content": "U"}, {"role": "assistant", **turn, "reasoning_content": reasoning}]


def read_in_pieces(pieces: list[str]) -> dict:
    """What `close` says, after checking that the events lead up to it."""
    parser = StreamParser(TOOLS)
    events = [event for piece in pieces for event in parser.feed(piece)]
    told = parser.close()
    assert [event["tool_call"] for event in events if "tool_call" in event] == told["tool_calls"]
    for key in ("reasoning_content", "content"):
        streamed, whole = "".join(event.get(key, "") for event in events), told[key] or ""
        assert whole.startswith(streamed)
        rest = whole[len(streamed) :].lstrip()  # nothing, a call that never ended, or half a tag
        assert "<tool_call>" in rest or any(name.startswith(rest) for name in SPECIAL_TOKENS)
    return told


@settings(max_examples=100, deadline=None)
@given(turns(UNTAGGED, IN_VALUE), st.booleans())
def test_parse_reads_what_render_wrote_at_every_split(turn, thinking):
    *before, _ = messages = dialogue_of(turn, thinking)
    text = render(messages, TOOLS, thinking, False).removeprefix(render(before, TOOLS, thinking))
    expected = as_read(turn, thinking)
    assert parse(text, TOOLS) == expected
    for cut in range(len(text) + 1):
        assert read_in_pieces([text[:cut], text[cut:]]) == expected
    for width in range(1, 9):
        assert read_in_pieces([text[place : place + width] for place in range(0, len(text), width)]) == expected


@settings(deadline=None)
@given(turns(TYPED, TYPED), st.booleans())
def test_parse_tokens_reads_back_whatever_was_typed(turn, thinking):
    *before, _ = messages = dialogue_of(turn, thinking)
    prompt = render_tokens(TOKENIZER, before, TOOLS, thinking).ids
    ids = render_tokens(TOKENIZER, messages, TOOLS, thinking, False).ids
    assert ids[: len(prompt)] == prompt
    assert parse_tokens(TOKENIZER, ids[len(prompt) :], TOOLS) == as_read(turn, thinking)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(TEXT | st.sampled_from([*SPECIAL_TOKENS[21:31], "find", "now", "array", "\n", "<", "[1]"]), max_size=14),
    st.lists(st.integers(0, 120), max_size=6),
)
def test_any_text_is_read_alike_whole_in_pieces_and_as_tokens(fragments, cuts):
    text = "".join(fragments)
    told = parse(text, TOOLS)
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    assert read_in_pieces([text[a:b] for a, b in itertools.pairwise(places)]) == told
    ids = TOKENIZER.encode(text, special=True)
    assert parse_tokens(TOKENIZER, [*ids, USER], TOOLS) == told
    if told["status"] == "ok" and told["reasoning_content"] is not None:  # what is well formed can be written again
        message = {"role": "assistant", **told}
        *before, _ = messages = [{"role": "user", "content": "U"}, message]
        again = render(messages, TOOLS, True, False).removeprefix(render(before, TOOLS))
        assert parse(again, TOOLS) == told


# Streaming and noise, on texts made from seeds: pieces of the format, whole turns, and turns with a piece cut out, doubled
# or put elsewhere.

PIECES = [
    *SPECIAL_TOKENS[21:31], "<|user|>", "<|observation|>", "\n", "find", "now", "later", "string", "integer", "array", "7", "[1]",
    "seven", "null", "True", "\\n", '"', "<", "</", "<tool", "é", "\U0001f642", " ", "a", "{'a': 1}",
]  # fmt: skip
TURNS = (
    "\n<think>R\n</think>\nA\n<tool_call>find\n<arg_key>string</arg_key>\n<arg_value> a < b\n</arg_value>\n"
    "<arg_key>integer</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
    "\n<think></think>\nüA\n\nB",
    "<tool_call>find<arg_key>array</arg_key><arg_value>[1]</arg_value></tool_call>",  # GLM-4.7 leaves the new lines out
)
# What made parsers of others wrong (vLLM's issues), and the rules they were mended by.
KNOWN = (
    "\n<think>second</think>\nA",  # 27703: reasoning after a tool's turn leaked into content
    "\n<think>I look.<tool_call>now\n</tool_call>",  # 42400, 46040: a call inside the reasoning
    "\n<think>I look.<tool_call>now\n</tool_call> so</think>A",
    "<tool_call>find\n<arg_key>string</arg_key>\n<arg_value>x</arg_value>\n</tool_call>" * 3,  # 39757, 39253, 47504
    "<tool_call>now</tool_call>",  # 44326: no arguments
    "<tool_call>now\n</tool_call>",
    "A\n<tool_call>find\n<arg_key>string</arg_key>\n<arg_value>x</arg_value>",  # an unclosed call is text
    "A\n<tool_call>find\n<arg_key>string</arg_key>\n<arg_val",
    "<tool_call>find\n<arg_key>string</arg_key>\n<arg_value>True</arg_value>\n</tool_call>",  # a string stays raw
    "<tool_call>find\n<arg_key>string</arg_key>\n<arg_value> 12\\n </arg_value>\n</tool_call>",
    "<tool_call>find\n<arg_key>integer</arg_key>\n<arg_value>None</arg_value>\n</tool_call>",
    "<tool_call>find\n<arg_key>object</arg_key>\n<arg_value>{'a': 1}</arg_value>\n</tool_call>",
    "<tool_call>find\n<arg_key>string</arg_key>\n<arg_value><tool_call>x</tool_call></arg_value>\n</tool_call>",
    "text <tool_call>now\n</tool_call> between <tool_call>now\n</tool_call> calls",
    "<tool_call>\n</tool_call>",
    "</think>\nA",
)


def noise(seed: int) -> str:
    draw = random.Random(seed)
    if draw.random() < 0.5:
        return "".join(draw.choices(PIECES, k=draw.randrange(16)))
    text = draw.choice(TURNS)
    for _ in range(draw.randrange(3)):
        a, b = sorted(draw.randrange(len(text) + 1) for _ in range(2))
        place = draw.randrange(len(text) + 1)
        text = draw.choice([text[:a] + text[b:], text[:b] + text[a:], text[:place] + text[a:b] + text[place:]])[:160]
    return text


STREAMED = [*KNOWN, *TURNS, *(noise(seed) for seed in range(1000, 1240))]


def test_streaming_at_every_split_equals_the_whole():
    assert len({*STREAMED}) >= 200
    for text in STREAMED:
        told = parse(text, TOOLS)
        for cut in range(len(text) + 1):
            assert read_in_pieces([text[:cut], text[cut:]]) == told, (text, cut)
        assert read_in_pieces([*text]) == told, text


@pytest.mark.parametrize("count", [int(os.environ.get("FUZZ", "5000")), pytest.param(100_000, marks=pytest.mark.slow)])
def test_fuzzed_texts_and_tokens_are_read_without_an_exception(count):
    statuses, draw = set(), random.Random(0)
    for seed in range(count):
        text = noise(seed) if seed % 8 else "".join(map(chr, draw.choices(range(0x110000), k=12)))  # surrogates too
        tools = TOOLS if seed % 4 else None
        told = parse(text, tools)
        statuses.add(told["status"])
        assert isinstance(told["content"], str | None) and isinstance(told["tool_calls"], list)
        if seed % 10 == 0:
            parse_tokens(TOKENIZER, draw.choices(range(TOKENIZER.vocab_size), k=20), tools)
    assert statuses == {
        "ok", "unclosed_think", "unclosed_call", "missing_name", "malformed_call", "unknown_tool", "invalid_json",
        "text_after_call", "stray_tag",
    }  # fmt: skip
