"""Web pages to documents without duplicates: ours beside the field's own tools, on the same pages, one core, in one run.

    python -m venv peers && peers/bin/pip install -e ".[data,peers]"
    python -m experiments.data --recipe default --out data/default       # brings pages
    peers/bin/python -m experiments.bench_data --archives data/default/archives --out experiments/results/bench_data.json

Three comparisons, sides in turn, the median of --repeats:
  extraction   HTML to text: glm_jax.data.web, trafilatura.extract
  near         texts to clusters of near duplicates, MinHash of 5-grams in 14 bands of 8: glm_jax.data.dedup, which
               also verifies each candidate by its exact similarity; datasketch's MinHash and MinHashLSH on the same 5-grams of words
  chain        HTML to the files of texts that stay: extraction, the same rules (glm_jax.data.sources.usable), MinHash as above;
               datatrove's Trafilatura, LambdaFilter, MinhashDedupSignature, Buckets, Cluster, Filter with its own words, one task

The pages are every n-th of the archives', so that there are --pages. Nothing is downloaded here.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from glm_jax.data import dedup, sources, web
from glm_jax.data.corpus import archives
from glm_jax.data.document import Document, write_documents
from glm_jax.data.stages import Tokens

BANDS, ROWS, GRAM = 14, 8, 5
THRESHOLD = 0.8


def pages_of(folder: Path, count: int) -> list[bytes]:
    """Every n-th page of the archives, of those that have a body of text."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.suffix == ".deb":
            members = archives.members(path, Counter())
            found += [data for name, data in members if Path(name).suffix == ".html" and 2_000 < len(data) < 1_000_000]
    if not found:
        raise SystemExit(f"--archives {folder}: no page in any .deb; experiments.data --recipe default brings some")
    return found[:: max(1, len(found) // count)][:count]


def texts_of(pages: list[bytes]) -> list[str]:
    texts = []
    for page in pages:
        with contextlib.suppress(web.Unusable):
            texts.append(web.text(page))
    return texts


def trafilatura_texts(pages: list[bytes]) -> list[str]:
    import trafilatura  # pyright: ignore[reportMissingImports]

    return [trafilatura.extract(page) or "" for page in pages]


def near(texts: list[str]) -> dict[int, int]:
    """Of the texts that go, which stays instead."""
    words = dedup.Words()
    sets = [dedup.grams(words(text), GRAM) for text in texts]
    return dedup.near(Tokens.of(sets, sets[0].dtype), dedup.signatures(sets, BANDS * ROWS), THRESHOLD, ROWS)


def datasketch_near(texts: list[str]) -> int:
    from datasketch import MinHash, MinHashLSH  # pyright: ignore[reportMissingImports]

    index, gone = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS)), 0
    for number, text in enumerate(texts):
        words = dedup.WORD.findall(text)
        grams = {" ".join(words[at : at + GRAM]).encode() for at in range(max(1, len(words) - GRAM + 1))}
        signature = MinHash(num_perm=BANDS * ROWS)
        signature.update_batch(grams)
        gone += bool(index.query(signature))
        index.insert(str(number), signature)
    return gone


def usable(text: str) -> bool:
    return bool(text) and sources.usable(text, False, Counter())


def chain(pages: list[bytes], folder: Path) -> int:
    """How many texts stay."""
    texts = [text for text in texts_of(pages) if usable(text)]
    documents, _ = dedup.exact(
        Document.of(text, domain="general", source="page", path=str(number), group=str(number))
        for number, text in enumerate(texts)
    )
    gone = near([document.text for document in documents])
    write_documents(folder / "kept.jsonl", [document for n, document in enumerate(documents) if n not in gone])
    return len(documents) - len(gone)


