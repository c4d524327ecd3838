"""What the model wrote in its turn: reasoning, content and tool calls (spec section 7.1; the format is `chat.render`'s).

One machine reads tags and the text between them; batch and streaming share it, so they agree at every split. The
status is the first thing that was wrong, and serves as a reward signal:

    ok               the format is kept
    unclosed_think   the reasoning has no </think>: it ended at a <tool_call>, or with the text
    unclosed_call    the text ended inside a call
    missing_name     a call without a name
    malformed_call   a call whose tags are out of order, or with text between them, or an argument given twice
    unknown_tool     a call of a tool that was not given
    invalid_json     an argument that should be JSON and is not; its value stays the raw text
    text_after_call  text after a call; the template shows content before calls only
    stray_tag        a tag or a control token where none belongs

What is not a call (unclosed, malformed, without a name) stays content, as text: nothing is lost.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from glm_jax.text.chat import Tool, parameters, stop_ids
from glm_jax.text.tokenizer import SPECIAL_TOKENS, Tokenizer

_TAGS = SPECIAL_TOKENS[:18] + SPECIAL_TOKENS[21:31]  # control tokens, and <think> ... </arg_value>
_TAG = re.compile("(" + "|".join(map(re.escape, _TAGS)) + ")")
_BEGUN = frozenset(tag[:length] for tag in _TAGS for length in range(1, len(tag)))
_LONGEST = max(map(len, _TAGS))

_OUTSIDE = ("start", "reasoning", "content")
_NEXT = {  # state, tag -> state
    ("start", "<think>"): "reasoning",
    ("reasoning", "</think>"): "content",
    **{(state, "<tool_call>"): "name" for state in _OUTSIDE},
    ("name", "<arg_key>"): "key",
    ("pairs", "<arg_key>"): "key",
    ("key", "</arg_key>"): "equals",
    ("equals", "<arg_value>"): "value",
    ("value", "</arg_value>"): "pairs",
    ("name", "</tool_call>"): "content",
    ("pairs", "</tool_call>"): "content",
    ("broken", "</tool_call>"): "content",  # any other tag there changes nothing
}


def parse(text: str, tools: Sequence[Tool] | None = None) -> dict[str, Any]:
    """Reasoning, content, tool calls and status of the text written after a generation prompt, less the stop token.

    `reasoning_content` is None if there is no `<think>` (direct mode), "" if it is empty; `content` is None if blank.
    A value is raw text if its schema says string, else JSON. Without a schema JSON is tried and text is as good.
    """
    parser = StreamParser(tools)
    parser.feed(text)
    return parser.close()


def parse_tokens(tokenizer: Tokenizer, ids: Sequence[int], tools: Sequence[Tool] | None = None) -> dict[str, Any]:
    """`parse` of sampled ids: tags are the special tokens, a tag spelt out as plain text is text. A last stop is left out."""
    ids = [int(i) for i in ids]
    if ids and ids[-1] in stop_ids(tokenizer):
        ids.pop()
    names = {tokenizer.id(tag): tag for tag in _TAGS}
    parser, start = StreamParser(tools), 0
    for place in [*(place for place, i in enumerate(ids) if i in names), len(ids)]:
        parser.read_text(tokenizer.decode(ids[start:place]))
        if place < len(ids):
            parser.read_tag(names[ids[place]])
        start = place + 1
    return parser.close()


class StreamParser:
    """`parse`, a piece at a time.

    `feed` returns what is new, a list of `{"reasoning_content": text}`, `{"content": text}` and
    `{"tool_call": {"name", "arguments"}}`; a call comes whole, with its closing tag. Joined they are what `close`
    returns, except for what is left at the end: half a tag, or an unclosed call, is text only there.
    """

    def __init__(self, tools: Sequence[Tool] | None = None):
        self._tools = None if tools is None else parameters(tools)
        self._held = ""  # may be the beginning of a tag
        self._state = "start"
        self._status = "ok"
        self._reasoning: str | None = None
        self._content = ""
        self._calls: list[dict[str, Any]] = []
        self._space = ""  # white space that counts only if text follows
        self._call = ""  # the call being read, as written
        self._field = ""  # its name, key or value being read
        self._name, self._key, self._pairs = "", "", {}
        self._new: list[dict[str, Any]] = []

    def feed(self, piece: str) -> list[dict[str, Any]]:
        *parts, rest = _TAG.split(self._held + piece)
        for text, tag in zip(parts[::2], parts[1::2], strict=True):
            self.read_text(text)
            self.read_tag(tag)
        held = next((n for n in range(min(_LONGEST, len(rest)), 0, -1) if rest[-n:] in _BEGUN), 0)
        self._held = rest[len(rest) - held :]
        self.read_text(rest[: len(rest) - held])
        new, self._new = self._new, []
        return new

    def close(self) -> dict[str, Any]:
        """The same dict as `parse` of the whole text."""
        self.read_text(self._held)
        self._held = ""
        if self._state == "reasoning":
            self._flag("unclosed_think")
        elif self._state not in _OUTSIDE:
            self._flag("unclosed_call")
            self._say("content", self._call)
        return {
            "reasoning_content": self._reasoning,
            "content": self._content or None,
            "tool_calls": self._calls,
            "status": self._status,
        }

    def read_text(self, text: str) -> None:
        """Text without tags."""
        if not text:
            return
        if self._state in _OUTSIDE:
            if self._state == "start" and text.strip():
                self._state = "content"
            if self._state == "content" and self._calls and text.strip():
                self._flag("text_after_call")
            self._say(self._state, text)
            return
        self._call += text
        self._field += text

    def read_tag(self, tag: str) -> None:
        """One of the format's tags, or a control token."""
        before, after = self._state, _NEXT.get((self._state, tag))
        if before == "value" and after is None:
            self.read_text(tag)  # code may talk of tags; only </arg_value> ends a value
        elif before in _OUTSIDE and after is None:
            self._flag("stray_tag")
            self.read_text(tag)
        elif before in _OUTSIDE:
            if tag == "<think>":
                self._reasoning = ""
            elif tag == "<tool_call>":
                if before == "reasoning":
                    self._flag("unclosed_think")
                self._call, self._field, self._pairs = tag, "", {}
            self._state = str(after)
        else:
            self._call += tag
            self._inside_call(tag, after)

    def _inside_call(self, tag: str, after: str | None) -> None:
        wrong = None if after else "malformed_call"
        if after and self._state == "name":
            name, _, rest = self._field.partition("\n")
            self._name = name.strip()
            wrong = "missing_name" if not self._name else "malformed_call" if rest.strip() else None
        elif after and self._state == "key":
            self._key = self._field
            wrong = "malformed_call" if self._key in self._pairs else None
        elif self._state == "value":
            self._pairs[self._key] = self._field
        elif self._field.strip():  # text between the pairs
            wrong = "malformed_call"
        self._field = ""
        if wrong:
            self._flag(wrong)
            self._state = "broken"
        if tag == "</tool_call>":
            self._end_call(whole=self._state != "broken")
            self._state = "content"
        elif self._state != "broken":
            self._state = str(after)

    def _end_call(self, whole: bool) -> None:
        if not whole:
            self._say("content", self._call)
            return
        if self._tools is not None and self._name not in self._tools:
            self._flag("unknown_tool")
        schemas = (self._tools or {}).get(self._name, {})
        arguments = {key: self._value(text, schemas.get(key)) for key, text in self._pairs.items()}
        self._calls.append({"name": self._name, "arguments": arguments})
        self._new.append({"tool_call": self._calls[-1]})

    def _value(self, text: str, schema: Any) -> Any:
        types = _types(schema)
        if types == {"string"}:
            return text
        try:
            value = json.loads(text)
            json.dumps(value, allow_nan=False, ensure_ascii=False).encode()  # 1e999 and lone surrogates are no JSON
        except (ValueError, RecursionError):
            if types and "string" not in types:
                self._flag("invalid_json")
            return text
        text_will_do = not types or "string" in types  # and the template shows text raw, never as a JSON string
        return text if isinstance(value, str) and text_will_do else value

    def _flag(self, status: str) -> None:
        if self._status == "ok":
            self._status = status

    def _say(self, where: str, text: str) -> None:
        """Add to reasoning or content, white space at either end left out."""
        key = "reasoning_content" if where == "reasoning" else "content"
        so_far = (self._reasoning or "") if where == "reasoning" else self._content
        text = self._space + text
        kept = text.rstrip() if so_far else text.strip()
        self._space = text[len(text.rstrip()) :] if so_far or kept else ""
        if not kept:
            return
        if where == "reasoning":
            self._reasoning = so_far + kept
        else:
            self._content = so_far + kept
        self._new.append({key: kept})


def _types(schema: Any) -> set[str]:
    """The JSON types that a schema allows; empty if it does not say."""
    if not isinstance(schema, Mapping):
        return set()
    if "type" in schema:
        return {schema["type"]} if isinstance(schema["type"], str) else set(schema["type"])
    if "enum" in schema or "const" in schema:
        return {_type(value) for value in schema.get("enum", [schema.get("const")])}
    return {name for key in ("anyOf", "oneOf", "allOf") for part in schema.get(key, ()) for name in _types(part)}


def _type(value: Any) -> str:
    names = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
    return names.get(type(value), "null")
