"""Talk to a post-trained checkpoint, or let a pre-trained one continue text: `--prompt` once, or line by line.

    python -m experiments.chat --checkpoint runs/quickstart
    python -m experiments.chat --checkpoint runs/quickstart --no_thinking --prompt "Spell this word backward: lamp"
    python -m experiments.chat --checkpoint runs/air      (converted from a published one by experiments.convert)
    python -m experiments.chat --checkpoint runs/quickstart/midtrain --prompt "def fibonacci(n):"

DIR is a run's folder (its final model answers) or a stage's. A post-trained model, or a published one that came with its
chat template, is asked in GLM's dialogue template, remembers what was said (less the thoughts of earlier turns, as the
template demands) and stops where its turn ends; an empty line begins a new dialogue. Its thought is dimmed on a terminal
and stands between <think> and </think> elsewhere.
A pre-trained model knows no dialogue: it writes on from the prompt as from the start of a document, until it ends the
document or has written `--max_new_tokens`; so does any model with `--plain`.
"""

import io
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from experiments import cli, convert
from glm_jax.config import ConfigError
from glm_jax.text.template import TEMPLATE_FILE

if TYPE_CHECKING:
    from glm_jax.rl.rollout import Policy
    from glm_jax.sample.engine import Completion, Sampling
    from glm_jax.text.tokenizer import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a character decodes to while its last bytes are still to come
VISIBLE = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
)  # fmt: skip
DIM, BRIGHT = "\033[2m", "\033[0m"  # a terminal's


@dataclass(frozen=True)
class Args:
    """Options of the conversation."""

    checkpoint: Path
    """Folder of a run or of one of its stages."""
    prompt: str | None = None
    """Question, or text to continue. Without it every line typed is one; Ctrl-D ends."""
    system: str | None = None
    """What the dialogue's system message says; without it there is none."""
    thinking: bool = True
    """Whether the model thinks before it answers, or answers directly."""
    plain: bool = False
    """Continue text, whatever the model has learnt."""
    temperature: float = 0.7
    """Of the distribution that tokens are drawn from; 0 takes the likeliest."""
    top_p: float = 0.95
    """Draw from the likeliest tokens whose probabilities sum to this; 1 draws from all."""
    max_new_tokens: int = 256
    """Where to stop if the turn or the document does not end."""
    seed: int = 0
    """Of the draws; the same seed and prompts give the same text."""


def main(args: Args) -> None:
    """Answer the prompt, or every line; a mistake in a line is told and costs that line alone."""
    from glm_jax.rl.rollout import load_policy
    from glm_jax.sample.engine import Sampling
    from glm_jax.train import checkpoint

    settings = Sampling(args.temperature, args.top_p, args.max_new_tokens, seed=args.seed)
    for name, text in (("--prompt", args.prompt), ("--system", args.system)):
        _check(name, text or "")
    folder = checkpoint.final_folder(args.checkpoint)
    _, stage, data = checkpoint.load_run(folder)
    published = stage == convert.STAGE and (data / TEMPLATE_FILE).is_file()
    knows_dialogue = published or stage in checkpoint.POST_TRAINING
    plain = args.plain or not knows_dialogue
    if plain and (args.system is not None or not args.thinking):
        why = "--plain continues text" if knows_dialogue else f"{folder} is of {stage}, which knows no dialogue"
        raise ConfigError(f"--system and --no_thinking belong to a dialogue, but {why}; leave them out")
    if not plain and args.prompt is not None and not args.prompt.strip():
        raise ConfigError("--prompt is empty; ask something, or leave it out to talk line by line")
    policy = load_policy(folder)
    speaker = Continuation(policy) if plain else Dialogue(policy, args.system, args.thinking)
    for turn, prompt in enumerate(_prompts(args.prompt)):
        try:
            _check("the line", prompt)
            speaker.answer(prompt, replace(settings, seed=args.seed + turn))
        except ConfigError as error:
            if args.prompt is not None:
                raise
            print(f"error: {error}", file=sys.stderr, flush=True)


class Continuation:
    """Writes on from each prompt as from the start of a document; nothing is remembered."""

    def __init__(self, policy: "Policy"):
        self._policy = policy

    def answer(self, prompt: str, settings: "Sampling") -> None:
        tokenizer = self._policy.tokenizer
        ids = [tokenizer.end, *tokenizer.encode(prompt)]
        _check_length(self._policy, ids, settings, "shorten the prompt")
        print(prompt, end="", flush=True)
        _speak(self._policy, ids, replace(settings, stop_ids=(tokenizer.end,)), Stream(tokenizer))


