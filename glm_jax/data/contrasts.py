"""Labelled examples for each scorer, from what a machine with Python has: no downloads.

    prose        manuals (docstrings, topics of pydoc, readmes; a corpus's Chinese ones) against licences, bundles, tables, listings,
                 changelogs, and a corpus's reviews
    code         sources as people wrote them against generated files and against the same sources squeezed or laid bare
    code_page    pages with listings against pages without; the marks of a listing (fences, prompts) are taken out, so
                 that the classifier has to know code without them
    mathematics  docstrings with much LaTeX against docstrings with none

Folders of a user's own examples add to them: FOLDER/<scorer>/good/... and FOLDER/<scorer>/bad/... .
"""

import ast
import dis
import gzip
import importlib.metadata
import io
import re
import sysconfig
import textwrap
import types
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from glm_jax.data import sources
from glm_jax.data.corpus import is_chinese
from glm_jax.data.document import DataError, Document, digest, escaped, unit

NAMES = ("prose", "code", "code_page", "mathematics")
LANGUAGES: dict[str, str] = {
    **dict.fromkeys((".py", ".pyi"), "python"),
    **dict.fromkeys((".c", ".h", ".cc", ".cpp", ".hpp", ".cu"), "c"),
    **dict.fromkeys((".js", ".mjs", ".ts"), "javascript"),
    **dict.fromkeys((".go",), "go"),
    **dict.fromkeys((".rs",), "rust"),
    **dict.fromkeys((".java", ".kt", ".scala"), "java"),
    **dict.fromkeys((".sh",), "shell"),
}

_MOST = 800  # examples of a kind
_FILES_OF_A_KIND = 300  # and language, of installed packages
_PIECES = 4  # of one file
_PIECE = 4000  # characters
_SHORTEST = 200
_LONGEST_BARE = 20_000  # characters of Python that are parsed to be laid bare: it takes its time
_DEBIAN = Path("/usr/share/doc")
_LISTED = ("json", "argparse", "http", "email", "logging", "asyncio", "tarfile", "decimal", "inspect", "statistics")

_FILES = {
    "licence": re.compile(r"^([^,\n]*(?:LICEN[CS]E|COPYING|NOTICE|AUTHORS)[^,/\n]*),", re.MULTILINE | re.IGNORECASE),
    "bundle": re.compile(r"^([^,\n]+\.(?:js|mjs|css|map|svg)),", re.MULTILINE),
    "table": re.compile(r"^([^,\n]+\.(?:csv|tsv|dat|json|afm)),", re.MULTILINE),
    "source": re.compile(r"^([^,\n]+\.(?:py|pyi|c|h|cc|cpp|hpp|cu|js|mjs|ts)),", re.MULTILINE),
}
_LATEX = re.compile(r"\\[A-Za-z]+|:math:|\.\. math::")
_GENERATED = re.compile(r"generated (from|by|with)|do not edit", re.IGNORECASE)
_FENCED = re.compile(r"^[ \t]*(```+|~~~+)[^\n]*\n(.*?)^[ \t]*\1[ \t]*$", re.MULTILINE | re.DOTALL)
_PROMPT = re.compile(r"^[ \t]*(?:>>> ?|\.\.\. ?)", re.MULTILINE)
_DIRECTIVE = re.compile(r"^[ \t]*\.\. (?:code-block|code|sourcecode|plot)::[^\n]*\n", re.MULTILINE)
_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
_NAME = re.compile(r"\b[A-Za-z_][A-Za-z0-9_]{3,}\b")
_CHANGING = re.compile(r"0x[0-9a-f]{6,}|frozenset")
LISTED = 0.1  # share of lines in listings from which a page is one with code


@dataclass(frozen=True)
class Example:
    """`good` examples are of the class, `kind` says what it is, `group` goes to training or is held out as a whole."""

    text: str
    good: bool
    kind: str
    group: str
    language: str = ""  # of code


def gather(documents: list[Document], folders: Iterable[str]) -> dict[str, list[Example]]:
    """Examples by scorer: from the collected `documents`, the installed packages, Debian's manuals, the user's folders.

    Distinct texts, in an order and number that follow from the texts alone. DataError for a folder of another form.
    """
    files = list(_installed())
    pages = [
        d for d in documents if d.domain != "code" and d.source.split(":")[0] in ("topics", "readme", "docstrings")
    ]
    found = {
        "prose": [*_manuals(pages), *_of_corpus(documents), *_not_prose(files)],
        "code": [*_sources(documents, files)],
        "code_page": [*_code_pages(pages)],
        "mathematics": [*_mathematics(pages)],
    }
    for folder in folders:
        for name, example in _own(Path(folder)):
            found[name].append(example)
    return {name: _chosen(name, examples) for name, examples in found.items()}


