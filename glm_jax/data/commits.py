"""Changes with all that was said about them, as one text each: bugs, changelog, message, diff (report, section 2.3).

GLM-4.5 reads issues, pull requests and commits that belong together in one context. Offline Debian's source packages stand
in: a patch has a message and a diff, the changelog says what was done and for which bug, and bugs tie patches together.
"""

import re
from collections import defaultdict
from collections.abc import Iterator

_DIFF = re.compile(r"^(?:--- |diff --git |Index: )", re.MULTILINE)
_BUG = re.compile(r"(?:bugs\.debian\.org/(?:cgi-bin/bugreport\.cgi\?bug=)?|(?<![\w/])#)(\d{4,8})\b")
_CVE = re.compile(r"\bCVE-\d{4}-\d{4,7}\b")
_RELEASE = re.compile(r"^(\S+ \([^)\s]+\)) [^\n]*;", re.MULTILINE)
_ITEM = re.compile(r"^ {1,4}[*+-] (.*(?:\n(?! {1,4}[*+-] | -- |\S).*)*)", re.MULTILINE)
_MESSAGE = 40  # characters that must be said about a change
_SHORTEST_NAME = 8  # of a patch's name, to be looked for in a changelog
_MOST_TOGETHER = 12  # patches of one bug: a number that more share is no bug of theirs


def contexts(patches: dict[str, str], changelog: str) -> Iterator[tuple[list[str], str]]:
    """(names, text) of changes that share a bug, or stand alone, in the order of the names. `patches`: name -> text.

    A text begins with the bugs and what the changelog says about them, then message and diff of each. What is no patch is left
    out, and so is a change of which nobody said anything.
    """
    items = _items(changelog)
    of_bug: dict[str, list[str]] = defaultdict(list)
    bugs_of, said_of, whole = {}, {}, {}
    for name in sorted(patches):
        diff = _DIFF.search(patches[name])
        if diff is None:
            continue
        message = patches[name][: diff.start()].strip()
        bugs = bugs_in(message)
        file = name.rsplit("/", 1)[-1].removesuffix(".patch").removesuffix(".diff")
        said = [
            item
            for item in items
            if (len(file) >= _SHORTEST_NAME and file in item) or not bugs.isdisjoint(bugs_in(item))
        ]
        if len(message) + sum(map(len, said)) < _MESSAGE:
            continue
        bugs_of[name] = bugs | {bug for item in said for bug in bugs_in(item)} if len(said) == 1 else bugs
        said_of[name], whole[name] = said, f"{message}\n\n{patches[name][diff.start() :].rstrip()}\n".lstrip("\n")
        for bug in bugs_of[name]:
            of_bug[bug].append(name)
    yielded: set[str] = set()
    for name in whole:
        if name not in yielded:
            together = _together(name, bugs_of, of_bug, yielded)
            yielded.update(together)
            yield together, _text(together, bugs_of, said_of, whole)


def bugs_in(text: str) -> set[str]:
    """Numbers of bugs, as #n, and CVEs that a text names."""
    return {f"#{number}" for number in _BUG.findall(text)} | set(_CVE.findall(text))


def _items(changelog: str) -> list[str]:
    """The items of a Debian changelog, each behind its release, newest first."""
    found = []
    releases = [*_RELEASE.finditer(changelog)]
    ends = [*(release.start() for release in releases[1:]), len(changelog)]
    for release, end in zip(releases, ends, strict=False):
        block = changelog[release.end() : end]
        found += [f"{release[1]}: {' '.join(item.split())}" for item in _ITEM.findall(block)]
    return found


def _together(name: str, bugs_of: dict[str, set[str]], of_bug: dict[str, list[str]], taken: set[str]) -> list[str]:
    """A change and the others of its bugs that stand in no text yet."""
    others = {
        other
        for bug in bugs_of[name]
        if len(of_bug[bug]) <= _MOST_TOGETHER
        for other in of_bug[bug]
        if other not in taken
    }
    return sorted({name, *others})


def _text(
    together: list[str], bugs_of: dict[str, set[str]], said_of: dict[str, list[str]], whole: dict[str, str]
) -> str:
    bugs = sorted({bug for name in together for bug in bugs_of[name]})
    said = list(dict.fromkeys(item for name in together for item in said_of[name]))
    parts = [f"Bugs: {', '.join(bugs)}\n"] if bugs else []
    parts += ["Changelog:\n" + "".join(f"* {item}\n" for item in said)] if said else []
    return "\n".join([*parts, *(whole[name] for name in together)])
