import pytest

from glm_jax.config import ConfigError
from glm_jax.rewards import pathology
from glm_jax.rewards.constraints import CONSTRAINTS, check, letters_absent, lines_of, words_of


@pytest.mark.parametrize(
    "name, arguments, kept, broken",
    [
        ("topic", {"word": "rain"}, "Soft RAIN, again.", "Soft rainbow."),
        ("words", {"count": 3}, "One, two ... three!", "One two three four"),
        ("lines", {"count": 2, "words": 2}, "one two\n\nthree four.\n", "one two\nthree"),
        ("lines", {"count": 2, "words": 2}, "one two\nthree four", "one two\nthree four\nfive six"),
        ("start", {"word": "soft"}, '"Soft rain."', "The soft rain."),
        ("end", {"word": "hill"}, "On the hill!", "On the hills"),
        ("contain", {"word": "by"}, "Stand by me.", "Standby"),
        ("times", {"word": "the", "count": 2}, "The dog, the cat.", "the the the"),
        ("small", {}, "all small.", "Not small."),
        ("capitals", {}, "ALL BIG.", "NOT bIG."),
        ("exclaim", {}, "Yes! \n", "Yes."),
        ("no_commas", {}, "one two", "one, two"),
        ("without", {"letter": "e"}, "A dog.", "A tree."),
        ("without", {"letter": "e"}, "A dog.", "EGG"),
    ],
)
def test_a_constraint_holds_where_it_should_and_nowhere_else(name, arguments, kept, broken):
    assert check(name, kept, **arguments)
    assert not check(name, broken, **arguments)


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_an_empty_text_keeps_no_constraint(name):
    arguments = {"count": 0, "words": 0, "word": "", "letter": "x"}
    needed = {key: value for key, value in arguments.items() if "{" + key + "}" in CONSTRAINTS[name].say}
    for text in ("", " \n"):
        assert not check(name, text, **needed)


def test_unknown_constraint_offers_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'capitals'"):
        check("capital", "A")


def test_words_and_lines_are_what_blanks_and_breaks_divide():
    assert words_of(" It's -- 'my' DOG... \n ok?!") == ["it's", "--", "my", "dog", "ok"]
    assert lines_of("\na\n \nb c\n") == ["a", "b c"]
    assert letters_absent("Abc", "abcd") == ["d"]


@pytest.mark.parametrize(
    "message, reason",
    [
        ({"content": "Fine."}, None),
        ({"content": None, "tool_calls": [{"name": "find", "arguments": {}}], "status": "ok"}, None),
        ({"content": "Fine.", "status": "unclosed_think"}, "malformed"),
        ({"content": "Fine.</think>"}, "malformed"),
        ({"content": "Fine.", "reasoning_content": "a <tool_call> b"}, "malformed"),
        ({"content": None, "tool_calls": []}, "empty"),
        ({"content": " \n", "reasoning_content": "42"}, "empty"),
        ({"content": "Fine.", "reasoning_content": " ".join(map(str, range(1000)))}, "overlong"),
        ({"content": "la la la la la"}, "repetition"),
        ({"content": "Fine.", "reasoning_content": "I think so. " * 5}, "repetition"),
        ({"content": "rain regen дождь"}, "scripts"),
        ({"content": "rain \ufffd"}, "scripts"),
    ],
)
def test_pathologies_are_named(message, reason):
    assert pathology.fault(message) == reason


@pytest.mark.parametrize(
    "text, repetitive",
    [
        ("0 + 0 = 0\n0 + 0 = 0\n0 + 0 = 0\n0 + 0 = 0", False),
        ("m i 1 s s i 2 s s i 3 p p i 4", False),
        ("no no no no", False),
        ("no no no no no", True),
        ("yes no " * 5, True),
        ("yes no " * 4, False),
        ("one two three four five six seven " * 5, True),
        ("rain a rain b rain rain c rain rain rain rain", True),  # 8 of 11
    ],
)
def test_repetition_is_a_phrase_again_and_again_or_one_word_all_over(text, repetitive):
    assert pathology.repetitive(text) == repetitive


def test_repetition_can_be_asked_for_strictly():
    assert pathology.fault({"content": "The red red sun."}, share=0.5, repeats=2) == "repetition"
    assert pathology.fault({"content": "The red sun on the red hill."}, share=0.5, repeats=2) is None
    assert pathology.fault({"content": "a b a c a d a e a f a"}, share=0.5, repeats=2) == "repetition"


def test_scripts_mix_only_where_letters_do():
    assert not pathology.mixes_scripts("naïve café, 3 €")
    assert not pathology.mixes_scripts("漢字とカナ")  # Chinese characters and kana are one way of writing
    assert pathology.mixes_scripts("漢字 and letters")
    assert pathology.mixes_scripts("pаypal")  # its second letter is Cyrillic


def test_echo_is_four_words_of_the_prompt_in_a_row():
    prompt = "Write about the rain. Use 6 words."
    assert pathology.echoes("I write about THE rain", prompt)
    assert not pathology.echoes("about the rain", prompt)
    assert not pathology.echoes("words 6 use rain the about write", prompt)
