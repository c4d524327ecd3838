"""A checkpoint's own `chat_template.jinja`: what is taken from it, and what is refused."""

import pytest

from glm_jax.text.chat import render, render_tokens
from glm_jax.text.template import OUR_TEMPLATE, TemplateError, Wording, show, wording
from glm_jax.text.tokenizer import train

USER = {"role": "user", "content": "U"}
TOOL = {"name": "f", "description": "<ä>", "parameters": {"type": "object", "properties": {}}}
OTHER_WORDS = OUR_TEMPLATE.replace("# Tools", "# Werkzeuge\n\nFür {{ 1 + 1 }} &").replace("Write each call as", "So")


def test_its_words_about_tools_are_what_stands_around_the_descriptions():
    words = wording(OUR_TEMPLATE)
    assert words.before.startswith("[gMASK]<sop><|system|>\n# Tools\n") and words.before.endswith(":\n<tools>\n")
    assert words.after.startswith("</tools>\n\n") and words.after.endswith("...\n</tool_call>")
    other = wording(OTHER_WORDS)
    assert "# Werkzeuge\n\nFür 2 &\n" in other.before and "So follows" in other.after
    line = '{"name": "f", "description": "<ä>", "parameters": {"type": "object", "properties": {}}}\n'
    text = other.before + line + other.after + "<|user|>\nU<|assistant|>"
    assert render([USER], [TOOL], template=OTHER_WORDS) == text == show(OTHER_WORDS, [USER], [TOOL])
    assert render([USER], template=OTHER_WORDS) == render([USER])


def test_a_template_may_be_written_otherwise_as_long_as_its_text_is_the_same():
    written = "{# another hand's #}" + OUR_TEMPLATE.replace("unthought", "blank")
    assert wording(written) == wording(OUR_TEMPLATE) == Wording(wording(written).before, wording(written).after)


@pytest.mark.parametrize(
    "template, rule",
    [
        ("", r"no tools block.*it begins ''.*delete the file"),
        ("[gMASK]<sop>{{ messages }}", "no tools block"),
        ("{% for %}", "is no Jinja: line 1"),
        ("{{ messages[7].role.name }}", "fails: UndefinedError"),
        ("{{ ''.__class__.__mro__[1] }}", "fails: SecurityError"),
        ("{{ messages.clear() }}", "fails: SecurityError"),
        ("{{ raise_exception('only for two') }}", "fails: ValueError: only for two"),
        ("{{ 1 / 0 }}", "fails: ZeroDivisionError"),
        (
            OUR_TEMPLATE.replace("'<|user|>\\n'", "'<|user|>'"),
            r"that writes '.*<\|user\|>\\nU .*it writes '.*<\|user\|>U ",
        ),
        (OUR_TEMPLATE.replace("tojson(ensure_ascii=False) -}}", "tojson(ensure_ascii=True) -}}"), r"\\\\u00fc"),
        (OUR_TEMPLATE.replace("'/nothink' if direct", "'/nothink' if not direct"), "/nothink"),
        (OUR_TEMPLATE.replace("thought.strip()", "thought"), "is not GLM-4.5's"),
        (OUR_TEMPLATE.replace("'user' in roles[loop.index:]", "false"), "is not GLM-4.5's"),
        (OUR_TEMPLATE.replace("loop.previtem.role != 'tool'", "true"), "is not GLM-4.5's"),
    ],
)
def test_a_template_of_another_format_is_refused_for_text_and_tokens(template, rule):
    with pytest.raises(TemplateError, match=rule):
        wording(template)
    with pytest.raises(TemplateError, match=rule):
        render([USER], template=template)
    tokenizer = train(["ab"], 384)
    tokenizer.template = template
    with pytest.raises(TemplateError, match=rule):
        render_tokens(tokenizer, [USER])
