"""GLM-4.5's chat template (spec section 7.1): dialogues as text, and as ids with the tokens that are trained.

A message is `{"role", "content", "reasoning_content"?, "tool_calls"?: [{"name", "arguments"}]}`, a tool
`{"name", "description", "parameters"}`; OpenAI's `{"type": "function", "function": ...}` around either is unwrapped.
A message of role tool may hold several results, as a list. The words around the tools' descriptions are the checkpoint's
(`glm_jax.text.template`). There is no end-of-turn token: the next role token ends a turn, so an assistant learns to write it.

Sampled tokens are never rendered again: `observation_tokens` and `question_tokens` go on from the ids.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from glm_jax.config import ConfigError, nearest
from glm_jax.text.template import OUR_TEMPLATE, wording
from glm_jax.text.tokenizer import SPECIAL_TOKENS, Tokenizer

Message = Mapping[str, Any]
Tool = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")
STOPS = ("<|endoftext|>", "<|user|>", "<|observation|>")
_SWITCH = "/nothink"
_NO_THOUGHT = "\n<think></think>"
_SPECIAL = re.compile("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")")


class DialogueError(ConfigError):
    """A dialogue that the template cannot show. The message has the place, the rule and a way out."""


@dataclass(frozen=True)
class Rendered:
    """A dialogue in tokens; `trained` marks those whose prediction is learnt."""

    ids: list[int]
    trained: list[bool]


@dataclass(frozen=True)
class _Part:
    """A stretch of the rendered text. Special tokens in the template's own text are tokens, in typed text they are not."""

    text: str
    typed: bool = False
    trained: bool = False


def render(
    messages: Sequence[Message],
    tools: Sequence[Tool] | None = None,
    enable_thinking: bool = True,
    add_generation_prompt: bool = True,
    template: str = OUR_TEMPLATE,
) -> str:
    """The dialogue as GLM-4.5's published `chat_template.jinja` shows it, byte for byte (content `None` reads as "").

    Our own words stand around the tools; a checkpoint's come with `template`, the text of the file in its folder.
    """
    return "".join(part.text for part in _parts(messages, tools, enable_thinking, add_generation_prompt, template))


def render_tokens(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None = None,
    enable_thinking: bool = True,
    add_generation_prompt: bool = True,
) -> Rendered:
    """`render` in ids, with the tokenizer's template: its tags are special tokens, whatever anybody typed is plain text.

    Trained is what the model writes: all after `<|assistant|>`, and the one role token that ends the turn. With
    thinking these are the turns after the last user message, as the reasoning of earlier ones is blanked; in direct
    mode every turn, less its `<think>` block, which the prompt gives. A dialogue that ends with an assistant's turn,
    no generation prompt added, gets the closing token too: `<|observation|>` after calls, else `<|user|>`.
    """
    parts = [*_parts(messages, tools, enable_thinking, add_generation_prompt, tokenizer.template)]
    if not add_generation_prompt and messages[-1]["role"] == "assistant":
        parts.append(_Part("<|observation|>" if messages[-1].get("tool_calls") else "<|user|>", trained=True))
    return _encode(tokenizer, parts)


def observation_tokens(tokenizer: Tokenizer, results: Sequence[str], enable_thinking: bool = True) -> list[int]:
    """What follows a sampled `<|observation|>`: the tools' results and the next generation prompt.

    Appended to the sampled ids it continues a rollout token in, token out; nothing sampled is rendered again.
    """
    if isinstance(results, str) or not results:
        raise DialogueError(f"results={results!r} must be a list of texts, one for each call")
    parts = [part for result in results for part in _tool_response(_text(result, "a tool's result", listed=False))]
    return _encode(tokenizer, [*parts, _generation_prompt(enable_thinking)]).ids


def question_tokens(tokenizer: Tokenizer, ids: Sequence[int], content: Any, enable_thinking: bool = True) -> list[int]:
    """The prompt of the user's next question: `ids`, all that was read and sampled so far, then `content`.

    As the template has it, a new question blanks the thoughts before it, which here are cut out of the ids, and
    `<|user|>` ends the turn before, whatever other stop did or none; what else was sampled stays as it was sampled.
    """
    ids = [int(i) for i in ids]
    before = ids[:-1] if ids and ids[-1] in stop_ids(tokenizer) else ids
    parts = [*_user(_text(content, "the question"), enable_thinking), _generation_prompt(enable_thinking)]
    return [*_without_thoughts(tokenizer, before), tokenizer.id("<|user|>"), *_encode(tokenizer, parts).ids]


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end a turn: `<|endoftext|>`, `<|user|>`, `<|observation|>`."""
    return tuple(tokenizer.id(name) for name in STOPS)


def unwrap(function: Any) -> Any:
    """A tool or a tool call without OpenAI's `{"type": "function", "function": ...}` around it."""
    return (function.get("function") or function) if isinstance(function, Mapping) else function


