"""Scorers that are trained, their ranks in 20 bins, and buckets of these (report, section 2.2; spec section 5).

Web pages, as Nemotron-CC does it: each scorer sorts them into 20 bins by rank, a page has the highest of its bins, and
bins are merged into as many buckets as `data.bucket_epochs` has. Code, and pages with code, as the report does it: a model per
language sorts into three tiers, low (never read), medium and high.
"""

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from glm_jax.config import Data, Scoring
from glm_jax.data import contrasts, features, judge, language
from glm_jax.data.classifier import Classifier, auc, train
from glm_jax.data.contrasts import Example
from glm_jax.data.document import DataError, Document, unit, write

BINS = 20
OTHER_LANGUAGE = "other language"
CODE_PAGE = "code_page"
_BITS = 17
_HELD_OUT = 0.25  # of a scorer's examples, by groups
_FEWEST = 40  # examples of either kind that a language's model needs
_TIERS = (0.2, 0.8)  # shares of a language's bytes below medium and below high
_TEACHES = 3.0  # an LLM's score from which a document counts as mathematics or science
_FALLBACK = "code"  # the model of all languages, for those with too few examples


def train_all(
    documents: list[Document], config: Scoring, folder: Path, kept: Path, tell: Callable[[int, int], None]
) -> None:
    """Train every scorer into `folder`: one file each, and report.json with examples and held-out AUC.

    `documents` are those collected; an endpoint's answers are kept in the file `kept`.
    """
    found = contrasts.gather(documents, config.contrasts)
    tell(3, 10)
    folder.mkdir()
    report, bags = {}, {}
    for name in contrasts.NAMES:
        if name == "mathematics" and config.judge:
            classifier, facts = _taught(documents, config, kept, tell)
        else:
            bags[name] = features.of_words([example.text for example in found[name]], _BITS)
            classifier, facts = _trained(name, found[name], bags[name])
        classifier.save(folder / f"{name}.npz")
        report[name] = facts
    languages = Counter((example.language, example.good) for example in found["code"])
    for spoken in sorted({name for name, _ in languages if name != "other"}):
        if min(languages[spoken, True], languages[spoken, False]) >= _FEWEST:
            name = f"code_{spoken}"
            members = [i for i, example in enumerate(found["code"]) if example.language == spoken]
            examples = [found["code"][i] for i in members]
            classifier, facts = _trained(name, examples, bags["code"][np.array(members)])
            classifier.save(folder / f"{name}.npz")
            report[name] = facts
    write(folder / "report.json", json.dumps(report, indent=1, sort_keys=True) + "\n")


def _trained(name: str, examples: list[Example], bags: features.Bags) -> tuple[Classifier, dict[str, Any]]:
    """A classifier from labelled examples, and its figures on those held out: whole groups, where there are enough."""
    labels = np.array([example.good for example in examples], bool)
    by = "group"
    held_out = np.array([unit("held out", name, example.group) < _HELD_OUT for example in examples], bool)
    parts = [(labels == good) & (held_out == out) for good in (True, False) for out in (True, False)]
    if min(part.sum() for part in parts) < _FEWEST // 4:  # a package or two have most of them
        by = "text"
        held_out = np.array([unit("held out", name, example.text) < _HELD_OUT for example in examples], bool)
    for part in (labels[~held_out], labels[held_out]):
        if len(part) == 0 or part.all() or not part.any():
            raise DataError(
                f"scorer {name!r} has {labels.sum()} good and {(~labels).sum()} bad examples, too few to train and to "
                "measure it; give more with --data.scoring.contrasts or use --data.scoring.by signals"
            )
    targets = labels.astype(np.float32)[:, None]
    where = np.flatnonzero(~held_out)
    classifier = train(bags[where], targets[where], (name,), reads="words", bits=_BITS)
    scores = classifier.scores(bags[np.flatnonzero(held_out)])[:, 0]
    facts = {
        "auc": round(auc(scores, labels[held_out]), 4),
        "trained_on": int((~held_out).sum()),
        "held_out": {"good": int(labels[held_out].sum()), "bad": int((~labels[held_out]).sum()), "by": by},
        "good": _kinds(examples, True),
        "bad": _kinds(examples, False),
    }
    return classifier, facts


def _kinds(examples: list[Example], good: bool) -> dict[str, int]:
    return dict(sorted(Counter(example.kind for example in examples if example.good == good).items()))


