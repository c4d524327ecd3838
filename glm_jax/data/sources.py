"""Documents that every machine with Python has, and the user's own folders. Files are parsed, never imported.

The standard library is the code domain: its packages are repositories, its modules single files. Topics of `pydoc`,
docstrings and readme pages are the general domain; docstrings with LaTeX are mathematics (design notes, data 1.5).
"""

import ast
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from glm_jax.data import readers, web
from glm_jax.data.document import DataError, Document, digest, escaped, read_documents, write_documents
from glm_jax.data.engine import Engine, Shard

# Packages that this project installs, distribution and module alike. Of the first every long docstring is taken,
# of the second those with LaTeX.
PROSE = ("numpy", "flax", "optax", "grain", "jinja2", "tqdm", "tyro")
MATHS = ("scipy", "jax", "matplotlib", "tensorboardX")
PARTS = ("library", *PROSE, *MATHS)

PAGES = (".html", ".htm", ".xhtml")
EXTENSIONS: dict[str, str] = {
    **dict.fromkeys((".txt", ".md", ".rst"), "general"),
    **dict.fromkeys((".tex",), "math"),
    **dict.fromkeys(PAGES, "general"),
    **dict.fromkeys(
        (".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".go", ".rs", ".java", ".js", ".ts"), "code"
    ),
    **dict.fromkeys((".sh", ".rb", ".jl", ".lua", ".sql", ".kt", ".scala", ".swift", ".hs", ".ml"), "code"),
}

LATEX = re.compile(r":math:|\.\. math::|\\(?:frac|sum|int|sqrt|mathbb|mathrm|begin|alpha|left)\b|\$\$")
_GENERATED = re.compile(r"generated (from|by|with)|do not edit", re.IGNORECASE)
_SHORTEST = 64  # characters of a document
_LONGEST_LINE = 1_000_000  # characters: no line of a text is as long
_SHORTEST_DOCSTRING = 200
_CACHES = ("__pycache__", "node_modules")
_SKIPPED = re.compile(r"(^|/)(tests?|testing|idle_test|_vendor|site-packages|__pycache__)(/|$)")


def builtin(engine: Engine, folder: Path, drops: Counter[str], tell: Callable[[int, int], None]) -> list[Document]:
    """Standard library, topics, docstrings and readme pages, each of `PARTS` read by the engine; `folder` is there meanwhile."""
    key = digest(json.dumps(environment(), sort_keys=True))
    shards = [Shard(f"{part}.jsonl", (Path(part),), key, 4 if part == "library" else 1) for part in PARTS]
    documents = []
    for shard, told in zip(shards, engine.run(work, shards, {}, folder, tell), strict=True):
        drops.update(told["drops"])
        documents += read_documents(folder / shard.name)
    shutil.rmtree(folder)
    return documents


def _of_part(part: str, drops: Counter[str]) -> Iterator[Document]:
    """Documents of one of `PARTS`. Counts what it leaves out in `drops`, by reason."""
    root = Path(sysconfig.get_paths()["stdlib"])
    if part == "library":
        yield from _standard_library(root, drops)
        yield from _topics(root / "pydoc_data" / "topics.py", drops)
        return
    spec = importlib.util.find_spec(part)
    if spec is None or not spec.submodule_search_locations:
        drops["package not installed"] += 1
        return
    root = Path(next(iter(spec.submodule_search_locations)))
    for path in _files(root, ".py"):
        name = f"{part}/{path.relative_to(root).as_posix()}"
        yield from _docstrings(path, name, f"api:{name}", drops, latex_only=part in MATHS)
    yield from _readme(part, drops)


def work(inputs: Sequence[Path], output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """For `glm_jax.data.engine`: the documents of the part that its one input is called."""
    drops: Counter[str] = Counter()
    documents = list(_of_part(inputs[0].name, drops))
    write_documents(output, documents)
    return {"drops": dict(sorted(drops.items()))}


def environment() -> dict[str, str]:
    """Versions that decide what `builtin` yields and how it is cut."""
    versions = {"python": platform.python_version()}
    for distribution in (*PROSE, *MATHS, "tokenizers"):
        try:
            versions[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            versions[distribution] = "absent"
    return versions


def folder(root: Path, max_bytes: int, drops: Counter[str]) -> Iterator[Document]:
    """Documents of a user's folder: domain by extension; code below a subfolder belongs to that repository."""
    taken: Counter[str] = Counter()
    for path in list_folder(root):
        if readers.reader_of(path):
            yield from _of_many(path, root, max_bytes, drops, taken)
            continue
        domain = EXTENSIONS.get(path.suffix.lower())
        if domain is None:
            drops["unknown extension"] += 1
            continue
        text = _read_page(path, drops) if path.suffix.lower() in PAGES else _read(path, drops)
        if text is None or not usable(text, domain == "code", drops):
            continue
        if domain == "general" and LATEX.search(text):
            domain = "math"
        relative = path.relative_to(root)
        name = f"{root.name}/{relative.as_posix()}"
        repo = f"{root.name}/{relative.parts[0] if len(relative.parts) > 1 else '.'}" if domain == "code" else None
        fields = {"source": f"folder:{root.name}", "path": name, "group": f"folder:{repo or name}"}
        yield from documents(text, max_bytes, taken, domain=domain, repo=repo, **fields)
    if not taken:
        known = " ".join(sorted((*EXTENSIONS, *readers.EXTENSIONS)))
        raise DataError(f"{root}: no usable text; it needs files in UTF-8 with one of the extensions {known}")


def _of_many(path: Path, root: Path, max_bytes: int, drops: Counter[str], taken: Counter[str]) -> Iterator[Document]:
    """Documents of a file that holds many texts. Code of a repository keeps its path there."""
    relative = path.relative_to(root).as_posix()
    for number, entry in enumerate(readers.read(path, drops)):
        text = entry.text.replace("\r\n", "\n").replace("\r", "\n")
        domain = entry.domain or ("math" if LATEX.search(text) else "general")
        if not usable(text, domain == "code", drops):
            continue
        name = f"{root.name}/{relative}/{entry.name or number}"
        repo = f"{root.name}/{entry.repo}" if entry.repo and domain == "code" else None
        if repo and entry.name:
            name = f"{repo}/{entry.name}"
        fields = {"source": f"folder:{root.name}", "path": name, "group": f"folder:{repo or name}"}
        yield from documents(text, max_bytes, taken, domain=domain, repo=repo, **fields)


def list_folder(root: Path) -> list[Path]:
    """Files below `root` in the order of their names, without hidden ones and caches; DataError if there are none."""
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "does not exist"
        raise DataError(f"{root} {problem}; give --data.paths folders of text or code")

    def refuse(error: OSError) -> None:
        way_out = "change its permissions or leave it out of --data.paths"
        raise DataError(f"{error.filename or root} cannot be read; {way_out}") from error

    files = []
    for here, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in _CACHES]
        paths = (Path(here, name) for name in names if not name.startswith("."))
        files += [path for path in paths if path.is_file()]  # no dangling links, no pipes
    if not files:
        raise DataError(f"{root} is empty; put text (.txt .md .tex) or code (.py ...) into it or leave it out")
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def documents(text: str, max_bytes: int, taken: Counter[str], *, path: str, **fields: Any) -> Iterator[Document]:
    """A text, or the pieces that it is cut into. A label that is `taken`, by a piece or another text, gets a number."""
    for piece in cut(text, max_bytes):
        yield Document.of(piece, path=f"{path}#{taken[path]}" if taken[path] else path, **fields)
        taken[path] += 1


def cut(text: str, max_bytes: int) -> list[str]:
    """Pieces of at most about `max_bytes`, cut at line ends where lines allow it."""
    if len(text.encode()) <= max_bytes:
        return [text]
    pieces, size = [[]], 0
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), max_bytes):
            part = line[start : start + max_bytes]
            width = len(part.encode())
            if size and size + width > max_bytes:
                pieces.append([])
                size = 0
            pieces[-1].append(part)
            size += width
    return ["".join(piece) for piece in pieces]


