"""The data steps beside their peers on the same pages, in one process on one core: extraction, MinHash, the whole chain.

    pip install trafilatura lxml_html_clean datasketch datatrove spacy xxhash    # the peers; what is missing is left out
    python -m experiments.bench_data --archives data/default/archives --pages 400

Pages are drawn by hash from the .deb archives that experiments.data fetched. The chain is: HTML to text, the rules for text
(the same function on both sides), near duplicates by 14 x 8 MinHash of 5-grams, JSONL. Times are CPU seconds of the process and
its children, so that other work on the machine counts for little; every part runs `rounds` times, in turn, and the least counts.
"""

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import cli
from glm_jax.config import Data
from glm_jax.data import cleaning, dedup, sources, web
from glm_jax.data.corpus import archives
from glm_jax.data.document import DataError, Document, unit, write, write_documents

BANDS, ROWS = 14, 8
MOST_BYTES = 300_000  # of a page; longer ones are a few and would be most of the time


@dataclass(frozen=True)
class Args:
    archives: Path
    """Folder with .deb archives of web pages."""
    pages: int = 400
    """Drawn by hash from all of them."""
    rounds: int = 3
    """Times that each side runs."""
    out: Path = Path("experiments/results/bench_data.json")
    """Where the figures go."""


def main(args: Args) -> None:
    pages = dict(_pages(args.archives, args.pages))
    texts = [text for text in map(_extracted, pages.values()) if text]
    size = {"pages": len(pages), "html_bytes": sum(map(len, pages.values())), "text_bytes": sum(map(len, texts))}
    print(f"{size['pages']} pages, {size['html_bytes'] / 1e6:.1f} MB of HTML", flush=True)
    parts = {
        "extraction": (lambda: _extract(pages), _trafilatura(pages)),
        "minhash": (lambda: _minhash(texts), _datasketch(texts)),
        "chain": (lambda: _chain(pages), _datatrove(pages)),
    }
    results: dict[str, Any] = {**size, "cores": 1, "rounds": args.rounds}
    for name, (ours, peer) in parts.items():
        if isinstance(peer, str):
            print(f"{name:<11} no {peer} here", flush=True)
            continue
        results[name] = _compared(ours, peer, args.rounds)
        told = results[name]
        print(
            f"{name:<11} {told['ours_s']:8.2f} s, peer {told['peer_s']:8.2f} s: {told['ratio']:.2f} times", flush=True
        )
    write(args.out, json.dumps(results, indent=1) + "\n")


def _compared(ours: Callable[[], int], peer: Callable[[], int], rounds: int) -> dict[str, Any]:
    """Least CPU seconds of each, and what each made of the pages."""
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    made = {}
    for _ in range(rounds):
        for name, call in (("ours", ours), ("peer", peer)):
            begun = _cpu_seconds()
            made[name] = call()
            seconds[name].append(_cpu_seconds() - begun)
    least = {name: min(found) for name, found in seconds.items()}
    figures = {f"{name}_{what}": round(value, 3) for name, value in least.items() for what in ("s",)}
    return {**figures, "ratio": round(least["peer"] / least["ours"], 2), "made": made}


def _cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(os.times()[:4])


def _pages(folder: Path, count: int) -> Iterator[tuple[str, bytes]]:
    """(name, HTML) of `count` pages, drawn by hash."""
    found = []
    for path in sorted(folder.glob("*.deb")):
        for name, data in archives.members(path, Counter()):
            if Path(name).suffix.lower() in sources.PAGES and 2000 < len(data) < MOST_BYTES:
                found.append((unit("bench", path.name, name), f"{path.stem}/{name}", data))
                if len(found) > 4 * count:
                    found = sorted(found)[:count]
    if not found:
        raise DataError(
            f"{folder} has no .deb archives with pages; python -m experiments.data --recipe default fetches some"
        )
    for _, name, data in sorted(found)[:count]:
        yield name, data


def _extracted(page: bytes) -> str:
    try:
        return web.text(page)
    except web.Unusable:
        return ""


def _extract(pages: dict[str, bytes]) -> int:
    return sum(len(_extracted(page)) for page in pages.values())


def _minhash(texts: list[str]) -> int:
    words = dedup.Words()
    return len(dedup.signatures([dedup.grams(words(text), 5) for text in texts], BANDS * ROWS))


