import random
from collections import Counter

import numpy as np

from glm_jax.data import dedup
from glm_jax.data.document import Document


def _document(text, name="x"):
    return Document.of(text, domain="general", source="s", path=name, group=name)


def _text(seed, words=300):
    source = random.Random(seed)
    return " ".join(f"w{source.randrange(5000)}" for _ in range(words))


def _edited(text, changes, seed=0):
    words, source = text.split(" "), random.Random(seed)
    for place in source.sample(range(len(words)), changes):
        words[place] = "changed"
    return " ".join(words)


def test_exact_duplicates_leave_the_first_path_whatever_the_order():
    documents = [_document("same", "b"), _document("same", "a"), _document("other", "c")]
    drops = Counter()
    assert [d.path for d in dedup.exact(documents, drops)] == [d.path for d in dedup.exact(documents[::-1], Counter())]
    assert "a" in {d.path for d in dedup.exact(documents, drops)}
    assert drops["exact duplicate"] == 2


def test_near_duplicates_leave_the_smallest_id_and_different_texts_stay():
    texts = [_text(i) for i in range(30)]
    copies = [_edited(text, 4, seed=i) for i, text in enumerate(texts[:10])]
    documents = [_document(text) for text in texts + copies]
    kept, _ = dedup.clean(documents, [], 0.8, drops := Counter())
    assert drops["near duplicate"] == 10
    assert len(kept) == 30
    for text, copy in zip(texts, copies, strict=False):
        assert min(_document(text).id, _document(copy).id) in {d.id for d in kept}
    assert dedup.clean(documents[::-1], [], 0.8, Counter())[0] == kept


def test_candidates_are_verified_by_exact_similarity():
    words = dedup.Words()
    base = _text(1)
    sets = [dedup.grams(words(text), 5) for text in (base, _edited(base, 4), _edited(base, 30))]
    assert dedup.jaccard(sets[0], sets[1]) > 0.8 > dedup.jaccard(sets[0], sets[2])
    assert dedup.near(sets, 0.8) == {1: 0}
    assert dedup.near(sets, 0.99) == {}


def test_minhash_estimates_jaccard():
    words = dedup.Words()
    base = _text(2, 2000)
    a, b = (dedup.grams(words(text), 5) for text in (base, _edited(base, 100)))
    signature = dedup.signatures([a, b])
    estimate = (signature[0] == signature[1]).mean()
    assert abs(estimate - dedup.jaccard(a, b)) < 3 * np.sqrt(0.25 / 112)  # three standard errors of 112 hashes


def test_training_loses_what_repeats_held_out_text():
    held_out = _document(_text(3, 400), "held out")
    near = _document(_edited(held_out.text, 3), "near")
    inside = _document(_text(4, 4000) + " " + held_out.text, "contains it")
    part = _document(" ".join(held_out.text.split(" ")[100:180]), "part of it")
    other = _document(_text(5), "other")
    kept, kept_held_out = dedup.clean([near, inside, part, other, held_out], [held_out], 0.8, drops := Counter())
    assert kept == [other]
    assert kept_held_out == [held_out]
    assert drops["overlaps held-out text"] == 3
    assert drops["held-out text again"] == 1


def test_empty_and_tiny_texts_do_not_collide():
    assert dedup.near([dedup.grams(dedup.Words()(text), 5) for text in ("", "", "a", "b c")], 0.8) == {}
