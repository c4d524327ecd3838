"""Byte-level BPE carrying GLM-4.5's special tokens in GLM's order (spec section 1.6).

A vocabulary that is trained here has `V` rows, a multiple of 128: `V - 36` for bytes and merges, then the 36 specials as
one block. GLM's own `tokenizer.json` has 151,329 + 36 entries in 151,552 rows and is read as it is. Ids differ from
vocabulary to vocabulary, so everything maps by name. The checkpoint's chat template lies beside the file and goes with it.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from glm_jax.config import ConfigError, nearest
from glm_jax.text.template import OUR_TEMPLATE, TEMPLATE_FILE

SPECIAL_TOKENS: tuple[str, ...] = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>",
    "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
    "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
    "<|begin_of_audio|>", "<|end_of_audio|>", "<|begin_of_transcription|>", "<|end_of_transcription|>",
    "<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>",
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "/nothink",
    "<|begin_of_box|>", "<|end_of_box|>", "<|image|>", "<|video|>",
)  # fmt: skip
_CONTROL = 18  # the first 18 are control tokens (special=true in GLM's file), the rest are visible tags

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SMALLEST = 384  # 256 bytes and 36 specials, rounded up to 128


def train(texts: Iterable[str], vocab_size: int) -> "Tokenizer":
    """Learn merges from `texts`. The result depends on the texts alone: not on their order, nor on threads."""
    if vocab_size % 128 or vocab_size < _SMALLEST:
        raise ConfigError(f"model.V={vocab_size} must be a multiple of 128, at least {_SMALLEST}")
    backend = Backend(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    controls, tags = SPECIAL_TOKENS[:_CONTROL], SPECIAL_TOKENS[_CONTROL:]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in controls])
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in tags])
    return Tokenizer(backend, vocab_size)


class Tokenizer:
    """Text to ids and back. `vocab_size` counts rows of the embedding, unused ones included; `template` is the text of
    the checkpoint's `chat_template.jinja`."""

    def __init__(self, full: Backend, vocab_size: int | None = None, template: str = OUR_TEMPLATE):
        vocabulary = full.get_vocab()
        missing = [name for name in SPECIAL_TOKENS if name not in vocabulary]
        if missing:
            raise ConfigError(
                f"the tokenizer has no {' '.join(missing)}: {len(missing)} of GLM-4.5's {len(SPECIAL_TOKENS)} special "
                "tokens are missing; use the tokenizer.json of a GLM-4.5 checkpoint, or add them as added_tokens"
            )
        rows = max(vocabulary.values()) + 1
        self.vocab_size = vocab_size or -(-rows // 128) * 128
        if rows > self.vocab_size:
            raise ConfigError(
                f"the tokenizer's ids up to {rows - 1:,} do not fit vocab_size={self.vocab_size:,}; "
                f"set model.V to at least {rows:,}, or train a smaller vocabulary"
            )
        self.template = template
        full.no_truncation()
        full.no_padding()
        self._full, self._plain = full, _without_special(full)
        self._ids = {name: vocabulary[name] for name in SPECIAL_TOKENS}
        self._special_ids = frozenset(self._ids.values())

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`, nothing added. Special tokens typed in the text stay plain text unless `special`."""
        return (self._full if special else self._plain).encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode` on each text, over the machine's cores."""
        return [item.ids for item in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD, rows without a token become nothing."""
        ids = [int(i) for i in ids]
        if skip_special:
            ids = [i for i in ids if i not in self._special_ids]
        return self._full.decode(ids, skip_special_tokens=False)

    def id(self, name: str) -> int:
        """Id of a special token."""
        if name not in self._ids:
            raise KeyError(f"no special token {name!r}; {nearest(name, list(SPECIAL_TOKENS))}")
        return self._ids[name]

    @property
    def end(self) -> int:
        """Id of <|endoftext|>, which ends every document and pads rows."""
        return self._ids["<|endoftext|>"]

    def dumps(self) -> str:
        """A `tokenizer.json` as Hugging Face's `tokenizers` reads it."""
        return self._full.to_str(pretty=True)

    def save(self, path: Path) -> None:
        """Write `path`, a `tokenizer.json`, and the chat template beside it."""
        path.write_text(self.dumps(), encoding="utf-8")
        path.with_name(TEMPLATE_FILE).write_text(self.template, encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str, vocab_size: int | None = None) -> "Tokenizer":
        """Read a `tokenizer.json`, `save`'s or a published one: its ids and its way of splitting text stay its own.

        `vocab_size` defaults to its ids rounded up to a multiple of 128 (GLM-4.5 has more rows: 151,552). A
        `chat_template.jinja` beside it is the checkpoint's; without one the template is ours.
        """
        path = Path(path)
        if not path.is_file():
            raise ConfigError(f"{path} does not exist; give the tokenizer.json of a data folder or a checkpoint")
        beside = path.with_name(TEMPLATE_FILE)
        try:
            full = _with_its_ids(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library has no class of its own for it
            raise ConfigError(f"{path} is no whole tokenizer.json ({error}); copy it again") from None
        try:
            return cls(full, vocab_size, beside.read_text(encoding="utf-8") if beside.is_file() else OUR_TEMPLATE)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None


def _with_its_ids(text: str) -> Backend:
    """The tokenizer of a `tokenizer.json`. The library numbers added tokens on from the vocabulary, whatever the file
    says, unless the vocabulary has them."""
    full, described = Backend.from_str(text), json.loads(text)
    ids = {token["content"]: token["id"] for token in described["added_tokens"]}
    if any(full.token_to_id(name) != i for name, i in ids.items()):
        described["model"]["vocab"] |= ids
        full = Backend.from_str(json.dumps(described))
    return full


def _without_special(full: Backend) -> Backend:
    """The same tokenizer for text that anybody may have typed: no special token can come out of it."""
    described = json.loads(full.to_str())
    if described["model"]["type"] != "BPE":
        raise ConfigError(f"the tokenizer is {described['model']['type']}; GLM-4.5's is a byte-level BPE")
    special = {*SPECIAL_TOKENS, *(token["content"] for token in described["added_tokens"])}
    described["added_tokens"] = []
    described["model"]["vocab"] = {name: i for name, i in described["model"]["vocab"].items() if name not in special}
    return Backend.from_str(json.dumps(described))
