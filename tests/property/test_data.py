import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.data import code, packing, sources
from glm_jax.data.input import Piece, assemble
from glm_jax.text.tokenizer import train

TOKENIZER = train(["some text with def and return\n" * 3], 384)
LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=40)


@given(LENGTHS, st.integers(8, 40))
def test_best_fit_places_every_token_once_and_cuts_only_what_exceeds_a_row(lengths, seq_len):
    plan = packing.best_fit(np.array(lengths), seq_len)
    placed = {d: [] for d in range(len(lengths))}
    for index in range(len(plan)):
        row = plan.row(index)
        assert row[:, 2].sum() <= seq_len
        for document, start, length in row.tolist():
            placed[document] += range(start, start + length)
    assert [sorted(placed[d]) for d in placed] == [list(range(n)) for n in lengths]
    assert len(plan.segments) == sum(-(-n // seq_len) for n in lengths)
    assert len(plan) <= max(1, 2 * sum(lengths) / seq_len + 1)  # no two rows could be one


def test_best_fit_of_a_hundred_thousand_documents_needs_no_more_rows_than_their_tokens_fill():
    lengths = np.random.default_rng(0).lognormal(np.log(6000), 1.3, 100_000).astype(np.int64) + 1
    plan = packing.best_fit(lengths, 32_768)
    assert len(plan) <= 1.001 * -(-lengths.sum() // 32_768)
    assert len(plan.segments) == (-(-lengths // 32_768)).sum()  # no document is cut that fits


@given(LENGTHS, st.integers(8, 40))
def test_truncation_makes_every_token_of_full_rows_a_target_exactly_once(lengths, seq_len):
    stream = np.concatenate([np.arange(n) + 1000 * d for d, n in enumerate(lengths)])
    documents = [np.arange(n) + 1000 * d for d, n in enumerate(lengths)]
    plan = packing.truncate(np.array(lengths), seq_len)
    assert len(plan) == max(len(stream) - 2, 0) // seq_len
    rows = []
    for index in range(len(plan)):
        pieces = [Piece(documents[d][s : s + n + 2], n) for d, s, n in plan.row(index).tolist()]
        rows.append(assemble(pieces, seq_len, isolate=False, end=0))
    used = len(plan) * seq_len
    for name, shift in (("ids", 0), ("targets", 1), ("mtp_targets", 2)):
        assert np.concatenate([[], *(row[name] for row in rows)]).tolist() == stream[shift : used + shift].tolist()
    assert all(row["weights"].all() and row["mtp_weights"].all() for row in rows)


@given(LENGTHS, st.integers(8, 40), st.booleans())
def test_isolation_never_mixes_documents(lengths, seq_len, best_fit):
    documents = [np.arange(n) + 1000 * (d + 1) for d, n in enumerate(lengths)]
    plan = packing.best_fit(np.array(lengths), seq_len) if best_fit else packing.truncate(np.array(lengths), seq_len)
    for index in range(len(plan)):
        pieces = [Piece(documents[d][s : s + n + 2], n) for d, s, n in plan.row(index).tolist()]
        row = assemble(pieces, seq_len, isolate=True, end=0)
        real = row["segments"] > 0
        owner = row["ids"] // 1000
        for name, weight, shift in (("targets", "weights", 1), ("mtp_targets", "mtp_weights", 2)):
            counted = row[weight] > 0
            assert not (counted & ~real).any()
            assert (row[name][counted] == row["ids"][counted] + shift).all(), "the next token of the same document"
        for segment in set(row["segments"][real].tolist()):
            here = row["segments"] == segment
            assert len(set(owner[here].tolist())) == 1
            assert row["positions"][here].tolist() == list(range(here.sum()))


@given(st.text(max_size=200), st.integers())
def test_fill_in_the_middle_loses_no_character(text, key):
    part = dict(code.fill_in_the_middle(text, key))
    assert part["<|code_prefix|>"] + part["<|code_middle|>"] + part["<|code_suffix|>"] == text


@given(st.text(alphabet="ab \n#é", max_size=300), st.integers(1, 60))
def test_pieces_and_cuts_join_to_the_text(text, size):
    assert "".join(code.pieces(text, size)) == text
    assert "".join(sources.cut(text, size)) == text


@settings(max_examples=200)
@given(st.text(max_size=100))
def test_any_text_survives_the_tokenizer(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert not ids or max(ids) < TOKENIZER.end