def datatrove_chain(pages: list[bytes], folder: Path) -> int:
    from datatrove.data import Document as Theirs  # pyright: ignore[reportMissingImports]
    from datatrove.executor import LocalPipelineExecutor  # pyright: ignore[reportMissingImports]
    from datatrove.pipeline.dedup import minhash  # pyright: ignore[reportMissingImports]
    from datatrove.pipeline.extractors import Trafilatura  # pyright: ignore[reportMissingImports]
    from datatrove.pipeline.filters import LambdaFilter  # pyright: ignore[reportMissingImports]
    from datatrove.pipeline.readers import JsonlReader  # pyright: ignore[reportMissingImports]
    from datatrove.pipeline.writers import JsonlWriter  # pyright: ignore[reportMissingImports]

    config = minhash.MinhashConfig(n_grams=GRAM, num_buckets=BANDS, hashes_per_bucket=ROWS)
    at = {name: str(folder / name) for name in ("texts", "signatures", "buckets", "gone", "kept")}

    def documents(data, rank: int = 0, world_size: int = 1):
        yield from (Theirs(web.decode(page), str(number)) for number, page in enumerate(pages))

    def reader():
        return JsonlReader(at["texts"], compression=None)

    plain = {"output_filename": "${rank}.jsonl", "compression": None}
    steps: list[list[Any]] = [
        [documents, Trafilatura(), LambdaFilter(lambda d: usable(d.text)), JsonlWriter(at["texts"], **plain)],
        [reader(), minhash.MinhashDedupSignature(at["signatures"], config)],
        [minhash.MinhashDedupBuckets(at["signatures"], at["buckets"], config=config)],
        [minhash.MinhashDedupCluster(at["buckets"], at["gone"], config=config)],
        [reader(), minhash.MinhashDedupFilter(at["gone"]), JsonlWriter(at["kept"], **plain)],
    ]
    for number, step in enumerate(steps):
        tasks = BANDS if number == 2 else 1  # one for each band, one after the other
        LocalPipelineExecutor(step, tasks=tasks, workers=1, logging_dir=str(folder / f"log-{number}")).run()
    return sum(len(path.read_text().splitlines()) for path in Path(at["kept"]).iterdir())


def compare(sides: dict[str, Callable[[], Any]], repeats: int, megabytes: float) -> dict[str, Any]:
    """Seconds of each side, in turn; what each found."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    found: dict[str, Any] = {}
    for _ in range(repeats):
        for name, side in sides.items():
            start = time.perf_counter()
            with contextlib.redirect_stderr(io.StringIO()):
                found[name] = side()
            seconds[name].append(time.perf_counter() - start)
    ours, theirs = sides
    ratio = statistics.median(b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True))
    rates = {name: megabytes / statistics.median(times) for name, times in seconds.items()}
    return {"times_as_fast": round(ratio, 2), "mb_per_s": rates, "found": found, "seconds": seconds}


def in_folder(run: Callable[[list[bytes], Path], int], pages: list[bytes]) -> int:
    with tempfile.TemporaryDirectory(prefix="bench_data") as folder:
        return run(pages, Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--archives", type=Path, required=True, help="folder of .deb with pages, as experiments.data brings them"
    )
    parser.add_argument("--pages", type=int, default=600)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.environ["LOGURU_LEVEL"] = "ERROR"  # datatrove's
    pages = pages_of(args.archives, args.pages)
    size = sum(map(len, pages)) / 1e6
    texts = texts_of(pages)
    text_size = sum(len(text.encode()) for text in texts) / 1e6
    figures: dict[str, Any] = {
        "pages": len(pages),
        "html_mb": size,
        "text_mb": text_size,
        "versions": {
            name: metadata.version(name) for name in ("resiliparse", "trafilatura", "datasketch", "datatrove")
        },
    }
    sides = {
        "extraction": (size, lambda: len(texts_of(pages)), lambda: len(trafilatura_texts(pages)), "trafilatura"),
        "near": (text_size, lambda: len(near(texts)), lambda: datasketch_near(texts), "datasketch"),
        "chain": (size, lambda: in_folder(chain, pages), lambda: in_folder(datatrove_chain, pages), "datatrove"),
    }
    for name, (megabytes, ours, theirs, whose) in sides.items():
        figures[name] = compare({"ours": ours, whose: theirs}, args.repeats, megabytes)
        rates = ", ".join(f"{side} {rate:.2f} MB/s" for side, rate in figures[name]["mb_per_s"].items())
        print(
            f"{name:<11} {figures[name]['times_as_fast']:6.2f} times as fast: {rates}; {figures[name]['found']}",
            flush=True,
        )
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n")
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
