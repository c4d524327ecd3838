import pytest

from glm_jax.text.chat import DialogueError, render_tokens
from glm_jax.text.parse import StreamParser, parse, parse_tokens
from glm_jax.text.tokenizer import train

TOOLS = [
    {"name": "now", "description": "", "parameters": {"type": "object", "properties": {}}},
    {
        "name": "find",
        "description": "",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}, "most": {"type": "integer"}}},
    },
]
FIND = (
    "<tool_call>find\n<arg_key>query</arg_key>\n<arg_value>a < b\n</arg_value>\n"
    "<arg_key>most</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"
)
NOW = "<tool_call>now\n</tool_call>"
FOUND = {"name": "find", "arguments": {"query": "a < b\n", "most": 3}}
ASKED = {"name": "now", "arguments": {}}


@pytest.fixture(scope="module")
def tokenizer():
    return train(["find now query\n" * 3], 512)


def streamed(text: str, width: int) -> tuple[list[dict], dict]:
    parser = StreamParser(TOOLS)
    events = [event for place in range(0, len(text), width) for event in parser.feed(text[place : place + width])]
    return events, parser.close()


@pytest.mark.parametrize(
    "text, reasoning, content, calls, status",
    [
        ("\n<think>R</think>\nA", "R", "A", [], "ok"),
        ("\n<think>R\n\n</think>\n\n A \n", "R", "A", [], "ok"),
        ("\n<think></think>\nA", "", "A", [], "ok"),
        ("\nA direct answer", None, "A direct answer", [], "ok"),
        ("", None, None, [], "ok"),
        ("\n<think>R</think>\nA\n" + FIND + "\n" + NOW, "R", "A", [FOUND, ASKED], "ok"),
        ("\n<think>R</think>" + NOW, "R", None, [ASKED], "ok"),
        ("\n<think>R and so", "R and so", None, [], "unclosed_think"),
        ("\n" + NOW + "\nmore", None, "more", [ASKED], "text_after_call"),
        ("R</think>\nA", None, "R</think>\nA", [], "stray_tag"),
        ("\n<think>R<think>S</think>A", "R<think>S", "A", [], "stray_tag"),
        ("\nA<|assistant|>B", None, "A<|assistant|>B", [], "stray_tag"),
        ("<tool_call>\n</tool_call>", None, "<tool_call>\n</tool_call>", [], "missing_name"),
        ("<tool_call>later\n</tool_call>", None, None, [{"name": "later", "arguments": {}}], "unknown_tool"),
    ],
)
def test_reasoning_content_calls_and_status(text, reasoning, content, calls, status):
    told = {"reasoning_content": reasoning, "content": content, "tool_calls": calls, "status": status}
    assert parse(text, TOOLS) == told


@pytest.mark.parametrize(
    "inside",
    [
        "now\nwith words\n",
        "find\n<arg_value>x</arg_value>\n",
        "find\n<arg_key>query</arg_key>\n",
        "find\n<arg_key>query",
        "find\n<arg_key>query</arg_key> is <arg_value>x</arg_value>\n",
        "find\n<arg_key>query</arg_key>\n<arg_value>x</arg_value> and\n",
        "find\n<arg_key>query</arg_key>\n<arg_value>x</arg_value>\n<arg_key>query</arg_key>\n<arg_value>y</arg_value>\n",
        "find\n<tool_call>now\n",
    ],
)
def test_a_malformed_call_is_not_made_and_the_next_one_is(inside):
    told = parse(f"<tool_call>{inside}</tool_call>\n{NOW}", TOOLS)
    assert told["status"] == "malformed_call"
    assert told["tool_calls"] == [ASKED]
    assert told["content"] == f"<tool_call>{inside}</tool_call>"


# Bugs that parsers of this format have had (vLLM's issue numbers).


def test_reasoning_after_a_tools_turn_does_not_leak_into_content_27703(tokenizer):
    step = {"role": "assistant", "content": "", "reasoning_content": "first", "tool_calls": [FOUND]}
    answer = {"role": "assistant", "content": "A", "reasoning_content": "second"}
    messages = [{"role": "user", "content": "U"}, step, {"role": "tool", "content": "T"}]
    prompt = render_tokens(tokenizer, messages, TOOLS).ids
    written = render_tokens(tokenizer, [*messages, answer], TOOLS, add_generation_prompt=False).ids[len(prompt) :]
    told = {"reasoning_content": "second", "content": "A", "tool_calls": [], "status": "ok"}
    assert parse_tokens(tokenizer, written, TOOLS) == told
    events, _ = streamed(tokenizer.decode(written[:-1]), 1)
    assert "".join(event.get("content", "") for event in events) == "A"


@pytest.mark.parametrize("width", [1, 5, 1000])
def test_a_call_inside_the_reasoning_ends_it_42400(width):
    events, told = streamed("\n<think>I look it up." + FIND, width)
    assert told == {
        "reasoning_content": "I look it up.",
        "content": None,
        "tool_calls": [FOUND],
        "status": "unclosed_think",
    }
    assert events[-1] == {"tool_call": FOUND}


@pytest.mark.parametrize("call", [NOW, "<tool_call>now</tool_call>"])
@pytest.mark.parametrize("width", [1, 2, 7, 1000])
def test_a_call_without_arguments_streams_44326(call, width):
    events, told = streamed(call, width)
    assert events == [{"tool_call": ASKED}]
    assert told["tool_calls"] == [ASKED]


