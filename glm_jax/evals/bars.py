"""What a quickstart has to show: values and their bounds, from what report.json holds."""

import operator
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

LOAD_STEPS = 50  # last steps whose expert counts are summed
MOST_EXPERT_LOAD, MOST_SECONDS, MOST_GB = 1.5, 720, 4
MOST_SECONDS_WITH_POSTTRAINING = 25 * 60
LEAST_SFT, MOST_SFT = 0.2, 0.75  # an expert's score before RL: neither hopeless nor done
LEAST_GAIN, ERRORS, HALF = 0.15, 2, 0.5  # of RL; its standard errors; what more SFT may gain of it
LEAST_RATIO, LEAST_WELLFORMED = 0.9, 0.98
MOST_MISMATCH = {"mean": 5e-6, "max": 5e-5, "k3": 1e-10}  # sampler against trainer in float32

Rule = Literal["below", "above", "at_least", "at_most"]
RULES: dict[str, Callable[[float, float], bool]] = {
    "below": operator.lt, "above": operator.gt, "at_least": operator.ge, "at_most": operator.le,
}  # fmt: skip


class Bar(NamedTuple):
    """A value against its bound; None for either: not known, and left out."""

    what: str
    value: float | None
    rule: Rule
    bound: float | None


def pretraining(found: dict[str, Any], *, with_posttraining: bool) -> list[dict[str, Any]]:
    """Bars of documents and pre-training, time and memory; each a dict of `what`, `value`, its rule: the bound, `met`."""
    bars = [
        Bar(f"{s['name']}: bits per byte of held-out {s['domain']}, end below start", s["end"], "below", s["start"])
        for s in found["stages"]
    ]
    if found["bits_per_byte"]:
        paid = found["bits_per_byte"]
        what = "bits per byte of held-out standard-library modules, model below zlib -9"
        bars.append(Bar(what, paid["model"], "below", paid["zlib"]))
    load = f"max/mean expert load of the worst layer over the last {LOAD_STEPS} steps"
    bars.append(Bar(load, found["expert_load"], "below", MOST_EXPERT_LOAD))
    if found["peak_rss_gb"] is not None:
        most = MOST_SECONDS_WITH_POSTTRAINING if with_posttraining else MOST_SECONDS
        bars.append(Bar("seconds in all", found["seconds"], "below", most))
        bars.append(Bar("peak memory, GB", found["peak_rss_gb"], "below", MOST_GB))
    return _judged(bars)


def experts(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Bars of the experts; none where report.json has none."""
    rows = found.get("experts", [])
    bars = []
    if rows:
        bars.append(Bar("SFT score of the weakest expert", min(row["sft"] for row in rows), "at_least", LEAST_SFT))
        bars.append(Bar("SFT score of the strongest expert", max(row["sft"] for row in rows), "at_most", MOST_SFT))
    for row in rows:
        who = f"{row['domain']}, level {row['level']}"
        least = max(LEAST_GAIN, ERRORS * row["stderr"])
        bars.append(Bar(f"{who}: gain of RL, {LEAST_GAIN} and two errors", row["gain"], "at_least", least))
        bars.append(Bar(f"{who}: gain of more SFT, half of RL's", row["more_sft_gain"], "below", HALF * row["gain"]))
    return _judged(bars)


def unified(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Bars of the unified model and the RL logs; none where report.json has nothing of them."""
    bars = []
    for domain, row in found.get("unified", {}).items():
        bars.append(Bar(f"{domain}: unified over the expert's score", row["ratio"], "at_least", LEAST_RATIO))
        bars.append(Bar(f"{domain}: unified, above the expert's SFT", row["score"], "above", row["sft"]))
    for mode, share in found.get(
        "wellformed", {}
    ).items():  # a thought in direct mode is not, nor is its lack in the other
        bars.append(Bar(f"{mode}: well-formed answers", share, "at_least", LEAST_WELLFORMED))
    for name, value in found.get("mismatch", {}).items():
        bars.append(Bar(f"sampler against trainer: {name} of the worst RL step", value, "at_most", MOST_MISMATCH[name]))
    return _judged(bars)


def rule_and_bound(bar: dict[str, Any]) -> tuple[str, float]:
    """("at least", 0.9) of a bar as report.json has it."""
    rule = next(rule for rule in RULES if rule in bar)
    return rule.replace("_", " "), bar[rule]


def _judged(bars: list[Bar]) -> list[dict[str, Any]]:
    return [
        {"what": what, "value": value, rule: bound, "met": RULES[rule](value, bound)}
        for what, value, rule, bound in bars
        if value is not None and bound is not None
    ]
