"""What is special about code: fill in the middle, and repositories as one text in dependency order.

GLM-4.5 publishes neither rate nor format of its FIM objective (spec section 5): half of the chosen documents take
CodeGeeX4's order, suffix first, half begin with the prefix; the cuts fall between characters.
"""

import ast
from collections import defaultdict

from glm_jax.data.document import unit

FIM_SUFFIX_FIRST = ("<|code_suffix|>", "<|code_prefix|>", "<|code_middle|>")
FIM_PREFIX_FIRST = ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>")


def fill_in_the_middle(text: str, *keys: object) -> list[tuple[str, str]]:
    """(special token, text after it) in the order of reading. Cuts and order are a pure function of the keys."""
    first, second = sorted(int(unit("cut", i, *keys) * (len(text) + 1)) for i in (0, 1))
    part = {
        "<|code_prefix|>": text[:first],
        "<|code_middle|>": text[first:second],
        "<|code_suffix|>": text[second:],
    }
    order = FIM_SUFFIX_FIRST if unit("order", *keys) < 0.5 else FIM_PREFIX_FIRST
    return [(token, part[token]) for token in order]


def pieces(text: str, max_chars: int) -> list[str]:
    """The text in pieces of at most `max_chars`, cut before a line, if possible one at the left margin."""
    if len(text) <= max_chars:
        return [text]
    found, current, size, margin = [], [], 0, 0
    for line in text.splitlines(keepends=True):
        if current and size + len(line) > max_chars:
            keep = margin if margin else len(current)
            found.append("".join(current[:keep]))
            current = current[keep:]
            size, margin = sum(map(len, current)), 0
            if current and size + len(line) > max_chars:
                found.append("".join(current))
                current, size = [], 0
        if current and line[:1].strip() and line[0] not in ")]}#":
            margin = len(current)
        current.append(line)
        size += len(line)
    return [*found, "".join(current)]


def concatenate(files: dict[str, str], cycles: str) -> str:
    """The files (path -> text) as one text in dependency order, each under a comment with its path."""
    return "".join(header + files[path] for header, path in arranged(files, cycles))


def arranged(files: dict[str, str], cycles: str, order: list[str] | None = None) -> list[tuple[str, str]]:
    """(what stands before the file, path) in the order of `concatenate`, or in the one given."""
    order = order or dependency_order(files, cycles)
    return [(f"# {path}\n" if place == 0 else f"\n# {path}\n", path) for place, path in enumerate(order)]


def dependency_order(files: dict[str, str], cycles: str) -> list[str]:
    """Paths so that a file comes after those it imports, one connected component after the other.

    Where imports go in a circle, `cycles` says which are given up: "fewest_missing" or "least_feedback", the functions
    below. Files that are not Python have no edges.
    """
    needs = imports(files)
    ordered = {"fewest_missing": fewest_missing, "least_feedback": least_feedback}[cycles]
    return [path for component in _components(needs) for path in ordered({path: needs[path] for path in component})]


def fewest_missing(needs: dict[str, set[str]]) -> list[str]:
    """DeepSeek-Coder's algorithm 1: again and again the file with the fewest imports still missing, then by path."""
    missing, users = {path: set(wanted) for path, wanted in needs.items()}, _users(needs)
    order = []
    while missing:
        path = min(missing, key=lambda p: (len(missing[p]), p))
        del missing[path]
        order.append(path)
        for user in users[path]:
            if user in missing:
                missing[user].discard(path)
    return order


def least_feedback(needs: dict[str, set[str]]) -> list[str]:
    """Eades, Lin and Smyth 1993: files that miss nothing come first and files that nobody waits for last; where there are
    neither, the one with the most waiting for it beyond what it misses opens the circle."""
    missing, users = {path: set(wanted) for path, wanted in needs.items()}, _users(needs)
    first: list[str] = []
    last: list[str] = []

    def take(path: str, where: list[str]) -> None:
        where.append(path)
        for user in users.pop(path):
            missing[user].discard(path)
        for wanted in missing.pop(path):
            users[wanted].discard(path)

    while missing:
        before = len(missing)
        for path in sorted(missing):
            if not missing[path]:
                take(path, first)
            elif not users[path]:
                take(path, last)
        if len(missing) == before:
            take(min(missing, key=lambda p: (len(missing[p]) - len(users[p]), p)), first)
    return first + last[::-1]