def parameters(tools: Sequence[Tool]) -> dict[str, dict[str, Any]]:
    """The schema of every parameter of every tool: name of the tool -> name of the parameter -> JSON schema.

    References into the tool's own schema ("$ref": "#/$defs/...") are followed.
    """
    found = {}
    for place, tool in enumerate(map(unwrap, tools)):
        name = tool.get("name") if isinstance(tool, Mapping) else None
        if not name or not isinstance(name, str):
            raise DialogueError(f"tools[{place}]={tool!r} has no name; give name, description and parameters")
        schema = tool.get("parameters")
        if not isinstance(schema, Mapping) or schema.get("type") != "object":
            raise DialogueError(
                f"tool {name!r} has parameters={schema!r}, which must be a JSON schema of an object; "
                'without parameters use {"type": "object", "properties": {}}'
            )
        properties = schema.get("properties") or {}
        found[name] = {parameter: _followed(part, schema) for parameter, part in properties.items()}
    return found


def _followed(schema: Any, root: Mapping[str, Any], depth: int = 8) -> Any:
    """`schema` with what its references into `root` name in their place, as deep as a parameter's type needs."""
    if not isinstance(schema, Mapping) or not depth:
        return schema
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        target: Any = root
        for key in reference.removeprefix("#/").split("/"):
            target = target.get(key) if isinstance(target, Mapping) else None
        target = _followed(target, root, depth - 1)
        return {**target, **schema} if isinstance(target, Mapping) else schema
    choices = {key: schema[key] for key in ("anyOf", "oneOf", "allOf") if isinstance(schema.get(key), list | tuple)}
    return {**schema, **{key: [_followed(part, root, depth - 1) for part in parts] for key, parts in choices.items()}}


def _parts(
    messages: Sequence[Message], tools: Sequence[Tool] | None, thinking: bool, generation_prompt: bool, template: str
) -> Iterator[_Part]:
    _check(messages)
    words = wording(template)
    if tools:
        parameters(tools)
        yield _Part(words.before)
        yield _Part("".join(_json(tool, "a tool") + "\n" for tool in tools), typed=True)
        yield _Part(words.after)
    else:
        yield _Part("[gMASK]<sop>")
    last_user = max((place for place, message in enumerate(messages) if message["role"] == "user"), default=-1)
    before, learnt = None, False  # role of the turn before, and whether it was trained
    for place, message in enumerate(messages):
        role, where = message["role"], f"messages[{place}]"
        if role == "assistant":
            after_user = place > last_user
            learnt = after_user or not thinking
            yield _Part("<|assistant|>")
            yield from _assistant(message, where, keep_reasoning=after_user, thinking=thinking, learnt=learnt)
        else:
            content = message.get("content")
            if role == "system":
                yield _Part("<|system|>\n")
                yield _Part(_text(content, where), typed=True)
            elif role == "user":
                yield _Part("<|user|>", trained=learnt)
                yield from _user(_text(content, where), thinking)
            else:
                if before != "tool" or isinstance(content, list | tuple):
                    yield _Part("<|observation|>", trained=learnt)
                for result in _results(content):
                    yield from _tool_response(_text(result, where, listed=False))
            learnt = False
        before = role
    if generation_prompt:
        yield _generation_prompt(thinking)


def _assistant(message: Message, where: str, keep_reasoning: bool, thinking: bool, learnt: bool) -> Iterator[_Part]:
    reasoning, content = message.get("reasoning_content"), _text(message.get("content"), where)
    if reasoning is None:
        reasoning = ""
        if "</think>" in content:  # a model's raw output
            reasoning = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
            content = content.split("</think>")[-1].lstrip("\n")
    reasoning = _text(reasoning, f"{where}['reasoning_content']")
    yield _Part("\n<think>", trained=thinking and learnt)
    yield _Part(reasoning.strip() if keep_reasoning else "", typed=True, trained=thinking and learnt)
    yield _Part("</think>", trained=thinking and learnt)
    if content.strip():
        yield _Part("\n" + content.strip(), typed=True, trained=learnt)
    for number, call in enumerate(message.get("tool_calls") or ()):
        name, arguments = _call(call, f"{where}['tool_calls'][{number}]")
        for text, typed in (("\n<tool_call>", False), (name, True), ("\n", False)):
            yield _Part(text, typed, learnt)
        for key, value in arguments.items():
            place = f"argument {key!r} of {where}"
            value = _text(value, place) if isinstance(value, str) else _json(value, place)
            pair = ("<arg_key>", key, "</arg_key>\n<arg_value>", value, "</arg_value>\n")
            for index, text in enumerate(pair):
                yield _Part(text, typed=index % 2 == 1, trained=learnt)
        yield _Part("</tool_call>", trained=learnt)


