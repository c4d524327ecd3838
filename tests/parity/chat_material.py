"""The tokenizer and the tools that tests of dialogues share."""

from glm_jax.text.tokenizer import train

TOKENIZER = train(["<think> I look at the weather in Zürich.\n</think> <tool_call>find\n\n" * 3, "12 + 34 = 46\n"], 512)
KINDS = ("string", "integer", "number", "boolean", "array", "object")
TOOLS = [
    {"name": "now", "description": "the time", "parameters": {"type": "object", "properties": {}}},
    {
        "type": "function",
        "function": {
            "name": "find",
            "description": "Wörter <tool_call> & 'more' \U0001f642",
            "parameters": {"type": "object", "properties": {kind: {"type": kind} for kind in KINDS}},
        },
    },
]
