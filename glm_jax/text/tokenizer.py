"""Byte-level BPE carrying GLM-4.5's special tokens in GLM's order (spec section 1.6).

The vocabulary has `V` rows, a multiple of 128: `V - 36` for bytes and merges, then the 36 specials as one block.
GLM's own file has 151,329 + 36 entries in 151,552 rows. Ids move with `V`, so everything maps by name.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from glm_jax.config import ConfigError, nearest

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


def _with_pipeline(backend: Backend) -> Backend:
    split = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def train(texts: Iterable[str], vocab_size: int) -> "Tokenizer":
    """Learn merges from `texts`. The result depends on the texts alone: not on their order, nor on threads."""
    if vocab_size % 128 or vocab_size < _SMALLEST:
        raise ConfigError(f"model.V={vocab_size} must be a multiple of 128, at least {_SMALLEST}")
    backend = _with_pipeline(Backend(models.BPE(ignore_merges=True)))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, vocab_size)


class Tokenizer:
    """Text to ids and back. `vocab_size` counts rows of the embedding, unused ones included."""

    def __init__(self, plain: Backend, vocab_size: int):
        if plain.get_vocab_size() + len(SPECIAL_TOKENS) > vocab_size:
            raise ConfigError(
                f"{plain.get_vocab_size()} byte-pair tokens and {len(SPECIAL_TOKENS)} special tokens "
                f"do not fit vocab_size={vocab_size}; train a smaller vocabulary or raise model.V"
            )
        self.vocab_size = vocab_size
        self._plain = plain
        self._full = Backend.from_str(plain.to_str())
        controls, tags = SPECIAL_TOKENS[:_CONTROL], SPECIAL_TOKENS[_CONTROL:]
        self._full.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in controls])
        self._full.add_tokens([AddedToken(name, special=False, normalized=False) for name in tags])
        vocabulary = self._full.get_vocab()
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
        path.write_text(self.dumps(), encoding="utf-8")

    @classmethod
    def load(cls, path: Path, vocab_size: int | None = None) -> "Tokenizer":
        """Read `save`'s file. `vocab_size` defaults to the entries rounded up to a multiple of 128."""
        full = Backend.from_file(str(path))
        model = full.model
        plain = _with_pipeline(Backend(model))
        entries = plain.get_vocab_size() + len(SPECIAL_TOKENS)
        return cls(plain, vocab_size or -(-entries // 128) * 128)
