"""The `chat_template.jinja` in a checkpoint's folder: what of a dialogue's text belongs to the checkpoint.

GLM-4.5's format is `glm_jax.text.chat`'s; the English around the tools is the checkpoint's own and is taken from its
template. A template that differs in anything else is refused, so that text, ids, mask and parser speak of one format.
Ours is `chat_template.jinja` beside this file: the same format with our own words, and what a checkpoint of ours carries.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from glm_jax.config import ConfigError

TEMPLATE_FILE = "chat_template.jinja"
OUR_TEMPLATE = Path(__file__).with_name(TEMPLATE_FILE).read_text(encoding="utf-8")


class TemplateError(ConfigError):
    """A template that is not GLM-4.5's. The message has what it writes, what was expected and a way out."""


@dataclass(frozen=True)
class Wording:
    """The text of the tools block around the descriptions, special tokens included: all up to them, and all after."""

    before: str
    after: str


def show(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    enable_thinking: bool = True,
    add_generation_prompt: bool = True,
) -> str:
    """The dialogue as Jinja renders it in its sandbox, with the settings and filters that transformers gives it."""
    from jinja2 import TemplateError as JinjaError

    compiled = _compiled(template)
    switches = {"enable_thinking": enable_thinking, "add_generation_prompt": add_generation_prompt}
    try:
        return compiled.render(messages=messages, tools=tools, **switches)
    except (JinjaError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise TemplateError(f"the chat template fails: {type(error).__name__}: {error}; {_WAY_OUT}") from None


@cache
def wording(template: str) -> Wording:
    """The template's words about tools, after checking that it writes all else as ours does."""
    found, ours = _wording(template), _wording(OUR_TEMPLATE)
    for arguments in _PROBES:
        expected, written = show(OUR_TEMPLATE, **arguments), show(template, **arguments)
        if arguments.get("tools"):
            expected = found.before + expected.removeprefix(ours.before).replace(ours.after, found.after, 1)
        if written != expected:
            pairs = enumerate(zip(written, expected, strict=False))
            place = next((i for i, (a, b) in pairs if a != b), min(len(written), len(expected)))
            raise TemplateError(
                f"the chat template is not GLM-4.5's: where that writes {_excerpt(expected, place)}, "
                f"it writes {_excerpt(written, place)}; {_WAY_OUT}"
            )
    return found


def _wording(template: str) -> Wording:
    asked = [{"role": "user", "content": "?"}]
    before, line, after = show(template, asked, _TOOLS[:1]).partition(json.dumps(_TOOLS[0], ensure_ascii=False) + "\n")
    rest = show(template, asked).removeprefix("[gMASK]<sop>")
    if not line or not before.startswith("[gMASK]<sop><|system|>\n") or not after.endswith(rest):
        raise TemplateError(
            "the chat template has no tools block as GLM-4.5's has it, after [gMASK]<sop><|system|> with one JSON "
            f"description on each line: it begins {before[:60]!r}; {_WAY_OUT}"
        )
    return Wording(before, after.removesuffix(rest))


def _excerpt(text: str, place: int) -> str:
    return repr(text[max(0, place - 30) : place + 30])


@cache
def _compiled(template: str) -> Any:
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    try:
        return environment.from_string(template)
    except TemplateSyntaxError as error:
        raise TemplateError(
            f"the chat template is no Jinja: line {error.lineno}: {error.message}; {_WAY_OUT}"
        ) from None


def _tojson(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
    """Jinja's own would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **layout)


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


_WAY_OUT = f"use a GLM-4.5 checkpoint's {TEMPLATE_FILE}, or delete the file to have this project's own"
_TOOLS = (
    {"name": "f", "description": "ä <b>", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}},
    {"type": "function", "function": {"name": "g", "description": "", "parameters": {"type": "object"}}},
)
_CALL = {"name": "f", "arguments": {"x": "é <b>\n1", "n": -1.5, "list": [None, {"ü": True}]}}
_TURNS = (
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U "},
    {"role": "assistant", "content": "\n<think>\nR\n</think>\n\nA "},
    {"role": "system", "content": [{"type": "text", "text": "S"}, " 2"]},
    {"role": "user", "content": "U 2 /nothink"},
    {"role": "assistant", "content": " A\n", "reasoning_content": " R\n", "tool_calls": [_CALL, {"function": _CALL}]},
    {"role": "tool", "content": " T"},
    {"role": "tool", "content": "T 2\n"},
    {"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": [{"name": "g", "arguments": {}}] * 2},
    {"role": "tool", "content": ["T 3", {"output": "T 4"}]},
    {"role": "assistant", "content": "A 2"},
)
_PROBES = tuple(
    {"messages": _TURNS[:end], "tools": tools, "enable_thinking": thinking, "add_generation_prompt": prompt}
    for end, tools, prompt in ((3, None, False), (6, _TOOLS, False), (10, _TOOLS, True), (11, None, True))
    for thinking in (True, False)
)
