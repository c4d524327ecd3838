"""`render` and its token twin against GLM-4.5's published `chat_template.jinja`, on 600 generated dialogues.

The published file is not in this repository. What it writes is kept as digests, our words put in place of its own in the
tools block; where a copy is at hand, the bytes are compared:

    GLM_CHAT_TEMPLATE=FILE python -m pytest tests/parity/test_chat_template.py
    GLM_CHAT_TEMPLATE=FILE GOLDEN=update python -m pytest tests/parity/test_chat_template.py    # makes the digests again
"""

import hashlib
import json
import os
import random
from importlib.metadata import version
from pathlib import Path

import pytest
from chat_material import KINDS, TOKENIZER, TOOLS

from glm_jax.text.chat import render, render_tokens
from glm_jax.text.parse import parse_tokens
from glm_jax.text.template import OUR_TEMPLATE, show, wording
from glm_jax.text.tokenizer import SPECIAL_TOKENS, Tokenizer

GOLDEN = Path(__file__).parent / "golden" / "chat_template.json"
PUBLISHED = os.environ.get("GLM_CHAT_TEMPLATE")
SEEDS = range(600)
USER, ASSISTANT, OBSERVATION, SYSTEM, CLOSE_THINK = (
    TOKENIZER.id(name) for name in ("<|user|>", "<|assistant|>", "<|observation|>", "<|system|>", "</think>")
)
WORDS = [
    "a", "the weather", "12", "Zürich", "今日は", "\n", "\n\n", "  ", "", "\U0001f642", "e\u0301", "\u2028", "</b>", "<", '"&\'\\n',
    *SPECIAL_TOKENS,
]  # fmt: skip
TEXTS = ["x </tool_call> y", " 7 ", "", "true", "null", "[1, 2]", "ü\n\n"]
VALUES = [7, -0.5, 1e-7, 2**70, True, None, [1, "ä<think>"], [], {"k": {"l": []}}, {"<b>": "'"}]


def dialogue(seed: int) -> dict:
    """Arguments of `render`: systems, users, several steps of parallel calls and their results, in both modes."""
    draw = random.Random(seed)

    def text() -> str:
        return "".join(draw.choice(WORDS) for _ in range(draw.randrange(6)))

    def content() -> str | list:
        parts = [text(), {"type": "text", "text": text()}]
        return text() if draw.random() < 0.85 else draw.sample(parts, draw.randrange(3))

    def call() -> dict:
        properties = {kind: draw.choice(TEXTS) if kind == "string" else draw.choice(VALUES) for kind in KINDS}
        some = dict(draw.sample([*properties.items()], draw.randrange(4)))
        made = {"name": "find", "arguments": some} if draw.random() < 0.7 else {"name": "now", "arguments": {}}
        return made if draw.random() < 0.5 else {"type": "function", "function": made}

    def assistant(calls: int) -> dict:
        turn = {"role": "assistant", "content": content()}
        if draw.random() < 0.8:
            turn["reasoning_content"] = draw.choice(["", " \n", text(), "so " + text()])
        elif draw.random() < 0.5:  # a model's raw output
            turn["content"] = f"\n<think>{draw.choice(['', 'so', chr(10) + 'so' + chr(10)])}</think>\n\n{text()}"
        if calls:
            turn["tool_calls"] = [call() for _ in range(calls)]
        return turn

    def results(calls: int) -> list[dict]:
        if draw.random() < 0.1:
            listed = [draw.choice([text(), {"output": text()}]) for _ in range(calls)]
            return [{"role": "tool", "content": listed}]
        return [{"role": "tool", "content": text()} for _ in range(calls)]

    messages = [{"role": "system", "content": content()} for _ in range(draw.randrange(3))]
    for _ in range(draw.randrange(1, 4)):
        messages.append({"role": "user", "content": content()})
        for calls in [draw.randrange(1, 4) for _ in range(draw.randrange(3))]:
            messages += [assistant(calls), *results(calls)]
        if draw.random() < 0.8:
            messages.append(assistant(0))
    return {
        "messages": messages,
        "tools": TOOLS if draw.random() < 0.6 else None,
        "enable_thinking": draw.random() < 0.5,
        "add_generation_prompt": draw.random() < 0.5,
    }