class Dialogue:
    """Asks in GLM's template, without tools. Token in, token out: nothing that was sampled is rendered again."""

    def __init__(self, policy: "Policy", system: str | None, thinking: bool):
        self._policy, self._thinking = policy, thinking
        self._first = [] if system is None else [{"role": "system", "content": system}]
        self._ids: list[int] = []  # read and sampled so far

    def answer(self, prompt: str, settings: "Sampling") -> None:
        from glm_jax.text.chat import question_tokens, render_tokens, stop_ids

        if not prompt.strip():
            self._ids = []
            print("(a new dialogue)", file=sys.stderr, flush=True)
            return
        tokenizer = self._policy.tokenizer
        if self._ids:
            ids = question_tokens(tokenizer, self._ids, prompt, self._thinking)
        else:
            asked = [*self._first, {"role": "user", "content": prompt}]
            ids = render_tokens(tokenizer, asked, enable_thinking=self._thinking).ids
        _check_length(self._policy, ids, settings, "ask something shorter, or begin a new dialogue with an empty line")
        settings = replace(settings, stop_ids=stop_ids(tokenizer))
        terminal = sys.stdout.isatty()
        tags = {name: name for name in VISIBLE} | ({"<think>": DIM, "</think>": BRIGHT} if terminal else {})
        done = _speak(self._policy, ids, settings, Stream(tokenizer, tags), BRIGHT if terminal else "")
        if done.finish == "length":
            print(f"(cut off after {len(done.ids)} tokens; raise --max_new_tokens)", file=sys.stderr, flush=True)
        elif done.ids[-1] == tokenizer.id("<|observation|>"):
            print("(it waits for a tool's result; there are no tools here)", file=sys.stderr, flush=True)
        self._ids = [*ids, *done.ids]


class Stream:
    """Prints a row's text as its tokens come: no half characters. Special tokens show as `tags` says, or not at all;
    a turn, which has tags, begins with its first character that is not white space."""

    def __init__(self, tokenizer: "Tokenizer", tags: Mapping[str, str] | None = None):
        self._tokenizer = tokenizer
        self._tags = {tokenizer.id(name): text for name, text in (tags or {}).items()}
        self._ids: list[int] = []
        self._shown = 0
        self._begun = not tags

    def __call__(self, row: int, token: int) -> None:
        if token in self._tags:
            self.end(self._tags[token])
            return
        self._ids.append(token)
        text = self._text()
        if not text.endswith(UNFINISHED):
            self._print(text[self._shown :])
            self._shown = len(text)

    def end(self, after: str = "") -> None:
        """Print what was held back because its last character never became whole, and `after`."""
        self._print(self._text()[self._shown :])
        self._ids, self._shown = [], 0
        self._print(after)

    def _print(self, text: str) -> None:
        text = text if self._begun else text.lstrip()
        self._begun = self._begun or bool(text)
        print(text, end="", flush=True)

    def _text(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special=True)


def _speak(policy: "Policy", ids: list[int], settings: "Sampling", show: Stream, after: str = "") -> "Completion":
    """Continue `ids`, printed as it comes."""
    from glm_jax.sample.engine import generate

    (done,) = generate(policy.cfg, policy.params, policy.router_bias_LE, [ids], settings=settings, on_token=show)
    show.end(after + "\n")
    return done


def _check_length(policy: "Policy", ids: list[int], settings: "Sampling", way_out: str) -> None:
    most = policy.cfg.max_positions
    if len(ids) + settings.max_new_tokens > most:
        raise ConfigError(
            f"{len(ids)} tokens to read and --max_new_tokens {settings.max_new_tokens} more exceed the model's {most}; {way_out}"
        )


def _check(what: str, text: str) -> None:
    """What the system could not decode arrives as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{what} holds a byte that is no UTF-8 behind {text[max(0, error.start - 20) : error.start]!r}; "
            "type it again, or convert it with iconv"
        ) from None


def _prompts(given: str | None) -> Iterator[str]:
    if given is not None:
        yield given
        return
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # one bad byte is one bad line, not the end
    asking = sys.stdin.isatty()
    while True:
        try:
            yield input("> " if asking else "")
        except EOFError:
            return


if __name__ == "__main__":
    cli.main(main)
