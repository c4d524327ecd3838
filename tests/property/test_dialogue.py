"""Dialogues that a template, a mask and a parser must agree on, whatever is typed in them."""

import hashlib
import itertools
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.text.chat import render, render_tokens
from glm_jax.text.parse import StreamParser, parse, parse_tokens
from glm_jax.text.tokenizer import SPECIAL_TOKENS, train

TOKENIZER = train(["<think> I look at the weather in Zürich.\n</think> <tool_call>find\n\n" * 3, "12 + 34 = 46\n"], 512)
USER, ASSISTANT, OBSERVATION, SYSTEM, CLOSE_THINK = (
    TOKENIZER.id(name) for name in ("<|user|>", "<|assistant|>", "<|observation|>", "<|system|>", "</think>")
)
KINDS = ("string", "integer", "number", "boolean", "array", "object")
TOOLS = [
    {"name": "now", "description": "the time", "parameters": {"type": "object", "properties": {}}},
    {
        "type": "function",
        "function": {
            "name": "find",
            "description": "Wörter <tool_call>",
            "parameters": {"type": "object", "properties": {kind: {"type": kind} for kind in KINDS}},
        },
    },
]
WORDS = ["a", "the weather", "12", "Zürich", "\n", "\n\n", "  ", "", "🙂", "</b>", "<", *SPECIAL_TOKENS]
VALUES = ["x </tool_call> y", " 7 ", "", 7, -0.5, True, None, [1, "ä<think>"], {"k": {"l": []}}]


def dialogue(seed: int) -> dict:
    """Arguments of `render`: systems, users, several steps of calls and results, in both modes."""
    draw = random.Random(seed)

    def text() -> str:
        return "".join(draw.choice(WORDS) for _ in range(draw.randrange(5)))

    def assistant(calls: int) -> dict:
        turn = {"role": "assistant", "content": text()}
        if draw.random() < 0.7:
            turn["reasoning_content"] = text()
        if calls:
            some = [{"name": "find", "arguments": {kind: draw.choice(VALUES) for kind in KINDS[: draw.randrange(4)]}}]
            turn["tool_calls"] = [*some, {"type": "function", "function": {"name": "now", "arguments": {}}}][:calls]
        return turn

    messages = [{"role": "system", "content": text()} for _ in range(draw.randrange(3))]
    for _ in range(draw.randrange(1, 4)):
        messages.append({"role": "user", "content": text()})
        for _ in range(draw.randrange(3)):
            calls = draw.randrange(1, 3)
            messages.append(assistant(calls))
            messages += [{"role": "tool", "content": text()} for _ in range(calls)]
        if draw.random() < 0.8:
            messages.append(assistant(0))
    tools = TOOLS if draw.random() < 0.6 else None
    return {
        "messages": messages,
        "tools": tools,
        "enable_thinking": draw.random() < 0.5,
        "add_generation_prompt": draw.random() < 0.5,
    }


def trained_by_reading(ids: list[int], thinking: bool) -> list[bool]:
    """The mask from the finished ids alone: a reader that knows role tokens, and nothing of messages."""
    users = [place for place, i in enumerate(ids[:-1]) if i == USER]  # a <|user|> at the very end only closes
    writing, in_prompt, mask = False, False, []
    for place, i in enumerate(ids):
        mask.append(writing and not in_prompt and i not in (ASSISTANT, SYSTEM))
        if i in (USER, OBSERVATION, SYSTEM):
            writing = False
        elif i == ASSISTANT:
            writing = not thinking or place > max(users, default=-1)
            in_prompt = not thinking
        elif i == CLOSE_THINK:
            in_prompt = False
    return mask


def test_trained_tokens_are_an_independent_readers_on_200_dialogues():
    seen = set()
    for seed in range(200):
        given_ = dialogue(seed)
        rendered = render_tokens(TOKENIZER, **given_)
        assert rendered.trained == trained_by_reading(rendered.ids, given_["enable_thinking"]), seed
        closing = {rendered.ids[place] for place, learnt in enumerate(rendered.trained) if learnt} & {USER, OBSERVATION}
        seen |= {(given_["enable_thinking"], i) for i in closing}
    assert seen == {(mode, i) for mode in (True, False) for i in (USER, OBSERVATION)}  # none of it was vacuous


def test_tokens_are_the_text_and_nothing_typed_becomes_a_special_token():
    specials = {TOKENIZER.id(name) for name in SPECIAL_TOKENS}
    for seed in range(200):
        given_ = dialogue(seed)
        for message in given_["messages"]:  # without it the template looks for a typed </think>
            message.setdefault("reasoning_content", "")
        closed = not given_["add_generation_prompt"] and given_["messages"][-1]["role"] == "assistant"
        ids = render_tokens(TOKENIZER, **given_).ids
        assert TOKENIZER.decode(ids[: len(ids) - closed]) == render(**given_)
        meek = without_specials(given_)
        meek_ids = render_tokens(TOKENIZER, **meek).ids
        assert meek_ids[: len(meek_ids) - closed] == TOKENIZER.encode(render(**meek), special=True)
        assert [i for i in ids if i in specials] == [i for i in meek_ids if i in specials]


def without_specials(value):
    if isinstance(value, dict):
        return {key: without_specials(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_specials(item) for item in value]
    for name in SPECIAL_TOKENS if isinstance(value, str) else ():
        value = value.replace(name, "(" + name[1:])
    return value


def test_published_template_renders_the_200_dialogues_to_the_same_bytes():
    digest = hashlib.sha256()
    for seed in range(200):
        digest.update(render(**dialogue(seed)).encode())
    assert digest.hexdigest() == "348572cda31649498c93a568b7207dc21f445c5aedd336a184d68fadd67d586c"


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