@pytest.mark.parametrize("width", range(1, 40))
def test_no_name_or_argument_is_cut_or_lost_when_pieces_are_long_39253_39757(width):
    events, told = streamed(FIND + FIND, width)
    assert events == [{"tool_call": FOUND}] * 2
    assert told == parse(FIND + FIND, TOOLS)


@pytest.mark.parametrize("length", range(len("<tool_call>"), len(FIND)))
def test_an_unclosed_call_is_not_a_call_and_stays_text(length):
    cut = FIND[:length]
    events, told = streamed("A\n" + cut, 3)
    assert told["tool_calls"] == []
    assert told["status"] == "unclosed_call"
    assert told["content"] == ("A\n" + cut).strip()
    assert not [event for event in events if "tool_call" in event]


def test_text_comes_as_it_is_written_but_never_half_a_tag():
    parser = StreamParser(TOOLS)
    assert parser.feed("\n<thi") == []
    assert parser.feed("nk>so ") == [{"reasoning_content": "so"}]
    assert parser.feed("on <") == [{"reasoning_content": " on"}]
    assert parser.feed("3 </") == [{"reasoning_content": " <3"}]
    assert parser.feed("think>\n\nA") == [{"content": "A"}]
    assert parser.close() == parse("\n<think>so on <3 </think>\n\nA")


# Values and their schemas.


def value(text: str, schema: dict | None) -> tuple:
    properties = {} if schema is None else {"x": schema}
    tools = [{"name": "f", "description": "", "parameters": {"type": "object", "properties": properties}}]
    told = parse(f"<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>{text}</arg_value>\n</tool_call>", tools)
    return told["tool_calls"][0]["arguments"]["x"], told["status"]


@pytest.mark.parametrize(
    "text, schema, expected",
    [
        ("12", {"type": "string"}, "12"),
        (" true ", {"type": "string"}, " true "),
        ("12", {"type": "integer"}, 12),
        ("false", {"type": "boolean"}, False),
        ('{"a": [null]}', {"type": "object"}, {"a": [None]}),
        ("12", {"enum": ["12", "13"]}, "12"),
        ("12", {"enum": [12, 13]}, 12),
        ("x", {"anyOf": [{"type": "string"}, {"type": "null"}]}, "x"),
        ("null", {"anyOf": [{"type": "string"}, {"type": "null"}]}, None),
        ('"x"', {"type": ["string", "null"]}, '"x"'),
        ("12", None, 12),
        ("word", None, "word"),
        ('"x"', None, '"x"'),
    ],
)
def test_a_value_is_text_or_json_as_its_schema_says(text, schema, expected):
    got, status = value(text, schema)
    assert (got, type(got), status) == (expected, type(expected), "ok")


@pytest.mark.parametrize(
    "schema, expected",
    [
        ({"$ref": "#/$defs/City"}, "12"),
        ({"$ref": "#/$defs/Alias", "description": "where"}, "12"),
        ({"allOf": [{"$ref": "#/$defs/City"}]}, "12"),
        ({"$ref": "#/$defs/Many"}, 12),
        ({"$ref": "#/$defs/absent"}, 12),
        ({"$ref": "elsewhere.json"}, 12),
        ({"$ref": "#/$defs/Endless"}, 12),
    ],
)
def test_the_type_may_stand_behind_a_reference(schema, expected):
    defs = {
        "City": {"enum": ["12", "13"]},
        "Alias": {"$ref": "#/$defs/City"},
        "Many": {"anyOf": [{"type": "integer"}, {"$ref": "#/$defs/None"}]},
        "None": {"type": "null"},
        "Endless": {"$ref": "#/$defs/Endless"},
    }
    tools = [{"name": "f", "parameters": {"type": "object", "properties": {"x": schema}, "$defs": defs}}]
    told = parse("<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>12</arg_value>\n</tool_call>", tools)
    assert (told["tool_calls"], told["status"]) == ([{"name": "f", "arguments": {"x": expected}}], "ok")


@pytest.mark.parametrize("text", ["ten", "", "{'a': 1}", "NaN", "-Infinity", "1e999", '"\\ud800"', "[" * 100_000])
def test_what_is_no_json_stays_text_and_is_told(text):
    assert value(text, {"type": "integer"}) == (text, "invalid_json")


def test_without_tools_any_name_is_a_call():
    assert parse("<tool_call>later\n</tool_call>")["status"] == "ok"
    with pytest.raises(DialogueError, match="parameters"):
        parse("", [{"name": "f"}])


# Tokens.


def test_a_tag_spelt_out_in_plain_text_is_text(tokenizer):
    spelt = tokenizer.encode("\n" + NOW)
    assert parse_tokens(tokenizer, spelt, TOOLS)["content"] == NOW
    assert parse_tokens(tokenizer, spelt, TOOLS)["status"] == "ok"
    assert parse_tokens(tokenizer, tokenizer.encode("\n" + NOW, special=True), TOOLS)["tool_calls"] == [ASKED]


@pytest.mark.parametrize("stop", ["<|endoftext|>", "<|user|>", "<|observation|>"])
def test_one_stop_token_at_the_end_is_left_out(tokenizer, stop):
    ids = tokenizer.encode("\nA")
    assert parse_tokens(tokenizer, [*ids, tokenizer.id(stop)]) == parse_tokens(tokenizer, ids)
    assert parse_tokens(tokenizer, [*ids, tokenizer.id(stop), *ids])["status"] == "stray_tag"
    assert parse_tokens(tokenizer, []) == parse("")