def _without_thoughts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """`ids` less what stands between <think> and </think>. A thought that was left open ends where the turn goes on."""
    begin, end = tokenizer.id("<think>"), tokenizer.id("</think>")
    goes_on = {tokenizer.id(name) for name in ("<tool_call>", "<|assistant|>", *STOPS)}
    kept: list[int] = []
    thinking = False
    for i in ids:
        if thinking and i in goes_on:
            kept.append(end)
        thinking = i == begin or (thinking and i != end and i not in goes_on)
        if i == begin or not thinking:
            kept.append(i)
    return [*kept, end] if thinking else kept


def _user(text: str, thinking: bool) -> Iterator[_Part]:
    yield _Part("\n")
    yield _Part(text if thinking else text.removesuffix(_SWITCH), typed=True)
    yield _Part("" if thinking else _SWITCH)


def _results(content: Any) -> Sequence[Any]:
    """The results in a tool's message: one, or as many as are listed, each a text or `{"output": text}`."""
    if not isinstance(content, list | tuple):
        return [content]
    return [result.get("output", result) if isinstance(result, Mapping) else result for result in content]


def _tool_response(text: str) -> Iterator[_Part]:
    yield _Part("\n<tool_response>\n")
    yield _Part(text, typed=True)
    yield _Part("\n</tool_response>")


def _generation_prompt(thinking: bool) -> _Part:
    return _Part("<|assistant|>" + ("" if thinking else _NO_THOUGHT))


def _encode(tokenizer: Tokenizer, parts: Sequence[_Part]) -> Rendered:
    """Ids of the parts. Plain text up to the next special token is encoded as one, as it would be in a document."""
    ids: list[int] = []
    trained: list[bool] = []
    plain, learn = "", False  # what waits to be encoded; what is trained changes at special tokens only

    def add(new: list[int]) -> None:
        ids.extend(new)
        trained.extend([learn] * len(new))

    for part in parts:
        for index, piece in enumerate([part.text] if part.typed else _SPECIAL.split(part.text)):
            if index % 2:  # split() puts the special tokens there
                add(tokenizer.encode(plain))
                plain, learn = "", part.trained
                add([tokenizer.id(piece)])
            elif piece:
                plain, learn = plain + piece, part.trained
    add(tokenizer.encode(plain))
    return Rendered(ids, trained)


def _check(messages: Sequence[Message]) -> None:
    if not messages:
        raise DialogueError("messages=[] is no dialogue; give at least one message")
    unanswered = 0
    for place, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ROLES:
            raise DialogueError(f"messages[{place}] has role={role!r}; {nearest(str(role), list(ROLES))}")
        calls = message.get("tool_calls") or ()
        if not isinstance(calls, list | tuple):
            raise DialogueError(
                f"messages[{place}] has tool_calls={calls!r}; give a list of calls, each with name and arguments"
            )
        results = len(_results(message.get("content"))) if role == "tool" else 0
        if results > unanswered:
            raise DialogueError(
                f"messages[{place}] is a tool's result without a call before it; put the call's turn first"
            )
        unanswered = unanswered - results if role == "tool" else len(calls)


def _text(content: Any, where: str, listed: bool = True) -> str:
    if content is None:
        return ""
    if listed and isinstance(content, list | tuple):  # OpenAI's {"type": "text", "text": ...}, or strings
        texts: list[Any] = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else content
    if not isinstance(content, str):
        raise DialogueError(f"{where}: content={content!r} must be text" + (" or a list of texts" if listed else ""))
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise DialogueError(f"{where} is not Unicode ({error}); decode its bytes with errors='replace'") from None
    return content


def _call(call: Any, where: str) -> tuple[str, Mapping[str, Any]]:
    call = unwrap(call)
    name = call.get("name") if isinstance(call, Mapping) else None
    if not name or not isinstance(name, str):
        raise DialogueError(f"{where}={call!r} has no name; give name and arguments")
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):  # as OpenAI's protocol sends them
        with suppress(ValueError):
            arguments = json.loads(arguments)
    if not isinstance(arguments, Mapping) or not all(isinstance(key, str) for key in arguments):
        raise DialogueError(
            f"{where}: arguments={arguments!r} of {name!r} must be a JSON object; without arguments use {{}}"
        )
    return name, arguments


def _json(value: Any, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise DialogueError(f"{where} is not JSON ({error}): {value!r}; use text, numbers, lists and objects") from None
