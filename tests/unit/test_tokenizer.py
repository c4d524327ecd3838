import json

import pytest
from tokenizers import Tokenizer as Backend

from glm_jax.config import ConfigError
from glm_jax.text.template import OUR_TEMPLATE
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


# ---- files of others


def published(tokenizer, first: int, **other) -> dict:
    """A file as published: ids of its own (GLM-4.5's begin at 151,329), and a splitting of its own: digits one by one."""
    described = json.loads(tokenizer.dumps())
    for place, token in enumerate(described["added_tokens"]):
        token["id"] = first + place
    described["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\d|[^\d]+"
    return {**described, **other}


def written(tmp_path, described) -> str:
    path = tmp_path / "tokenizer.json"
    path.write_text(described if isinstance(described, str) else json.dumps(described))
    return str(path)


def test_a_published_file_keeps_its_ids_its_splitting_and_its_text(tokenizer, tmp_path):
    shorter = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    described = published(tokenizer, 151_329, truncation=shorter)
    entries = described["model"]["vocab"]
    entries |= {f"entry{i}": i for i in range(len(entries), 151_329)}  # as many as GLM-4.5's
    path = written(tmp_path, described)
    loaded, theirs = Tokenizer.load(path, 151_552), Backend.from_file(path)
    theirs.no_truncation()
    assert loaded.vocab_size == 151_552 and Tokenizer.load(path).vocab_size == 151_424
    assert [loaded.id(name) for name in ("<|endoftext|>", "<|user|>", "<think>", "<|video|>")] == [
        151_329, 151_336, 151_350, 151_364,
    ]  # fmt: skip
    for text in [*TEXTS, "12345 /nothink", "<|user|>\n\U0001f642<think>"]:
        assert loaded.encode(text, special=True) == theirs.encode(text, add_special_tokens=False).ids
        assert max(loaded.encode(text)) < 384
        assert loaded.decode(loaded.encode(text)) == text == loaded.decode(loaded.encode(text, special=True))
    assert len(loaded.encode("12345")) == 5


def test_a_special_token_that_the_vocabulary_itself_holds_is_still_not_typed(tokenizer, tmp_path):
    described = published(tokenizer, 348)
    described["model"]["vocab"] |= {token["content"]: token["id"] for token in described["added_tokens"]}
    loaded = Tokenizer.load(written(tmp_path, described))
    assert loaded.id("/nothink") not in loaded.encode("/nothink")
    assert loaded.decode(loaded.encode("/nothink")) == "/nothink"


def test_tokens_beyond_glms_are_kept_and_never_typed_either(tokenizer, tmp_path):
    described = published(tokenizer, 400)
    described["added_tokens"].append({**described["added_tokens"][-1], "content": "<|more|>", "id": 500})
    loaded = Tokenizer.load(written(tmp_path, described))
    assert loaded.encode("<|more|>", special=True) == [500]
    assert loaded.vocab_size == 512 and 500 not in loaded.encode("<|more|>")


def test_the_template_beside_the_file_goes_with_it(tokenizer, tmp_path):
    assert tokenizer.template == OUR_TEMPLATE
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    assert (tmp_path / "chat_template.jinja").read_text() == OUR_TEMPLATE
    (tmp_path / "chat_template.jinja").write_text("theirs")
    (tmp_path / "copy").mkdir()
    Tokenizer.load(path).save(tmp_path / "copy" / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "copy" / "tokenizer.json").template == "theirs"
    (tmp_path / "chat_template.jinja").unlink()
    assert Tokenizer.load(path).template == OUR_TEMPLATE


def test_a_tokenizer_without_the_special_tokens_names_them(tokenizer, tmp_path):
    described = published(tokenizer, 348)
    described["added_tokens"] = [t for t in described["added_tokens"] if t["content"] not in ("<think>", "/nothink")]
    with pytest.raises(
        ConfigError, match=r"tokenizer.json: .*has no <think> /nothink: 2 of GLM-4.5's 36.*added_tokens"
    ):
        Tokenizer.load(written(tmp_path, described))
    with pytest.raises(ConfigError, match=r"has no <\|endoftext\|> .* <\|video\|>: 36 of"):
        Tokenizer.load(written(tmp_path, {**described, "added_tokens": []}))


def test_a_file_that_does_not_fit_or_is_none_is_named_with_a_way_out(tokenizer, tmp_path):
    path = written(tmp_path, published(tokenizer, 600))
    with pytest.raises(ConfigError, match=r"tokenizer.json: .*ids up to 635 do not fit vocab_size=512; .*at least 636"):
        Tokenizer.load(path, 512)
    with pytest.raises(ConfigError, match=r"absent.json does not exist"):
        Tokenizer.load(tmp_path / "absent.json")
    with pytest.raises(ConfigError, match=r"is no whole tokenizer.json .*copy it again"):
        Tokenizer.load(written(tmp_path, tokenizer.dumps()[:5000]))
    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    with pytest.raises(ConfigError, match=r"is WordLevel; GLM-4\.5's is a byte-level BPE"):
        Tokenizer.load(written(tmp_path, published(tokenizer, 348, model=words)))
