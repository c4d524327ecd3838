"""An LLM's scores of a sample of documents: from a file, or from any endpoint that speaks OpenAI's protocol.

The report has an LLM score candidate documents by how much they teach of mathematics and science, and a small classifier
trained on those scores extends them to the rest (section 2.2). A score is a number from 0 to 5.
"""

import concurrent.futures
import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from glm_jax.data.document import DataError, Document, digest

HIGHEST = 5.0
KEY = "OPENAI_API_KEY"  # variable with the endpoint's key, if it wants one
_CHARS = 6000  # of a document that are shown
_TOGETHER = 8  # questions under way
_ATTEMPTS = 4
_WAIT_S = 0.5  # before the second attempt, doubled for each further one
_TIMEOUT_S = 120
_QUESTION = """\
Below is a part of a document. How much would a student of mathematics or of a natural science learn from it?
0: nothing; 1: formulas or terms in passing; 2: facts without reasons; 3: explains a notion or a method; 4: explains it well,
with derivations or worked examples; 5: as a good textbook does. Reply with one line: Score: N

<document>
{text}
</document>"""
_SCORE = re.compile(r"score(?:\s*\([^()]*\))?\W{0,6}([0-5](?:\.\d+)?)(?!\.?\d|\s?[-–]\s?\d)", re.IGNORECASE)
_NUMBER = re.compile(r"^\W*([0-5](?:\.\d+)?)\W*$")


def is_endpoint(judge: str) -> bool:
    return judge.startswith(("http://", "https://"))


def from_file(path: Path) -> dict[str, float]:
    """Document id -> score of a JSONL file with `id`, or the document's `text`, and `score` on each line.

    DataError, with the line, for anything else.
    """
    scores = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            fields = json.loads(line)
            score = float(fields["score"])
            name = fields["id"] if "id" in fields else digest(fields["text"])[:16]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f'{path}, line {number}: {line[:80]!r} is no score; a line is {{"id": ..., "score": 0 to {HIGHEST:g}}}, or '
                "text in place of id"
            ) from error
        if not 0 <= score <= HIGHEST:
            raise DataError(
                f"{path}, line {number}: score {score:g} does not lie in 0 to {HIGHEST:g}; rescale the file"
            )
        scores[name] = score
    return scores


def file_state(judge: str) -> str:
    """Fingerprint of the file of scores; of an endpoint its address."""
    if is_endpoint(judge):
        return judge
    try:
        return hashlib.sha256(Path(judge).read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise DataError(
            f"data.scoring.judge={judge!r} cannot be read ({error.strerror}); give a JSONL file of scores or the http(s) "
            "address of an endpoint"
        ) from error


def ask(
    address: str, model: str, documents: list[Document], kept: Path, tell: Callable[[int, int], None]
) -> dict[str, float]:
    """Document id -> score by `model` at `address` (.../v1). Answers without a score are left out.

    Answers are appended to `kept` as they come and not asked for again: a killed run goes on. DataError if the
    endpoint cannot be reached or refuses.
    """
    scores = _kept(kept)
    missing = [document for document in documents if document.id not in scores]
    with kept.open("a", encoding="utf-8") as lines, concurrent.futures.ThreadPoolExecutor(_TOGETHER) as pool:
        waiting = {pool.submit(_ask, address, model, document.text): document for document in missing}
        try:
            for done, future in enumerate(concurrent.futures.as_completed(waiting), start=1):
                name, score = waiting[future].id, future.result()
                lines.write(json.dumps({"id": name, "score": score}) + "\n")
                lines.flush()
                scores[name] = score
                tell(done, len(missing))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    wanted = {document.id for document in documents}
    return {name: score for name, score in scores.items() if name in wanted and score is not None}


def _kept(path: Path) -> dict[str, float | None]:
    """Answers of an earlier run; what a kill left of its last line is cut off."""
    if not path.is_file():
        return {}
    whole, _, torn = path.read_text(encoding="utf-8").rpartition("\n")
    if torn:
        path.write_text(whole + "\n" if whole else "", encoding="utf-8")
    return {fields["id"]: fields["score"] for fields in map(json.loads, whole.splitlines())}


def _ask(address: str, model: str, text: str) -> float | None:
    content = _QUESTION.format(text=text[:_CHARS])
    body = {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0}
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY):
        headers["Authorization"] = f"Bearer {key}"
    url = address.rstrip("/") + "/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    for attempt in range(_ATTEMPTS):
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as reply:
                return parse(json.load(reply)["choices"][0]["message"]["content"] or "")
        except urllib.error.HTTPError as error:
            problem = f"{error.code} {error.reason}"
            if error.code < 500 and error.code != 429:
                break
        except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
            problem = f"{type(error).__name__}: {error}"
        if attempt + 1 < _ATTEMPTS:
            time.sleep(_WAIT_S * 2**attempt)
    raise DataError(
        f"{url} gave no answer ({problem}); check the address, {KEY} and data.scoring.judge_model={model!r}, then run the "
        "same command again: scores that came are kept"
    )


def parse(reply: str) -> float | None:
    """The last score that a reply names, or the reply if it is a bare number; None without one."""
    found = _SCORE.findall(reply)
    if found:
        score = float(found[-1])
    elif bare := _NUMBER.match(reply):
        score = float(bare[1])
    else:
        return None
    return score if score <= HIGHEST else None