def _chosen(name: str, examples: list[Example]) -> list[Example]:
    """Each text once, of each kind and language the first by hash."""
    kinds: dict[tuple[str, str], list[tuple[float, str, Example]]] = defaultdict(list)
    seen = set()
    for example in examples:
        key = digest(example.text)
        if key not in seen and len(example.text.strip()) >= _SHORTEST:
            seen.add(key)
            kinds[example.kind, example.language].append((unit("example", name, key), key, example))
    return [example for kind in sorted(kinds) for _, _, example in sorted(kinds[kind], key=lambda e: e[:2])[:_MOST]]


def _installed() -> Iterator[tuple[str, str, str]]:
    """(kind, group, path or text) of installed distributions' files by what they are, and of the lists of them; of each
    kind and language the first by hash."""
    records = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name and name not in records and (record := distribution.read_text("RECORD")):
            records[name] = (distribution, record)
    found: dict[tuple[str, str], list[tuple[float, str, str]]] = defaultdict(list)
    for name, (distribution, record) in records.items():
        found["list", ""].append((unit("file", name), name, record))
        for kind, pattern in _FILES.items():
            for path in pattern.findall(record):
                if "/tests/" not in path and not path.startswith(".."):
                    language = language_of(path) if kind == "source" else ""
                    place = str(distribution.locate_file(path))
                    found[kind, language].append((unit("file", path), name, place))
    for kind, language in sorted(found):
        for _, name, text in sorted(found[kind, language])[:_FILES_OF_A_KIND]:
            yield kind, f"package:{name}", text


def _read(path: str) -> str:
    """The text of a file, "" where it is none; `.gz` is unpacked."""
    try:
        data = Path(path).read_bytes()[:400_000]
        if path.endswith(".gz"):
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(400_000)
    except (OSError, EOFError):
        return ""
    return "" if b"\0" in data else data.decode("utf-8", "ignore")


