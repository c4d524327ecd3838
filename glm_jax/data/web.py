"""Web pages as text: what a reader sees, with code in fences as it was indented and formulas in their LaTeX.

resiliparse (Apache-2.0) finds the main content. Before it does, each listing is taken out of the page, without the cells
that number its lines, and comes back as a fenced block in the language that the page names; formulas that are kept as
scripts or as MathML come back as the LaTeX they were made from (design notes, data 2: the parser for code pages).
"""

import functools
import re
from collections import Counter
from typing import Any

MOST_BYTES = 20_000_000  # of a page
_DEEPEST = 3000  # elements inside one another: 0.1 s, which grows with their square
_LONGEST_TAG = 1_000_000  # bytes
_UNREADABLE = 0.005  # share of characters that no encoding explains

_TAG = re.compile(rb"<(/?)([a-zA-Z][a-zA-Z0-9]*)")
_LONG_TAG = re.compile(rb"<[^<>]{%d}" % _LONGEST_TAG)
# Elements that are empty, or that the next one of their kind closes.
_SHALLOW = frozenset(
    b"area base br col embed hr img input link meta source track wbr p li dt dd tr td th option".split()
)
_LANGUAGE = re.compile(r"(?:^|\s)(?:language-|lang-|highlight-source-|highlight-|brush:\s*)([A-Za-z0-9+#]+)")
_NAMED = ", ".join(f'[class*="{word}"]' for word in ("language-", "lang-", "highlight-", "brush:"))
_CHARSET = re.compile(rb"""charset\s*=\s*["']?([A-Za-z0-9_-]+)""", re.IGNORECASE)
_NO_LANGUAGE = ("default", "none", "source", "text", "plaintext", "auto", "notranslate")
_NUMBERS = ".linenos, .linenodiv, .lineno, .linenumber, .line-number, .line-numbers, .gutter, .ln, .blob-num"
_MATH = 'script[type^="math/tex"], annotation[encoding="application/x-tex"]'
_PLACE = re.compile("\ue000(\\d+)\ue001")  # stands for what was taken out; of Unicode's private characters
_BLANK = re.compile(r"[ \t]+\n|\n{3,}")


class Unusable(Exception):
    """A page that is dropped; the message is the reason."""


@functools.cache
def available() -> bool:
    """Whether resiliparse is installed (the extra `data`)."""
    try:
        import resiliparse.extract.html2text  # noqa: F401  # pyright: ignore[reportMissingImports, reportMissingModuleSource]
    except ImportError:
        return False
    return True


def text(page: bytes) -> str:
    """The main content of an HTML page. Unusable, with the reason, where it is no page that a person could read."""
    from resiliparse.extract.html2text import extract_plain_text  # pyright: ignore[reportMissingImports, reportMissingModuleSource]
    from resiliparse.parse.html import HTMLTree  # pyright: ignore[reportMissingImports, reportMissingModuleSource]

    check(page)
    tree = HTMLTree.parse(decode(page))
    if tree.body is None:
        raise Unusable("page without a body")
    taken = [*_take_listings(tree), *_take_formulas(tree, first=10**6)]
    plain = extract_plain_text(tree, main_content=True, alt_texts=False, preserve_formatting=True)
    plain = _BLANK.sub(lambda found: "\n" if found[0][0] in " \t" else "\n\n", plain)
    back = dict(taken)
    return _PLACE.sub(lambda found: back.get(int(found[1]), ""), plain).strip() + "\n"


def check(page: bytes) -> None:
    """Refuse what would keep a parser busy for minutes: too much, too deep, or a tag without an end."""
    if len(page) > MOST_BYTES:
        raise Unusable("page too large")
    if b"\0" in page:
        raise Unusable("binary file")
    if _LONG_TAG.search(page):
        raise Unusable("page with a huge tag")
    if page.count(b"<") - page.count(b"</") > _DEEPEST and depth(page) > _DEEPEST:
        raise Unusable("page nested too deeply")


def depth(page: bytes) -> int:
    """The most elements that are open at once, by their tags. A closing tag that closes nothing counts for nothing."""
    now = most = 0
    open_of: Counter[bytes] = Counter()
    for closing, name in _TAG.findall(page):
        name = name.lower()
        if closing and open_of[name]:
            open_of[name] -= 1
            now -= 1
        elif not closing and name not in _SHALLOW:
            open_of[name] += 1
            now += 1
            most = max(most, now)
    return most


def decode(page: bytes) -> str:
    """As UTF-8, else as the page says, else as its bytes look; Unusable if more than a few characters stay unreadable."""
    from resiliparse.parse.encoding import (  # pyright: ignore[reportMissingImports, reportMissingModuleSource]
        detect_encoding,
        map_encoding_to_html5,
    )

    try:
        return page.decode("utf-8-sig")
    except UnicodeDecodeError:
        said = _CHARSET.search(page, 0, 4096)
    known = map_encoding_to_html5(said[1].decode(), fallback_utf8=False) if said else None
    found = page.decode(known or detect_encoding(page, html5_compatible=True) or "utf-8", errors="replace")
    if found.count("\ufffd") > _UNREADABLE * len(found):
        raise Unusable("broken encoding")
    return found


def _take_listings(tree: Any) -> list[tuple[int, str]]:
    """(number, fenced block) of each <pre>; in the tree a paragraph with the number stands for it."""
    taken = []
    numbered = tree.body.query_selector(_NUMBERS) is not None
    for listing in _all(tree.body, "pre"):
        if (numbered and listing.closest(_NUMBERS) is not None) or not listing.text.strip():
            continue
        language = _language(listing)
        for numbers in _all(listing, _NUMBERS) if numbered else ():
            numbers.decompose()
        code = listing.text.strip("\n")
        fence = "```" if "```" not in code else "````"
        taken.append((len(taken), f"\n{fence}{language}\n{code}\n{fence}\n"))
        table = listing.closest("table") if numbered else None
        whole = table is not None and table.query_selector(_NUMBERS) is not None
        _replace(tree, table if whole else listing, "p", len(taken) - 1)
    return taken


def _take_formulas(tree: Any, first: int) -> list[tuple[int, str]]:
    r"""(number, LaTeX) of each formula kept as a script or beside MathML, in \( \) or, displayed, in \[ \]."""
    taken = []
    for number, source in enumerate(_all(tree.body, _MATH), start=first):
        if source.tag == "script":
            formula, display = source, "mode=display" in (source.getattr("type") or "")
        else:
            formula = source.closest("math") or source
            display = formula.getattr("display") == "block"
        open_, close = (r"\[", r"\]") if display else (r"\(", r"\)")
        taken.append((number, f"{open_}{source.text.strip()}{close}"))
        _replace(tree, formula, "span", number)
    return taken


def _all(node: Any, selector: str) -> tuple[Any, ...]:
    """As a slice: iterating over resiliparse's collection makes all of it anew at each step."""
    return node.query_selector_all(selector)[:]


def _replace(tree: Any, node: Any, tag: str, number: int) -> None:
    place = tree.create_element(tag)
    place.text = f"\ue000{number}\ue001"
    node.parent.replace_child(place, node)


def _language(listing: Any) -> str:
    """What the classes of a listing, of the elements around it or of the code in it call its language."""
    for node in (listing.closest(_NAMED), listing.query_selector(_NAMED)):
        found = node and _LANGUAGE.search(node.getattr("class"))
        if found and found[1].lower() not in _NO_LANGUAGE:
            return found[1].lower()
    return ""
