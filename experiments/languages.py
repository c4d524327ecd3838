"""Train the model that tells languages apart, on a machine with translations, and measure it on translated manual pages.

    python -m experiments.languages                      # measures the model that comes with the code
    python -m experiments.languages --out languages.npz  # trains another one, and measures that

It learns from gettext's catalogs (the messages of programs, LANGUAGE/LC_MESSAGES/*.mo), which are labelled by their folder and
written by people; what it is measured on is another kind of text, by other people. A Debian machine with manpages-de, -fr, ... has both.
"""

import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from experiments import cli
from glm_jax.config import ConfigError
from glm_jax.data import language

LANGUAGES = (
    "ar", "bg", "ca", "cs", "da", "de", "el", "en", "es", "fa", "fi", "fr", "he", "hi", "hr", "hu", "id", "it", "ja", "ko",
    "nl", "pl", "pt", "ro", "ru", "sk", "sv", "th", "tr", "uk", "vi", "zh",
)  # fmt: skip


@dataclass(frozen=True)
class Args:
    """Where labelled text is."""

    out: Path | None = None
    """File to write a newly trained model to; by default the one that comes with the code is measured."""
    catalogs: Path = Path("/usr/share/locale")
    """Folder of gettext's catalogs."""
    manuals: Path = Path("/usr/share/man")
    """Folder of manual pages, translated ones in folders named by their language."""
    most: int = 2000
    """Examples of a language to learn from, and twelve times the pages of a language to be measured on."""


def main(args: Args) -> None:
    model = None
    if args.out is not None:
        if not args.catalogs.is_dir():
            raise ConfigError(f"--catalogs {args.catalogs} is no folder; give one with LANGUAGE/LC_MESSAGES/*.mo")
        model = language.learn(list(language.catalogs(args.catalogs, LANGUAGES, args.most)))
        model.save(args.out)
        print(f"{args.out}: {len(model.classes)} languages, {args.out.stat().st_size / 1e3:.0f} kB")
    pages = list(language.manuals(args.manuals, LANGUAGES, args.most // 12))
    if not pages:
        raise ConfigError(
            f"--manuals {args.manuals} has no manual pages to measure on; give a folder LANGUAGE/man1/*.gz"
        )
    begin = time.perf_counter()
    found = language.identify([text for _, text in pages], model)
    seconds = time.perf_counter() - begin
    pairs = [(said, name) for (said, _), name in zip(pages, found, strict=True)]
    print(f"{len(pages):,} manual pages, {len(pages) / seconds:,.0f} a second")
    print(f"right: {100 * sum(said == name for said, name in pairs) / len(pairs):.2f} %")
    wrong: dict[str, Counter[str]] = defaultdict(Counter)
    for said, name in pairs:
        wrong[said][name] += 1
    for said in sorted(wrong):
        others = ", ".join(f"{name} {count}" for name, count in wrong[said].most_common() if name != said)
        print(
            f"  {said}  {wrong[said][said]:5,} of {wrong[said].total():5,}"
            + (f"   taken for {others}" if others else "")
        )


if __name__ == "__main__":
    cli.main(main)