def _files(root: Path, suffix: str) -> list[Path]:
    found = (path for path in root.rglob("*" + suffix) if not _SKIPPED.search(path.relative_to(root).as_posix()))
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _read(path: Path, drops: Counter[str]) -> str | None:
    try:
        data = path.read_bytes()
    except OSError:
        drops["unreadable file"] += 1
        return None
    return decoded(data, drops)


def decoded(data: bytes, drops: Counter[str]) -> str | None:
    """A file's text with line ends of one kind; None, and the reason in `drops`, if it is none in UTF-8."""
    if b"\0" in data:
        drops["binary file"] += 1
        return None
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        drops["undecodable bytes"] += 1
        return None


def _read_page(path: Path, drops: Counter[str]) -> str | None:
    """The text of a web page, as UTF-8 wants it; what cannot be decoded or would hang a parser is dropped by reason."""
    if not web.available():
        drops['web page, and no resiliparse to read it (pip install ".[data]")'] += 1
        return None
    try:
        if path.stat().st_size > web.MOST_BYTES:
            raise web.Unusable("page too large")
        return web.text(path.read_bytes())
    except OSError:
        drops["unreadable file"] += 1
    except web.Unusable as reason:
        drops[str(reason)] += 1
    return None


def usable(text: str, code: bool, drops: Counter[str]) -> bool:
    """Rules of StarCoder's kind: too little text, none in UTF-8, generated code, long lines, tables of numbers."""
    if len(text.strip()) < _SHORTEST:
        drops["too short"] += 1
        return False
    if escaped(text) != text:
        drops["half a surrogate pair"] += 1
        return False
    lines = text.splitlines()
    if code and _GENERATED.search(text, 0, 600):
        drops["generated code"] += 1
        return False
    longest = max(map(len, lines))
    if longest > _LONGEST_LINE or (code and (len(text) / len(lines) > 100 or longest > 1000)):
        drops["long lines"] += 1
        return False
    if sum(map(str.isalpha, text)) < 0.4 * (len(text) - text.count(" ") - text.count("\n")):
        drops["hardly any letters"] += 1
        return False
    return True


