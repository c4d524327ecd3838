import jax
import numpy as np

from glm_jax import model
from glm_jax.config import Model
from glm_jax.data.input import Piece, assemble

END = 9


def _doc(*tokens):
    return np.array(tokens, np.uint16)


def test_a_truncated_row_predicts_two_tokens_beyond_its_end():
    row = assemble([Piece(_doc(1, 2, 3), 3), Piece(_doc(4, 5, 6, 7), 3)], seq_len=4, isolate=False, end=END)
    assert row["ids"].tolist() == [1, 2, 3, 4]
    assert row["targets"].tolist() == [2, 3, 4, 5]
    assert row["weights"].all()
    assert row["mtp_targets"].tolist() == [3, 4, 5, 6]
    assert row["mtp_weights"].all()
    assert row["positions"].tolist() == [0, 1, 2, 3]
    assert row["segments"].tolist() == [1, 1, 1, 1]


def test_isolated_targets_stay_inside_their_document():
    row = assemble([Piece(_doc(1, 2, END), 3), Piece(_doc(4, END), 2)], seq_len=8, isolate=True, end=END)
    assert row["ids"].tolist() == [1, 2, END, 4, END, END, END, END]
    assert row["weights"].tolist() == [1, 1, 0, 1, 0, 0, 0, 0]
    assert row["mtp_weights"].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    assert row["targets"][:2].tolist() == [2, END]
    assert row["targets"][3] == END
    assert row["mtp_targets"][0] == END
    assert row["positions"].tolist() == [0, 1, 2, 0, 1, 0, 0, 0]
    assert row["segments"].tolist() == [1, 1, 1, 2, 2, 0, 0, 0]


def test_an_isolated_piece_of_a_cut_document_predicts_beyond_the_cut():
    row = assemble([Piece(_doc(1, 2, 3, 4, 5, 6), 4)], seq_len=4, isolate=True, end=END)
    assert row["targets"].tolist() == [2, 3, 4, 5]
    assert row["mtp_targets"].tolist() == [3, 4, 5, 6]
    assert row["weights"].all()
    assert row["mtp_weights"].all()


def test_padding_without_isolation_has_no_weight():
    row = assemble([Piece(_doc(1, END), 2)], seq_len=4, isolate=False, end=END)
    assert row["weights"].tolist() == [1, 0, 0, 0]
    assert row["segments"].tolist() == [1, 1, 0, 0]


def test_types_are_what_the_trainer_expects():
    row = assemble([Piece(_doc(1, END), 2)], seq_len=4, isolate=True, end=END)
    floats = {"weights", "mtp_weights"}
    assert {name: str(array.dtype) for name, array in row.items()} == {
        name: "float32" if name in floats else "int32" for name in row
    }


def test_a_document_never_changes_anothers_logits_in_its_row():
    cfg = Model(
        V=32, D=16, L=2, dense_layers=1, N=2, K=1, H=8, F=16, M=8, E=4, A=2, max_positions=32, dtype="float32", remat="none"
    )  # fmt: skip
    params, bias_LE = model.init(cfg, jax.random.key(0))
    forward = jax.jit(
        lambda ids, where, segments: model.forward(cfg, params, bias_LE, ids, positions_BT=where, segments_BT=segments)
    )
    logits = []
    for middle in (_doc(3, 1, 4, 1, 5, END), _doc(8, 8, 8, 8, 8, END)):
        pieces = [Piece(document, len(document)) for document in (_doc(2, 7, 1, END), middle, _doc(6, 6, END))]
        row = assemble(pieces, seq_len=16, isolate=True, end=END)
        logits.append(np.asarray(forward(*(row[name][None] for name in ("ids", "positions", "segments")))[0][0]))
    others = row["segments"] != 2
    assert np.array_equal(logits[0][others], logits[1][others])
    assert not np.array_equal(logits[0][~others], logits[1][~others])