def _cut(text: str) -> list[str]:
    """Up to four pieces from all over the text."""
    if len(text) <= _PIECE:
        return [text]
    count = min(_PIECES, len(text) // _PIECE)
    return [text[begin : begin + _PIECE] for begin in range(0, count * (len(text) // count), len(text) // count)]


def _manuals(pages: list[Document]) -> Iterator[Example]:
    for page in pages:
        yield Example(page.text[:_PIECE], True, "manual", page.group)
    for path in (sorted(_DEBIAN.glob("*/README*")) + sorted(_DEBIAN.glob("*/*.txt*")))[:_FILES_OF_A_KIND]:
        if len(text := _read(str(path))) > 1000:
            yield Example(text[:_PIECE], True, "Debian manual", f"debian:{path.parent.name}")


def _of_corpus(documents: list[Document]) -> Iterator[Example]:
    """Reviews, and manuals in their language."""
    for document in documents:
        if document.unwanted:
            yield Example(document.text[:_PIECE], False, "review", document.group)
        elif document.source.startswith("deb:") and is_chinese(document.text):
            yield Example(document.text[:_PIECE], True, "Chinese manual", document.group)


def _not_prose(files: list[tuple[str, str, str]]) -> Iterator[Example]:
    for kind, group, found in files:
        text = found if kind == "list" else _read(found) if kind in ("licence", "bundle", "table") else ""
        lines = text.count("\n") + 1
        if kind == "bundle" and len(text) / lines < 120:
            continue  # written by people
        for piece in _cut(text):
            yield Example(piece, False, "table" if kind == "list" else kind, group)
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in _LISTED:
        for path in sorted(root.glob(f"{name}.py")) + sorted(root.glob(f"{name}/*.py")):
            for piece in _cut(_listing(_read(str(path)))):
                yield Example(piece, False, "listing", f"listing:{name}")
    for path in sorted(_DEBIAN.glob("*/copyright"))[:_FILES_OF_A_KIND]:
        yield Example(_read(str(path))[:_PIECE], False, "licence", f"debian:{path.parent.name}")
    for path in sorted(_DEBIAN.glob("*/changelog.Debian.gz"))[:_FILES_OF_A_KIND]:
        yield Example(_read(str(path))[:_PIECE], False, "changelog", f"debian:{path.parent.name}")


def _listing(source: str) -> str:
    """What the compiler made of a module, as `dis` prints it, without what differs from process to process: addresses, and
    the order of sets."""
    out, waiting = io.StringIO(), [compile(source, "module", "exec")]
    while waiting:
        code = waiting.pop(0)
        dis.disassemble(code, file=out)
        waiting += [item for item in code.co_consts if isinstance(item, types.CodeType)]
        if out.tell() > 40_000:
            break
    return "".join(line for line in out.getvalue().splitlines(keepends=True) if not _CHANGING.search(line))


def _sources(documents: list[Document], files: list[tuple[str, str, str]]) -> Iterator[Example]:
    texts = [(d.path, d.group, d.text) for d in documents if d.domain == "code" and d.stdlib_module]
    texts += [(path, group, _read(path)) for kind, group, path in files if kind == "source"]
    include = Path(sysconfig.get_paths()["include"])
    texts += [(path.name, "python headers", _read(str(path))) for path in sorted(include.rglob("*.h"))]
    for path, group, text in texts:
        language = language_of(path)
        lines = text.splitlines()
        if len(text) < 800:
            continue
        if _GENERATED.search(text, 0, 800):
            for piece in _cut(text):
                yield Example(piece, False, "generated", group, language)
        elif len(text) / len(lines) > 120:
            yield Example(text[:_PIECE], False, "bundle", group, language)
        elif max(map(len, lines)) < 300:
            piece, choice = _cut(text)[-1], unit("worse", digest(text))
            yield Example(piece, True, "written", group, language)
            if choice < 0.5:
                yield Example(_squeezed(piece), False, "squeezed", group, language)
            elif language == "python" and len(text) < _LONGEST_BARE:
                yield Example(_bare(text)[:_PIECE], False, "laid bare", group, language)


def language_of(path: str) -> str:
    """The programming language of a file by its extension, "other" where it is none of `LANGUAGES`."""
    return LANGUAGES.get(Path(path).suffix.lower(), "other")


def _squeezed(text: str) -> str:
    """As minifiers leave it: no comments, short names, hardly a line end."""
    short: dict[str, str] = {}

    def shorter(found: re.Match[str]) -> str:
        name = found[0]
        if name.islower() and len(name) < 7:
            return name  # keywords are among these
        return short.setdefault(name, chr(97 + len(short) % 26) + (str(len(short) // 26) if len(short) > 25 else ""))

    text = _NAME.sub(shorter, _COMMENT.sub("", re.sub(r"(?m)^\s*#(?!\s*(?:include|define|if|endif)).*$", "", text)))
    return re.sub(r"\s*([=(){},;:+*/<>-])\s*", r"\1", re.sub(r"\s*\n\s*", ";", text))


class _Bare(ast.NodeTransformer):
    """No docstrings; arguments and local names of one letter."""

    def __init__(self):
        self._short: dict[str, str] = {}

    def visit(self, node: ast.AST) -> ast.AST:
        match node:
            case ast.Module() | ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                if ast.get_docstring(node, clean=False) is not None and len(node.body) > 1:
                    node.body = node.body[1:]
        return super().visit(node)

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.arg, node.annotation = self._shorter(node.arg), None
        return node

    def visit_Name(self, node: ast.Name) -> ast.Name:
        if isinstance(node.ctx, ast.Store) or node.id in self._short:
            node.id = self._shorter(node.id)
        return node

    def _shorter(self, name: str) -> str:
        count = len(self._short)
        return self._short.setdefault(name, chr(97 + count % 26) + (str(count // 26) if count > 25 else ""))


def _bare(text: str) -> str:
    """The same Python without a word for its reader."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            return ast.unparse(_Bare().visit(ast.parse(text)))
    except (SyntaxError, ValueError, RecursionError):
        return ""


def without_marks(page: str) -> tuple[str, float]:
    """(the page without fences, prompts and directives of listings, share of its lines that stand in listings)."""
    lines = max(page.count("\n"), 1)
    listed = sum(found[2].count("\n") for found in _FENCED.finditer(page)) + len(_PROMPT.findall(page))
    plain = _FENCED.sub(lambda found: textwrap.dedent(found[2]), page)
    return _DIRECTIVE.sub("", _PROMPT.sub("", plain)), listed / lines


def _code_pages(pages: list[Document]) -> Iterator[Example]:
    for page in pages:
        plain, share = without_marks(page.text[:_PIECE])
        if share >= LISTED:
            yield Example(plain, True, "with listings", page.group)
        elif share == 0 and "::\n" not in page.text:
            yield Example(plain, False, "without", page.group)


def _mathematics(pages: list[Document]) -> Iterator[Example]:
    for page in pages:
        count = len(_LATEX.findall(page.text[:_PIECE]))
        if count >= 3:
            yield Example(page.text[:_PIECE], True, "much LaTeX", page.group)
        elif count == 0:
            yield Example(page.text[:_PIECE], False, "no LaTeX", page.group)


def _own(folder: Path) -> Iterator[tuple[str, Example]]:
    """(scorer, example) of a user's folder."""
    known = [name for name in NAMES if (folder / name).is_dir()]
    if not known:
        raise DataError(f"{folder} has none of the folders {', '.join(NAMES)}; each holds good/ and bad/ with examples")
    for name in known:
        for label in ("good", "bad"):
            if not (folder / name / label).is_dir():
                raise DataError(f"{folder / name} has no folder {label}; a scorer needs good/ and bad/ examples")
            for path in sources.list_folder(folder / name / label):
                for piece in _cut(_read(str(path))):
                    kind = f"{folder.name}, {label}"
                    group = escaped(f"own:{path.relative_to(folder)}")
                    yield name, Example(piece, label == "good", kind, group, language_of(path.name))
