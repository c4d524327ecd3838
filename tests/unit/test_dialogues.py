"""Dialogues as rows: what is trained, what is dropped, and a folder that is either whole or made again."""

import json
import shutil

import numpy as np
import pytest

from glm_jax.config import ConfigError, Stage
from glm_jax.data.dialogues import Dialogue, batches, prepare
from glm_jax.data.input import Microbatches, Rows
from glm_jax.data.prepare import load_tokenizer
from glm_jax.envs import get
from glm_jax.text.chat import render, render_tokens
from glm_jax.text.tokenizer import train

SEQ_LEN = 256
STAGE = Stage("sft", 4 * SEQ_LEN, SEQ_LEN, 1e4, microbatch_rows=2, packing="best_fit", isolate=True)
TOOL = {"name": "find", "description": "box", "parameters": {"type": "object", "properties": {}}}


def said(thought: str, content: str, *calls: str) -> dict:
    return {
        "role": "assistant", "reasoning_content": thought, "content": content,
        "tool_calls": [{"name": name, "arguments": {}} for name in calls],
    }  # fmt: skip


ASKED = {"role": "user", "content": "Where is it?"}
ANSWERS = [f"In box {number}." for number in range(6)]
PLAIN = [Dialogue((ASKED, said("I know.", answer))) for answer in ANSWERS]
DIRECT = Dialogue(
    ({"role": "system", "content": "Be brief."}, ASKED, said("", "Here."), ASKED, said("", "There.")), None, False
)
CALLING = Dialogue(
    (ASKED, said("I look.", "", "find"), {"role": "tool", "content": "7"}, said("Seven.", "In box 7.")), (TOOL,)
)


@pytest.fixture(scope="module")
def tokenizer():
    return train([render(list(d.messages), d.tools) for d in (*PLAIN, DIRECT, CALLING)], 512)


def trained_texts(row, tokenizer) -> list[str]:
    """The stretches of a row whose tokens are learnt, as text."""
    found, before = [], -2
    for at in np.flatnonzero(row["weights"]):
        if at != before + 1:
            found.append([])
        found[-1].append(int(row["targets"][at]))
        before = at
    return [tokenizer.decode(ids) for ids in found]


def rows_of(folder) -> list[dict]:
    rows = Rows(folder, STAGE)
    return [rows[index] for index in range(len(rows))]


def test_only_what_the_assistant_says_is_trained_and_the_role_token_that_ends_it(tmp_path, tokenizer):
    facts = prepare(tmp_path, [*PLAIN, DIRECT, CALLING], tokenizer, "sft", SEQ_LEN)
    rows = rows_of(tmp_path)
    found = sorted(text for row in rows for text in trained_texts(row, tokenizer))
    expected = [f"\n<think>I know.</think>\n{answer}<|user|>" for answer in ANSWERS]
    expected += ["\nHere.<|user|>", "\nThere.<|user|>"]
    expected += ["\n<think>I look.</think>\n<tool_call>find\n</tool_call><|observation|>"]
    expected += ["\n<think>Seven.</think>\nIn box 7.<|user|>"]
    assert found == sorted(expected)
    assert (facts["rows"], facts["dialogues"], facts["longer_than_a_row"]) == (len(rows), 8, 0)
    assert facts["trained_tokens"] == sum(int(row["weights"].sum()) for row in rows)
    for row in rows:  # the MTP layer's targets lie one further
        further = np.flatnonzero(row["mtp_weights"])
        assert set(further + 1) <= set(np.flatnonzero(row["weights"])) and len(further)
        np.testing.assert_array_equal(row["mtp_targets"][further], row["targets"][further + 1])


def test_a_sampled_dialogue_keeps_its_own_tokens(tmp_path, tokenizer):
    """Another spelling in tokens of the same text stays what it is."""
    messages = (ASKED, said("I know.", ANSWERS[0]))
    begin = len(render_tokens(tokenizer, messages[:1]).ids)
    text = f"\n<think>I know.</think>\n{ANSWERS[0]}"
    ids = render_tokens(tokenizer, messages[:1]).ids
    for piece in ("\n", "<think>", *"I know.", "</think>", *f"\n{ANSWERS[0]}"):
        ids += tokenizer.encode(piece, special=True)
    ids.append(tokenizer.id("<|user|>"))
    trained = [place >= begin for place in range(len(ids))]
    assert ids != render_tokens(tokenizer, messages, add_generation_prompt=False).ids
    prepare(tmp_path, [Dialogue(messages, ids=tuple(ids), trained=tuple(trained))], tokenizer, "sft", SEQ_LEN)
    (row,) = rows_of(tmp_path)
    assert row["ids"][: len(ids)].tolist() == ids
    assert trained_texts(row, tokenizer) == [f"{text}<|user|>"]


def test_oracle_dialogues_of_every_environment_come_back_whole(tmp_path, tokenizer):
    """Those with tools share their row's copy of the tools; what each token can look at is its dialogue."""
    whole = []
    for name in ("reasoning", "agent", "chat"):
        for seed in range(4):
            task = get(name).task(seed, 1)
            whole.append(Dialogue((*task.messages, *get(name).solve(task)), task.tools))
    facts = prepare(tmp_path, whole, tokenizer, "sft", 1024)
    stage = Stage("sft", 1024, 1024, 1e4, microbatch_rows=1, packing="best_fit", isolate=True)
    rows, found = Rows(tmp_path, stage), []
    for index in range(len(rows)):
        row = rows[index]
        segments, prefixes, where = row["segments"], row["prefixes"], row["positions"]
        for segment in range(1, segments.max() + 1):
            (last,) = np.flatnonzero(segments == segment)[-1:]
            seen = ((segments == segment) | (segments == prefixes[last])) & (where <= where[last])
            assert where[seen].tolist() == list(range(where[last] + 1))
            if row["weights"][segments == segment].any():
                found.append(row["ids"][seen].tolist())
    assert sorted(found) == sorted(dialogue.tokens(tokenizer).ids for dialogue in whole)
    assert facts["dialogue_tokens"] == sum(map(len, found)) >= facts["tokens"]