def _taught(
    documents: list[Document], config: Scoring, kept: Path, tell: Callable[[int, int], None]
) -> tuple[Classifier, dict[str, Any]]:
    """The scorer of mathematics and science from an LLM's scores of a sample."""
    pages = [d for d in documents if d.domain != "code" and not d.unwanted]
    pages.sort(key=lambda d: unit("judged", d.id))
    if judge.is_endpoint(config.judge):
        sample = pages[: config.judge_sample]
        scores = judge.ask(config.judge, config.judge_model, sample, kept, lambda a, b: tell(3 * b + 5 * a, 10 * b))
    else:
        scores = judge.from_file(Path(config.judge))
    judged = [page for page in pages if page.id in scores]
    given = np.array([scores[page.id] for page in judged])
    held_out = np.array([unit("held out", "judged", page.group) < _HELD_OUT for page in judged], bool)
    teaches = given >= _TEACHES
    for part in (teaches[~held_out], teaches[held_out]):
        if len(part) == 0 or part.all() or not part.any():
            raise DataError(
                f"data.scoring.judge: of {len(judged)} documents of this corpus with a score {int(teaches.sum())} have "
                f"{_TEACHES:g} or more, too few on one side to train a scorer and to measure it; score more of them"
            )
    bags = features.of_words([page.text for page in judged], _BITS)
    where, rest = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    targets = (given / judge.HIGHEST).astype(np.float32)[:, None]
    classifier = train(bags[where], targets[where], ("mathematics",), reads="words", bits=_BITS)
    found = classifier.scores(bags[rest])[:, 0]
    facts = {
        "auc": round(auc(found, teaches[rest]), 4),
        "rank_correlation": round(_rank_correlation(found, given[rest]), 4),
        "trained_on": len(where),
        "held_out": {"good": int(teaches[rest].sum()), "bad": int((~teaches[rest]).sum())},
        "scores": {f"{low}": int(((given >= low) & (given < low + 1)).sum()) for low in range(6)},
    }
    return classifier, facts


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, ties by their mean rank."""
    ranks = []
    for values in (a, b):
        _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[places])
    return float(np.corrcoef(*ranks)[0, 1])


def inputs(config: Scoring) -> dict[str, str]:
    """The state of the file of an LLM's scores, or the endpoint's address; nothing without either."""
    return {"judge": judge.file_state(config.judge)} if config.judge else {}


def report(config: Scoring, out: Path) -> dict[str, Any]:
    """For the manifest of the folder `out`: the scorers' figures, and the histograms of bins, buckets and languages."""
    if config.by == "signals":
        return {}
    read = {name: json.loads((out / name).read_text()) for name in ("scorers/report.json", "documents/quality.json")}
    return {"scorers": read["scorers/report.json"], "quality": read["documents/quality.json"]}