DIALOGUES = [dialogue(seed) for seed in SEEDS]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def by_transformers(template: str, given: dict) -> str:
    module = pytest.importorskip("transformers.utils.chat_template_utils")
    switches = {name: given[name] for name in ("enable_thinking", "add_generation_prompt")}
    (text,), _ = module.render_jinja_template([given["messages"]], given["tools"], chat_template=template, **switches)
    return text


def update(template: str) -> None:
    """The published template's texts by transformers, with our words in the tools block, as digests."""
    found, ours = wording(template), wording(OUR_TEMPLATE)
    texts = (by_transformers(template, given) for given in DIALOGUES)
    texts = (text.replace(found.before, ours.before, 1).replace(found.after, ours.after, 1) for text in texts)
    made = {
        "template_sha256": hashlib.sha256(template.encode()).hexdigest(),
        "by": {name: version(name) for name in ("transformers", "jinja2")},
        "digests": " ".join(digest(text) for text in texts),
    }
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(made, indent=1) + "\n")


def test_render_writes_what_the_published_template_wrote():
    if PUBLISHED and os.environ.get("GOLDEN") == "update":
        update(Path(PUBLISHED).read_text())
    digests = json.loads(GOLDEN.read_text())["digests"].split()
    assert len(digests) == len(SEEDS) >= 500
    assert not [seed for seed in SEEDS if digest(render(**DIALOGUES[seed])) != digests[seed]]


@pytest.mark.skipif(not PUBLISHED, reason="GLM_CHAT_TEMPLATE names no published chat_template.jinja")
def test_with_a_checkpoints_template_render_writes_its_words_too():
    template = Path(str(PUBLISHED)).read_text()
    for seed, given in enumerate(DIALOGUES):
        assert render(**given, template=template) == by_transformers(template, given), seed


def test_our_own_template_is_the_same_text_in_jinja():
    for seed, given in enumerate(DIALOGUES):
        assert render(**given) == show(OUR_TEMPLATE, **given), seed


# ---- tokens


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


def test_trained_tokens_are_an_independent_readers():
    seen = set()
    for seed, given in enumerate(DIALOGUES):
        rendered = render_tokens(TOKENIZER, **given)
        assert rendered.trained == trained_by_reading(rendered.ids, given["enable_thinking"]), seed
        closing = {rendered.ids[place] for place, learnt in enumerate(rendered.trained) if learnt} & {USER, OBSERVATION}
        seen |= {(given["enable_thinking"], i) for i in closing}
    assert seen == {(mode, i) for mode in (True, False) for i in (USER, OBSERVATION)}  # none of it was vacuous


def test_tokens_are_the_text_and_nothing_typed_becomes_a_special_token():
    specials = {TOKENIZER.id(name) for name in SPECIAL_TOKENS}
    for given in DIALOGUES[:300]:
        closed = not given["add_generation_prompt"] and given["messages"][-1]["role"] == "assistant"
        ids = render_tokens(TOKENIZER, **given).ids
        assert TOKENIZER.decode(ids[: len(ids) - closed]) == render(**given)
        meek = without_specials(explicit(given))
        meek_ids = render_tokens(TOKENIZER, **meek).ids
        assert meek_ids[: len(meek_ids) - closed] == TOKENIZER.encode(render(**meek), special=True)
        assert [i for i in ids if i in specials] == [i for i in meek_ids if i in specials]


def explicit(given: dict) -> dict:
    """The same dialogue with every thought in its place, so that the template looks for none in the content."""
    messages = []
    for message in given["messages"]:
        if message["role"] == "assistant":
            text = content_of(message)
            thought = message.get("reasoning_content")
            if thought is None and "</think>" in text:
                thought = text.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
                text = text.split("</think>")[-1].lstrip("\n")
            message = {**message, "content": text, "reasoning_content": thought or ""}
        messages.append(message)
    return {**given, "messages": messages}


def content_of(message: dict) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(p if isinstance(p, str) else p["text"] for p in content)