def _chain(pages: dict[str, bytes]) -> int:
    """Documents kept."""
    documents = []
    for name, page in pages.items():
        text = _extracted(page)
        if text and sources.usable(text, False, Counter()):
            documents.append(Document.of(text, domain="general", source="bench", path=name, group=name))
    kept = cleaning.clean(documents, [], Data(minhash=(BANDS, ROWS)))[0]
    with tempfile.TemporaryDirectory() as folder:
        write_documents(Path(folder) / "kept.jsonl", kept)
    return len(kept)


def _trafilatura(pages: dict[str, bytes]) -> Callable[[], int] | str:
    try:
        from trafilatura import extract  # pyright: ignore[reportMissingImports]
    except ImportError:
        return "trafilatura"
    return lambda: sum(len(extract(page) or "") for page in pages.values())


def _datasketch(texts: list[str]) -> Callable[[], int] | str:
    try:
        from datasketch import MinHash  # pyright: ignore[reportMissingImports]
    except ImportError:
        return "datasketch"

    def sign() -> int:
        made = []
        for text in texts:
            words = dedup.WORD.findall(text)
            shingles = {" ".join(words[i : i + 5]).encode() for i in range(max(len(words) - 4, 1))}
            one = MinHash(num_perm=BANDS * ROWS)
            one.update_batch(shingles)
            made.append(one)
        return len(made)

    return sign


def _datatrove(pages: dict[str, bytes]) -> Callable[[], int] | str:
    try:
        import datatrove.pipeline.dedup.minhash  # pyright: ignore[reportMissingImports]  # noqa: F401
        import spacy  # pyright: ignore[reportMissingImports]  # noqa: F401
    except ImportError:
        return "datatrove with spacy"
    return lambda: _by_datatrove(pages)


def _by_datatrove(pages: dict[str, bytes]) -> int:
    """Documents kept by datatrove's own five steps, each with one worker."""
    from datatrove.data import Document as Page  # pyright: ignore[reportMissingImports]
    from datatrove.executor import LocalPipelineExecutor  # pyright: ignore[reportMissingImports]
    from datatrove.pipeline.dedup import minhash  # pyright: ignore[reportMissingImports]
    from datatrove.pipeline.extractors import Trafilatura  # pyright: ignore[reportMissingImports]
    from datatrove.pipeline.filters import LambdaFilter  # pyright: ignore[reportMissingImports]
    from datatrove.pipeline.readers import JsonlReader  # pyright: ignore[reportMissingImports]
    from datatrove.pipeline.writers.jsonl import JsonlWriter  # pyright: ignore[reportMissingImports]

    folder = Path(tempfile.mkdtemp())
    text, signatures, buckets, removed, kept = (
        str(folder / name) for name in ("text", "sigs", "buckets", "gone", "kept")
    )
    found = [Page(text=page.decode("utf-8", "replace"), id=name) for name, page in pages.items()]
    config = minhash.MinhashConfig(n_grams=5, num_buckets=BANDS, hashes_per_bucket=ROWS)
    steps: list[tuple[int, list[Any]]] = [
        (1, [found, Trafilatura(timeout=20), LambdaFilter(_usable), JsonlWriter(text, compression=None)]),
        (1, [JsonlReader(text), minhash.MinhashDedupSignature(signatures, config)]),
        (BANDS, [minhash.MinhashDedupBuckets(signatures, buckets, config=config)]),
        (1, [minhash.MinhashDedupCluster(buckets, removed, config=config)]),
        (1, [JsonlReader(text), minhash.MinhashDedupFilter(removed), JsonlWriter(kept, compression=None)]),
    ]
    try:
        for number, (tasks, pipeline) in enumerate(steps):
            executor = LocalPipelineExecutor(pipeline, tasks=tasks, workers=1, logging_dir=str(folder / f"log{number}"))
            executor.run()
        return sum(path.read_text(encoding="utf-8").count("\n") for path in Path(kept).glob("*.jsonl"))
    finally:
        shutil.rmtree(folder)


def _usable(page: Any) -> bool:
    return sources.usable(page.text, False, Counter())


if __name__ == "__main__":
    cli.main(main)
