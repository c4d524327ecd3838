"""Let a checkpoint continue text: `--prompt` once, or line by line from the keyboard.

    python -m experiments.chat --checkpoint runs/quickstart --prompt "def fibonacci(n):"
    python -m experiments.chat --checkpoint runs/quickstart --temperature 0.7 --top_p 0.9

DIR is a run's folder (its latest stage answers) or a stage's. A pre-trained model knows no dialogue: it writes on
from the prompt as from the start of a document, until it ends the document or has written `--max_new_tokens`.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from experiments import cli

if TYPE_CHECKING:
    from glm_jax.text.tokenizer import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a character decodes to while its last bytes are still to come


@dataclass(frozen=True)
class Args:
    """Options of the conversation."""

    checkpoint: Path
    """Folder of a run or of one of its stages."""
    prompt: str | None = None
    """Text to continue. Without it, every line typed is a prompt; an empty one begins from nothing, Ctrl-D ends."""
    temperature: float = 0.7
    """Of the distribution that tokens are drawn from; 0 takes the likeliest."""
    top_p: float = 0.95
    """Draw from the likeliest tokens whose probabilities sum to this; 1 draws from all."""
    max_new_tokens: int = 256
    """Where to stop if the document does not end."""
    seed: int = 0
    """Of the draws; the same seed and prompt give the same text."""


def main(args: Args) -> None:
    from glm_jax.data.prepare import load_tokenizer
    from glm_jax.sample import engine
    from glm_jax.train import checkpoint

    settings = engine.Sampling(args.temperature, args.top_p, args.max_new_tokens, seed=args.seed)
    run, params, router_bias_LE, data = checkpoint.load_params(args.checkpoint)
    tokenizer = load_tokenizer(data)
    settings = replace(settings, stop_ids=(tokenizer.end,))
    params = engine.prepare(run.model, params)
    for turn, prompt in enumerate(_prompts(args.prompt)):
        ids = [tokenizer.end, *tokenizer.encode(prompt)]
        show = Stream(tokenizer)
        print(prompt, end="", flush=True)
        engine.generate(
            run.model, params, router_bias_LE, [ids], on_token=show,
            settings=replace(settings, seed=args.seed + turn),
        )  # fmt: skip
        print(show.rest(), flush=True)


class Stream:
    """Prints a row's text as its tokens come: no half characters, no special tokens."""

    def __init__(self, tokenizer: "Tokenizer"):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0

    def __call__(self, row: int, token: int) -> None:
        self._ids.append(token)
        text = self._text()
        if not text.endswith(UNFINISHED):
            print(text[self._shown :], end="", flush=True)
            self._shown = len(text)

    def rest(self) -> str:
        """What was held back because its last character never became whole."""
        return self._text()[self._shown :]

    def _text(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special=True)


def _prompts(given: str | None) -> Iterator[str]:
    if given is not None:
        yield given
        return
    asking = sys.stdin.isatty()
    while True:
        try:
            yield input("> " if asking else "")
        except EOFError:
            return


if __name__ == "__main__":
    cli.main(main)