def _users(needs: dict[str, set[str]]) -> dict[str, set[str]]:
    users: dict[str, set[str]] = {path: set() for path in needs}
    for path, wanted in needs.items():
        for other in wanted:
            users[other].add(path)
    return users


def imports(files: dict[str, str]) -> dict[str, set[str]]:
    """Path -> paths of the files it needs when it is imported.

    Names re-exported by a package's `__init__` count for the module that defines them; imports inside functions or
    under TYPE_CHECKING and imports of the package's own root are left out (they would close cycles).
    """
    path_of = {_module(path): path for path in sorted(files) if path.endswith(".py")}
    statements = {name: _import_statements(files[path], path, path_of) for name, path in path_of.items()}
    exports = {name: {alias: (base, item) for base, item, alias in found} for name, found in statements.items()}
    needs: dict[str, set[str]] = {path: set() for path in files}
    for name, path in path_of.items():
        for base, item, _ in statements[name]:
            target = _defining_module(base, item, exports)
            own_root = target is not None and f"{name}.".startswith(f"{target}.")
            if target is not None and not own_root:
                needs[path].add(path_of[target])
    return needs


def _module(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _above(base: str, item: str | None, path: str, path_of: dict[str, str]) -> str:
    """`base` under the topmost folder above `path` that has such a module, as if it were on Python's search path."""
    folders = path.split("/")[:-1]
    for depth in range(len(folders) + 1):
        name = ".".join([*folders[:depth], base])
        if name in path_of or f"{name}.{item}" in path_of:
            return name
    return base


def _import_statements(text: str, path: str, path_of: dict[str, str]) -> list[tuple[str, str | None, str]]:
    """(module, name in it or None, name here) of the imports that run when the file is imported."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    package = path.split("/")[:-1]
    found = []
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            bases = [_above(alias.name, None, path, path_of) for alias in node.names]
            found += [(base, None, a.asname or a.name) for base, a in zip(bases, node.names, strict=True)]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                here = base if node.level else _above(base, alias.name, path, path_of)
                found.append((here, alias.name, alias.asname or alias.name))
        elif isinstance(node, ast.If):
            names = (getattr(part, "id", getattr(part, "attr", "")) for part in ast.walk(node.test))
            guarded = any("TYPE_CHECKING" in name for name in names)
            waiting += node.orelse if guarded else node.body + node.orelse
        elif isinstance(node, ast.Try):
            waiting += node.body + node.orelse + node.finalbody + [s for h in node.handlers for s in h.body]
        elif isinstance(node, (ast.With, ast.ClassDef)):
            waiting += node.body
    return found


def _defining_module(base: str, item: str | None, exports: dict[str, dict]) -> str | None:
    """The repository's module that `from base import item` (or `import base`) needs; None if it has no such module."""
    for _ in range(8):  # a chain of re-exports longer than this is a cycle
        if item is not None and f"{base}.{item}" in exports:
            return f"{base}.{item}"
        if base not in exports:
            return None
        origin, origin_item = exports[base].get(item, ("", None))
        if origin not in exports and f"{origin}.{origin_item}" not in exports:
            return base
        base, item = origin, origin_item
    return base


def _components(needs: dict[str, set[str]]) -> list[list[str]]:
    """Connected components, each sorted, in the order of their smallest path."""
    neighbours: dict[str, set[str]] = defaultdict(set)
    for path, wanted in needs.items():
        for other in wanted:
            neighbours[path].add(other)
            neighbours[other].add(path)
    seen: set[str] = set()
    components = []
    for start in sorted(needs):
        if start in seen:
            continue
        component, waiting = [], [start]
        seen.add(start)
        while waiting:
            path = waiting.pop()
            component.append(path)
            for other in neighbours[path] - seen:
                seen.add(other)
                waiting.append(other)
        components.append(sorted(component))
    return components