def without_specials(value):
    if isinstance(value, dict):
        return {key: without_specials(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_specials(item) for item in value]
    for name in SPECIAL_TOKENS if isinstance(value, str) else ():
        value = value.replace(name, "(" + name[1:])
    return value


def test_the_tokens_of_every_turn_are_read_back_as_the_turn_that_was_rendered():
    turns = 0
    for given in DIALOGUES:
        given = explicit(given)
        thinking, messages = given["enable_thinking"], given["messages"]
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = render_tokens(TOKENIZER, messages[:place], TOOLS, thinking).ids if place else []
            if not thinking:
                message = {**message, "reasoning_content": ""}
            upto = render_tokens(TOKENIZER, [*messages[:place], message], TOOLS, thinking, False).ids
            assert upto[: len(prompt)] == prompt
            told = parse_tokens(TOKENIZER, upto[len(prompt) :], TOOLS)
            calls = [call.get("function", call) for call in message.get("tool_calls", ())]
            assert told["tool_calls"] == calls
            assert told["content"] == (message["content"].strip() or None)
            assert told["reasoning_content"] == (message["reasoning_content"].strip() if thinking else None)
            turns += 1
    assert turns > 1000


def test_the_tokenizers_template_is_the_one_its_ids_speak(tmp_path):
    other = OUR_TEMPLATE.replace("You can call these functions", "Diese Funktionen <think> gibt es")
    assert other != OUR_TEMPLATE
    TOKENIZER.save(tmp_path / "tokenizer.json")
    (tmp_path / "chat_template.jinja").write_text(other)
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    for given in DIALOGUES[:50]:
        text = render(**given, template=other)
        assert text == show(other, **given)
        closed = not given["add_generation_prompt"] and given["messages"][-1]["role"] == "assistant"
        ids = render_tokens(tokenizer, **given).ids
        assert tokenizer.decode(ids[: len(ids) - closed]) == text
        assert bool(given["tools"]) == ("Funktionen" in text)


def one_at_a_time(given: dict) -> dict:
    """The same dialogue with one call a turn and one plain result: the renderer below joins parallel calls without the line
    break that the published template has between them, and knows no listed results."""
    messages = []
    for message in explicit(given)["messages"]:
        if message["role"] == "tool":
            content = message["content"] if isinstance(message["content"], str) else "listed"
            if messages[-1]["role"] != "tool":
                messages.append({**message, "content": content})
            continue
        calls = message.get("tool_calls")
        messages.append({**message, "content": content_of(message)} | ({"tool_calls": calls[:1]} if calls else {}))
    return {**without_specials(given), "messages": without_specials(messages)}


def as_trained(ids: list[int], sampled: list[bool], thinking: bool) -> list[bool]:
    """What `renderers` says is sampled, as it is trained here: of earlier questions' answers, whose thoughts are gone, nothing;
    the line break that a model draws behind <|assistant|>; of direct mode not the empty thought, which the prompt has."""
    mask, given = list(sampled), False
    last_question = max(i for i, token in enumerate(ids) if token == USER)
    for i, token in enumerate(ids):
        given = not thinking and (given or token == ASSISTANT)
        if given or (thinking and i <= last_question):
            mask[i] = False
        elif thinking and ids[i - 1] == ASSISTANT:
            mask[i] = True
        given = given and token != CLOSE_THINK
    return mask


def test_tokens_and_what_is_sampled_are_those_of_renderers(tmp_path):
    """`renderers` (PyPI) writes GLM-4.5's tokens by hand, and says which of them a model samples."""
    glm45 = pytest.importorskip("renderers.glm45")
    transformers = pytest.importorskip("transformers")
    TOKENIZER.save(tmp_path / "tokenizer.json")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    compared = 0
    for given in map(one_at_a_time, DIALOGUES):
        tools, thinking, prompt = given["tools"], given["enable_thinking"], given["add_generation_prompt"]
        ours = render_tokens(TOKENIZER, **given)
        renderer = glm45.GLM45Renderer(tokenizer, glm45.GLM45RendererConfig(enable_thinking=thinking))
        theirs = renderer.render(given["messages"], tools=tools, add_generation_prompt=prompt)
        begin, their_begin = (  # behind the tools, whose words are a checkpoint's own
            next(i for i in range(3 if tools else 2, len(ids)) if ids[i] in (SYSTEM, USER, ASSISTANT))
            for ids in (ours.ids, theirs.token_ids)
        )
        ids, sampled = theirs.token_ids[their_begin:], theirs.sampled_mask[their_begin:]
        closing = ours.ids[begin + len(ids) :]  # ours ends with the role token that closes the last turn
        assert ours.ids[begin:] == [*ids, *closing] and closing in ([], [USER], [OBSERVATION])
        assert ours.trained[begin : begin + len(ids)] == as_trained(ids, sampled, thinking)
        compared += sum(ours.trained)
    assert compared > 10_000