def test_dialogues_longer_than_a_row_are_dropped_and_counted(tmp_path, tokenizer):
    long = Dialogue((ASKED, said("I know. " * 200, "Here.")))
    facts = prepare(tmp_path, [*PLAIN, long, long], tokenizer, "sft", SEQ_LEN)
    assert (facts["dialogues"], facts["longer_than_a_row"]) == (6, 2)
    assert sum(len(trained_texts(row, tokenizer)) for row in rows_of(tmp_path)) == 6
    lines = (tmp_path / "dialogues.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["messages"][-1]["content"] for line in lines] == ANSWERS


def test_a_dialogue_of_exactly_a_row_is_kept(tmp_path, tokenizer):
    length = len(PLAIN[0].tokens(tokenizer).ids)
    assert prepare(tmp_path / "exact", PLAIN[:1], tokenizer, "sft", length)["dialogues"] == 1
    with pytest.raises(ConfigError, match=rf"none of 1 dialogues fits a row of seq_len={length - 1}"):
        prepare(tmp_path / "short", PLAIN[:1], tokenizer, "sft", length - 1)


@pytest.mark.parametrize("dialogues", [[], [Dialogue((ASKED,))]], ids=["none", "nothing to train on"])
def test_nothing_to_train_on_is_an_error_and_leaves_nothing(tmp_path, tokenizer, dialogues):
    with pytest.raises(ConfigError, match=f"none of {len(dialogues)} dialogues fits .* raise sft.seq_len"):
        prepare(tmp_path / "data", dialogues, tokenizer, "sft", SEQ_LEN)
    assert not (tmp_path / "data").exists()


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_finished_folder_is_left_alone_and_another_content_refused(tmp_path, tokenizer):
    facts = prepare(tmp_path, PLAIN, tokenizer, "sft", SEQ_LEN)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert prepare(tmp_path, PLAIN, tokenizer, "sft", SEQ_LEN) == facts
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times
    for other, length in ((PLAIN[1:], SEQ_LEN), ([*PLAIN[1:], CALLING], SEQ_LEN), (PLAIN, SEQ_LEN // 2)):
        with pytest.raises(ConfigError, match=f"holds other dialogues .key {facts['key']}, now .*another folder"):
            prepare(tmp_path, other, tokenizer, "sft", length)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times


@pytest.mark.parametrize("left", ["nothing but a folder", "half a file", "all but the manifest"])
def test_killed_half_way_it_is_made_again(tmp_path, tokenizer, left):
    prepare(tmp_path / "whole", PLAIN, tokenizer, "sft", SEQ_LEN)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    (tmp_path / "killed" / "manifest.json").unlink()
    if left != "all but the manifest":
        (tmp_path / "killed" / "tokenizer.json").unlink()
        for path in sorted((tmp_path / "killed" / "sft").iterdir())[1:]:
            path.unlink()
        file = next((tmp_path / "killed" / "sft").iterdir())
        file.write_bytes(file.read_bytes()[:7] if left == "half a file" else b"")
        (tmp_path / "killed" / "sft" / "left_over.npy").write_bytes(b"0")
    with pytest.raises(ConfigError, match="no finished data folder"):
        load_tokenizer(tmp_path / "killed")
    prepare(tmp_path / "killed", PLAIN, tokenizer, "sft", SEQ_LEN)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_the_folder_is_all_that_training_reads(tmp_path, tokenizer):
    prepare(tmp_path, [*PLAIN, DIRECT, CALLING], tokenizer, "sft", SEQ_LEN)
    assert load_tokenizer(tmp_path).dumps() == tokenizer.dumps()
    microbatches = Microbatches(tmp_path, STAGE)
    batch = next(microbatches)
    assert all(z.shape == (2, SEQ_LEN) for z in batch.values()) and batch["weights"].any()
    microbatches.close()


def test_batches_for_a_validation_loss_hold_the_same_tokens_and_end_in_padding(tmp_path, tokenizer):
    dialogues = [*PLAIN, DIRECT, CALLING]
    made = batches([dialogue.tokens(tokenizer) for dialogue in dialogues], SEQ_LEN, 4, tokenizer)
    assert all(z.shape == (4, SEQ_LEN) for batch in made for z in batch.values())
    prepare(tmp_path, dialogues, tokenizer, "sft", SEQ_LEN)
    rows = rows_of(tmp_path)
    for name in rows[0]:
        everything = np.concatenate([batch[name] for batch in made])
        np.testing.assert_array_equal(everything[: len(rows)], [row[name] for row in rows])
        assert name in ("ids", "targets", "mtp_targets", "positions") or not everything[len(rows) :].any()
    assert np.all(np.concatenate([batch["ids"] for batch in made])[len(rows) :] == tokenizer.end)


def test_a_sampled_dialogue_comes_back_from_a_file_with_its_own_tokens():
    sampled = Dialogue((ASKED, said("Hm.", "In box 3.")), (TOOL,), True, (5, 6, 7), (False, True, True))
    rendered = Dialogue((ASKED, said("", "In box 3.")), enable_thinking=False)
    for dialogue in (sampled, rendered):
        assert Dialogue.from_whole(json.loads(json.dumps(dialogue.whole()))) == dialogue