def sort(
    documents: list[Document], signals: np.ndarray, folder: Path, to: Path, data: Data, drops: Counter[str]
) -> list[Document]:
    """The documents of the wanted languages with their buckets, by the scorers in `folder` and the transparent `signals`.

    Writes attributes.jsonl (what was found about each) and quality.json (histograms) into `to`, counts in `drops`.
    """
    spoken, wanted = _languages(documents), data.scoring.languages
    if wanted:
        keep = [i for i, d in enumerate(documents) if d.domain == "code" or spoken[i] in wanted]
        drops[OTHER_LANGUAGE] = len(documents) - len(keep)
        documents, spoken, signals = [documents[i] for i in keep], [spoken[i] for i in keep], signals[keep]
    scores = {"signals": signals, **_scores(documents, folder)}
    peers = [_peers(document, scores, i) for i, document in enumerate(documents)]
    sizes = np.array([document.size for document in documents], np.int64)
    ids = np.array([document.id for document in documents])
    bins, bucket = np.zeros(len(documents), np.int64), np.zeros(len(documents), np.int64)
    histograms, buckets = {}, len(data.bucket_epochs)
    for group in sorted(set(peers)):
        members = np.flatnonzero(np.array([name == group for name in peers]))
        ranked = [rank_bins(scores[name][members], sizes[members], ids[members]) for name in _scorers(group)]
        bins[members] = np.max(ranked, axis=0)
        tiers = group.startswith("code_")
        share = merged(bins[members], sizes[members], _TIERS if tiers else np.arange(1, buckets) / buckets)
        bucket[members] = np.array([0, (buckets - 1) // 2, buckets - 1])[share] if tiers else share
        histograms[group] = _histogram(bins[members], bucket[members], sizes[members])
    lines = [
        {
            "id": document.id,
            "path": document.path,
            "language": spoken[i],
            "peers": peers[i],
            "scores": {name: round(float(values[i]), 3) for name, values in scores.items() if np.isfinite(values[i])},
            "bin": int(bins[i]),
            "bucket": int(bucket[i]),
        }
        for i, document in enumerate(documents)
    ]
    write(to / "attributes.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    facts = {"peers": histograms, "languages": dict(sorted(Counter(spoken).items()))}
    write(to / "quality.json", json.dumps(facts, indent=1, sort_keys=True) + "\n")
    return [dataclasses.replace(d, bucket=int(b)) for d, b in zip(documents, bucket, strict=True)]


def _languages(documents: list[Document]) -> list[str]:
    """Of code the programming language, of pages the natural one."""
    found = [contrasts.language_of(document.path) if document.domain == "code" else "" for document in documents]
    pages = [i for i, document in enumerate(documents) if document.domain != "code"]
    for index, name in zip(pages, language.identify([documents[i].text for i in pages]), strict=True):
        found[index] = name
    return found


def _scores(documents: list[Document], folder: Path) -> dict[str, np.ndarray]:
    """Trained scorer -> score of each document, NaN where it is not asked."""
    models = {path.stem: Classifier.load(path) for path in sorted(folder.glob("*.npz"))}
    code = np.array([document.domain == "code" for document in documents], bool)
    bags = features.of_words([document.text for document in documents], _BITS)
    spoken = [contrasts.language_of(d.path) if d.domain == "code" else "" for d in documents]
    found = {}
    for name in ("prose", "code_page", "mathematics"):
        found[name] = np.where(code, np.nan, models[name].scores(bags)[:, 0])
    found["code"] = np.full(len(documents), np.nan)
    for name in sorted(set(spoken) - {""}):
        members = np.flatnonzero(np.array([one == name for one in spoken]))
        model = models.get(f"code_{name}", models[_FALLBACK])
        found["code"][members] = model.scores(bags[members])[:, 0]
    return found


def _peers(document: Document, scores: dict[str, np.ndarray], index: int) -> str:
    """Whom a document is ranked against: its language's files, code pages, mathematics, or the rest.

    Stage one of code pages: marks of listings, or the classifier.
    """
    if document.domain == "code":
        return f"code_{contrasts.language_of(document.path)}"
    if document.domain == "math":
        return "math"
    marked = contrasts.without_marks(document.text)[1] >= contrasts.LISTED
    return CODE_PAGE if marked or scores["code_page"][index] > 0 else "general"


def _scorers(group: str) -> list[str]:
    if group.startswith("code_") and group != CODE_PAGE:
        return ["code", "signals"]
    return ["prose", "mathematics", "signals"] if group == "math" else ["prose", "signals"]


def rank_bins(scores: np.ndarray, sizes: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The bin of each document, 0 to 19: by rank, each with an equal share of the bytes."""
    order = np.lexsort((ids, scores))
    middle = np.cumsum(sizes[order]) - sizes[order] / 2
    bins = np.empty(len(scores), np.int64)
    bins[order] = np.minimum(middle / sizes.sum() * BINS, BINS - 1).astype(np.int64)
    return bins


def merged(bins: np.ndarray, sizes: np.ndarray, shares: Any) -> np.ndarray:
    """Whole bins merged from the lowest up: how many of the `shares` of the bytes lie below a bin's middle."""
    size = np.bincount(bins, weights=sizes, minlength=BINS)
    middle = (np.cumsum(size) - size / 2) / size.sum()
    return np.searchsorted(np.asarray(shares), middle, side="right")[bins]


def _histogram(bins: np.ndarray, bucket: np.ndarray, sizes: np.ndarray) -> dict[str, Any]:
    count: dict[int, dict[str, int]] = defaultdict(lambda: {"documents": 0, "bytes": 0})
    for number, size in zip(bucket.tolist(), sizes.tolist(), strict=True):
        count[number]["documents"] += 1
        count[number]["bytes"] += size
    return {
        "bins": np.bincount(bins, minlength=BINS).tolist(),
        "buckets": {str(number): count[number] for number in sorted(count)},
    }
