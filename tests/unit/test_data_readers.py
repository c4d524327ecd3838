"""Files of many texts: what comes out of them, and what is dropped by reason."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from glm_jax.data import heldout, readers, sources, web
from glm_jax.data.document import DataError

PROSE = "There is a reason for this, and it is that all of the words here are plain.\n" * 4
CODE = "import os\n\n\ndef value(of):\n    return compute(of, os.name)\n" * 3


def _read(path: Path) -> tuple[list[readers.Entry], Counter]:
    drops = Counter()
    return list(readers.read(path, drops)), drops


@pytest.mark.parametrize("packed", [False, True])
def test_lines_of_json_give_texts_with_what_they_say_of_themselves(tmp_path, packed):
    rows = [{"text": PROSE, "url": "page"}, {"content": CODE, "repo_name": "a/b", "path": "c.py"}, {"meta": 1}, [1]]
    data = "\n".join(json.dumps(row) for row in rows).encode() + b"\n{broken\n\xff\xfe\n"
    path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    path.write_bytes(gzip.compress(data) if packed else data)
    found, drops = _read(path)
    assert found == [readers.Entry(PROSE, "page"), readers.Entry(CODE, "c.py", "code", "a/b")]
    assert drops == {"record without a text": 1, "no JSON": 2}


def test_a_line_without_end_is_dropped_and_the_next_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_MOST", 1000)
    path = tmp_path / "a.jsonl"
    path.write_text("[" * 5000 + "\n" + json.dumps({"text": "next"}) + "\n")
    found, drops = _read(path)
    assert [entry.text for entry in found] == ["next"]
    assert drops == {"line too long": 1}


def test_a_file_that_ends_too_early_gives_what_it_has(tmp_path):
    rows = "".join(json.dumps({"text": f"{number} {PROSE}"}) + "\n" for number in range(2000))
    whole = gzip.compress(rows.encode(), 0)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    found, drops = _read(tmp_path / "a.jsonl.gz")
    assert 500 < len(found) < 1100
    assert drops == {"damaged compressed file": 1}


def test_events_of_a_repository_become_conversations_in_the_order_of_time(tmp_path):
    issue = {"number": 7, "title": "It fails", "body": "On empty input."}
    comments = [{"id": i, "created_at": at, "body": b, "user": {"login": u}} for i, at, b, u in (
        (2, "2020-01-02", "Fixed.", "bo"), (1, "2020-01-01", "I see it too.", "al"))]  # fmt: skip
    review = {"number": 8, "title": "Fix", "body": None}
    hunk = {
        "id": 3,
        "created_at": "2020-01-03",
        "body": "Good.",
        "diff_hunk": "@@ -1 +1 @@\n-a\n+b",
        "user": {"login": "al"},
    }
    events = [
        {"type": "IssueCommentEvent", "repo": {"name": "a/b"}, "payload": {"issue": issue, "comment": comments[0]}},
        {"type": "IssueCommentEvent", "repo": {"name": "a/b"}, "payload": {"issue": issue, "comment": comments[1]}},
        {
            "type": "PullRequestReviewCommentEvent",
            "repo": {"name": "a/b"},
            "payload": {"pull_request": review, "comment": hunk},
        },
        {"type": "WatchEvent", "repo": {"name": "a/b"}, "payload": {"action": "started"}},
    ]
    path = tmp_path / "2020-01-01-0.json.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, events)).encode()))
    found, drops = _read(path)
    assert [(entry.name, entry.text) for entry in found] == [
        ("a/b#7", "# It fails\n\nOn empty input.\n\nal: I see it too.\n\nbo: Fixed.\n"),
        ("a/b#8", "# Fix\n\nal: ```diff\n@@ -1 +1 @@\n-a\n+b\n```\nGood.\n"),
    ]
    assert drops == {"event WatchEvent says nothing": 1}


def test_what_closes_an_issue_stands_behind_it_with_its_diff(tmp_path):
    def event(number, title, body, **more):
        kind = "pull_request" if more else "issue"
        payload = {kind: {"number": number, "title": title, "body": body, **more}}
        return {"type": "Event", "repo": {"name": "a/b"}, "payload": payload}

    events = [
        event(3, "Mend it", "Fixes #9, see #4", diff="--- a\n+++ b\n@@ -1 +1 @@\n-a\n+b\n"),
        event(9, "It fails", "On empty input."),
        event(4, "Another", "closes #77, which nobody has"),
        event(5, "A circle", "fixed #6"),
        event(6, "Of two", "Resolves: #5"),
    ]
    path = tmp_path / "events.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in events))
    found = {entry.name: entry.text for entry in _read(path)[0]}
    assert list(found) == ["a/b#4", "a/b#9", "a/b#5"]
    assert found["a/b#9"] == (
        "# It fails\n\nOn empty input.\n\n# Mend it\n\nFixes #9, see #4\n\n```diff\n--- a\n+++ b\n@@ -1 +1 @@\n-a\n+b\n```\n"
    )
    assert found["a/b#5"].startswith("# A circle") and "# Of two" in found["a/b#5"]


def test_only_objects_as_repo_and_payload_make_an_event(tmp_path):
    issue = {"number": 1, "title": "It fails", "body": "Always."}
    rows = [
        {"type": "msg", "payload": {"x": 1}, "repo": "a/b", "text": "of a repository"},
        {"type": "tool", "payload": "x", "text": "of a tool"},
        {"type": "Event", "repo": {"name": "a/b"}, "payload": {"issue": issue, "comment": {"body": "x", "user": "bo"}}},
        {"type": "Event", "repo": {"name": "a/b"}, "payload": {}},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, drops = _read(path)
    assert [(entry.text, entry.repo) for entry in found] == [
        ("of a repository", "a/b"),
        ("of a tool", None),
        ("# It fails\n\nAlways.\n\n: x\n", None),
    ]
    assert drops == {"event Event says nothing": 1}


def _record(kind: str, body: bytes, uri: str = "") -> bytes:
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {uri}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body + b"\r\n\r\n"


def _answer(body: bytes, *fields: str, status: str = "200 OK") -> bytes:
    return "\r\n".join((f"HTTP/1.1 {status}", "Content-Type: text/html", *fields, "", "")).encode() + body


@pytest.mark.skipif(not web.available(), reason="needs resiliparse")
def test_a_crawl_gives_its_pages(tmp_path):
    page = f"<html><body><main><p>{PROSE}</p></main></body></html>".encode()
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (page[:50], page[50:])) + b"0\r\n\r\n"
    records = [
        _record("warcinfo", b"software: none\r\n"),
        _record("request", b"GET / HTTP/1.1\r\n\r\n", "one"),
        _record("response", _answer(page), "one"),
        _record("response", _answer(chunks, "Transfer-Encoding: chunked"), "two"),
        _record("response", _answer(gzip.compress(page), "Content-Encoding: gzip"), "three"),
        _record("response", _answer(page, status="404 Not Found"), "four"),
        _record("response", b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n\x89PNG", "five"),
        _record("response", _answer(b"<div>" * 4000 + page), "six"),
    ]
    path = tmp_path / "a.warc.gz"
    path.write_bytes(b"".join(map(gzip.compress, records)))
    found, drops = _read(path)
    assert [entry.name for entry in found] == ["one", "two", "three"]
    assert len({entry.text for entry in found}) == 1 and "all of the words" in found[0].text
    assert drops == {"page nested too deeply": 1}
    path.write_bytes(gzip.compress(b"WARC/1.0\r\nContent-Length: 99999999999\r\n\r\n"))
    assert _read(path) == ([], Counter({"damaged or too large WARC record": 1}))


def test_tables_give_their_rows(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": [PROSE, None], "url": ["page", "none"], "score": [0.5, 0.1]})
    parquet.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    with pyarrow.ipc.new_stream(str(tmp_path / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table)
    for path in sorted(tmp_path.iterdir()):
        assert _read(path) == ([readers.Entry(PROSE, "page")], Counter({"record without a text": 1}))
        path.write_bytes(b"no table")
        assert _read(path) == ([], Counter({"damaged table": 1}))


def test_without_pyarrow_a_table_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"\.\[data\]"):
        _read(tmp_path / "a.parquet")


def test_a_folder_gives_the_texts_of_such_files_besides_its_own(tmp_path):
    rows = [{"text": PROSE}, {"content": CODE, "repo": "tool", "path": "tool/a.py"}, {"text": "short"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "notes.md").write_text(PROSE)
    drops = Counter()
    found = {d.path.removeprefix(f"{tmp_path.name}/"): d for d in sources.folder(tmp_path, 10**6, drops)}
    assert {name: (d.domain, bool(d.repo)) for name, d in found.items()} == {
        "notes.md": ("general", False),
        "rows.jsonl/0": ("general", False),
        "tool/tool/a.py": ("code", True),
    }
    assert drops == {"too short": 1}


def test_a_text_with_half_a_surrogate_pair_is_dropped_and_a_name_with_one_is_spelt_out(tmp_path):
    rows = [{"text": PROSE + "\ud83d"}, {"text": PROSE + "\U0001f600", "url": "page \udc80"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    drops = Counter()
    (found,) = sources.folder(tmp_path, 10**6, drops)
    assert found.text.endswith("\U0001f600") and found.path.endswith("page \\udc80")
    assert drops == {"half a surrogate pair": 1}
    assert next(readers.strings(tmp_path / "rows.jsonl")).endswith("\\ud83d")


def test_files_of_one_repository_and_path_all_stay(tmp_path):
    for name in ("first", "second"):
        row = {"repo": "x/y", "path": "src/a.py", "text": f"# {name}\n{CODE * 99}"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    found = list(sources.folder(tmp_path, 6000, Counter()))
    assert [d.path.rpartition("/")[2] for d in found] == ["a.py", "a.py#1", "a.py#2", "a.py#3", "a.py#4", "a.py#5"]
    (whole,) = (d.text for d in heldout.with_long(found, "fewest_missing") if d.domain == "long")
    assert "# first" in whole and "# second" in whole
