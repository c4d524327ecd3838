import pytest

from glm_jax.config import ConfigError
from glm_jax.text.tokenizer import SPECIAL_TOKENS, Tokenizer, train

TEXTS = [
    "def f(x):\n    return x + 12345\n" * 5,
    "The quick brown fox jumps over the lazy dog. " * 5,
    "数学 and Zeichen: äöü",
    " ".join(dir(str)) * 5,
]


@pytest.fixture(scope="module")
def tokenizer():
    return train(TEXTS, 384)


def test_specials_are_glms_36_in_order_at_the_end_of_a_vocabulary_that_fits_exactly(tokenizer):
    assert len(SPECIAL_TOKENS) == 36
    assert [tokenizer.id(name) for name in SPECIAL_TOKENS] == list(range(384 - 36, 384))
    offsets = {
        "<|user|>": 7,
        "<|observation|>": 9,
        "<|code_prefix|>": 18,
        "<think>": 21,
        "/nothink": 31,
        "<|video|>": 35,
    }
    assert {name: SPECIAL_TOKENS.index(name) for name in offsets} == offsets  # 151329 + these are GLM-4.5's ids


def test_specials_typed_in_a_document_stay_text(tokenizer):
    text = "<|endoftext|> and <think> and /nothink"
    assert max(tokenizer.encode(text)) < tokenizer.id("<|endoftext|>")
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text, special=True)[0] == tokenizer.end
    assert tokenizer.encode_batch([text]) == [tokenizer.encode(text)]


def test_digits_split_in_groups_of_three(tokenizer):
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1")] == ["1"]
    pieces = [piece for piece, _ in tokenizer._plain.pre_tokenizer.pre_tokenize_str("12345 a1")]
    assert pieces[:2] == ["123", "45"]


def test_decode_can_leave_specials_out_and_ignores_rows_without_a_token():
    small = train(["ab ab ab"], 512)  # too little text to fill 512 rows
    ids = [small.end, *small.encode("ab"), 511]
    assert small.decode(ids) == "<|endoftext|>ab"
    assert small.decode(ids, skip_special=True) == "ab"


def test_training_does_not_depend_on_order_and_saving_loses_nothing(tokenizer, tmp_path):
    assert train(TEXTS[::-1], 384).dumps() == tokenizer.dumps()
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.vocab_size == 384
    assert loaded.dumps() == tokenizer.dumps()
    assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


@pytest.mark.parametrize("size", [300, 256])
def test_vocabulary_size_is_checked(size):
    with pytest.raises(ConfigError, match="multiple of 128"):
        train(TEXTS, size)


def test_unknown_special_offers_the_nearest(tokenizer):
    with pytest.raises(KeyError, match="<think>"):
        tokenizer.id("<thnk>")