def _standard_library(root: Path, drops: Counter[str]) -> Iterator[Document]:
    for path in _files(root, ".py"):
        name = path.relative_to(root).as_posix()
        top = name.split("/")[0]
        is_module = "/" not in name
        if name.startswith("pydoc_data/") or not (is_module or (root / top / "__init__.py").exists()):
            continue
        text = _read(path, drops)
        if text is None or not usable(text, True, drops):
            continue
        group = f"module:{top.removesuffix('.py')}" if is_module else f"package:{top}"
        yield Document.of(text, domain="code", source="stdlib", path=name, group=group, repo=None if is_module else top)
        yield from _docstrings(path, name, group, drops)


def _topics(path: Path, drops: Counter[str]) -> Iterator[Document]:
    if not path.is_file():
        drops["pydoc topics not installed"] += 1
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Dict):
            for topic, text in ast.literal_eval(node).items():
                if usable(text, False, drops):
                    fields = {"source": "topics", "path": f"topics/{topic}", "group": f"topic:{topic}"}
                    yield Document.of(text, domain="general", **fields)
            return


def _readme(distribution: str, drops: Counter[str]) -> Iterator[Document]:
    try:
        text = importlib.metadata.metadata(distribution)["Description"]
    except importlib.metadata.PackageNotFoundError:
        drops["readme not installed"] += 1
        return
    if isinstance(text, str) and usable(text, False, drops):
        domain = "math" if LATEX.search(text) else "general"
        fields = {"source": "readme", "path": f"readme/{distribution}", "group": f"readme:{distribution}"}
        yield Document.of(text, domain=domain, **fields)


def _docstrings(path: Path, name: str, group: str, drops: Counter[str], latex_only: bool = False) -> Iterator[Document]:
    """One page a docstring: the qualified name with its signature, then the text."""
    text = _read(path, drops)
    if text is None or '"""' not in text or (latex_only and not LATEX.search(text)):
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            pages = list(_pages(ast.parse(text), name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")))
    except (SyntaxError, RecursionError, MemoryError):
        drops["unparsable file"] += 1
        return
    source = "docstrings:" + (name.split("/")[0] if group.startswith("api:") else "stdlib")
    for title, page in pages:
        domain = "math" if LATEX.search(page) else "general"
        if len(page) >= _SHORTEST_DOCSTRING and (domain == "math" or not latex_only):
            label = f"{name}:{title.split('(')[0]}"
            yield Document.of(escaped(f"{title}\n\n{page}\n"), domain=domain, source=source, path=label, group=group)


def _pages(node: ast.AST, qualified: str) -> Iterator[tuple[str, str]]:
    """(title, docstring) of a module, class or function and of what it defines; also texts given to `add_newdoc`."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        page = ast.get_docstring(node)
        if page is not None:
            yield qualified + (f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef) else ""), page.strip()
        if isinstance(node, (ast.Module, ast.ClassDef)):
            for child in node.body:
                yield from _pages(child, f"{qualified}.{getattr(child, 'name', '')}")
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        call = node.value
        if isinstance(call.func, ast.Name) and call.func.id == "add_newdoc":
            strings = [arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            if len(strings) == len(call.args) >= 2:
                yield ".".join(strings[:-1]), ast.literal_eval(call.args[-1]).strip()
