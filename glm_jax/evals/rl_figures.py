"""The plots of post-training: what SFT and RL runs logged, and what each step of the story bought."""

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from glm_jax.evals import scores
from glm_jax.evals.bars import MOST_MISMATCH
from glm_jax.evals.figures import COLOURS, INK, MUTED, STYLE, average, svg, thin
from glm_jax.evals.posttraining import CONTROL, RL, SFT, Story, Trained
from glm_jax.evals.scores import DIRECT, THINKING

LEAST_MISMATCH = 1e-9  # where the logarithmic axis ends: float32 cannot tell less


def curves(story: Story) -> dict[str, str]:
    """Name -> SVG over the steps: reward, length, entropy and mismatch of every RL run, validation loss of every SFT."""
    rl = [each for each in story.trained if each.is_rl]
    tuned = [each for each in story.trained if each.evaluations]
    found = {}
    with matplotlib.rc_context(STYLE):
        if rl:
            plots: dict[str, tuple[str, Callable[[Axes], None]]] = {
                "reward": ("Mean reward of all sampled answers", lambda ax: _reward(ax, rl, story)),
                "varying": ("Share of groups whose rewards differ", lambda ax: _varying(ax, rl, story)),
                "length": ("Tokens that the model draws for an answer", lambda ax: _lines(ax, rl, story, "length")),
                "entropy": (
                    "Entropy, nats per drawn token", lambda ax: _lines(ax, rl, story, "entropy", learning=True),
                ),
                "mismatch": (
                    "Log-probability, sampler against trainer: |difference|", lambda ax: _mismatch(ax, rl, story),
                ),
            }  # fmt: skip
            found |= {name: _over_steps(title, draw) for name, (title, draw) in plots.items()}
        if tuned:
            title = "SFT: loss of held-out dialogues, nats per trained token"
            found["validation"] = _over_steps(title, lambda ax: _validation(ax, tuned, story))
        if story.scores:
            found["scores"] = _bought(story)
    return found


def _over_steps(title: str, draw: Callable[[Axes], None]) -> str:
    figure = Figure(figsize=(5.6, 3.0), layout="constrained")
    ax = figure.subplots()
    draw(ax)
    ax.set_title(title, pad=8)
    ax.set_xlabel("step")
    ax.margins(x=0.01)
    return svg(figure, title)


def _colour(each: Trained, story: Story) -> str:
    """A domain keeps its colour in all plots."""
    return COLOURS[list(dict.fromkeys(t.domain for t in story.trained)).index(each.domain) % len(COLOURS)]


def _lines(ax: Axes, rl: Sequence[Trained], story: Story, field: str, *, learning: bool = False) -> None:
    """Every step faintly, an average on top; `learning`: only the steps in which there was something to learn."""
    for each in rl:
        steps = [step for step in each.steps if step["groups_varying"] or not learning]
        _smoothed(ax, each, story, steps, np.array([step[field] for step in steps], float))
    ax.set_ylim(bottom=0)
    _legend(ax)


def _legend(ax: Axes, **how: Any) -> None:
    """Of what is drawn: a run without anything to learn draws nothing, and a legend of nothing is a warning."""
    if ax.get_legend_handles_labels()[0]:
        ax.legend(ncols=2, **how)


def _smoothed(ax: Axes, each: Trained, story: Story, steps: Sequence[dict[str, Any]], values: np.ndarray) -> None:
    if steps:
        x, colour = np.array([step["step"] for step in steps], float), _colour(each, story)
        ax.plot(*thin(x, values), color=colour, alpha=0.25, linewidth=0.8)
        ax.plot(*thin(x, average(values, max(1, len(values) // 30))), color=colour, label=each.label)


def _varying(ax: Axes, rl: Sequence[Trained], story: Story) -> None:
    """What the curriculum is for: groups that teach something, of all that were sampled."""
    for each in rl:
        shares = np.array([step["groups_varying"] / step["groups"] for step in each.steps])
        _smoothed(ax, each, story, each.steps, shares)
    ax.set_ylim(0, 1)
    _legend(ax)


def _reward(ax: Axes, rl: Sequence[Trained], story: Story) -> None:
    """A dotted line where a run goes on with the hard problems alone."""
    _lines(ax, rl, story, "reward")
    for each in rl:
        for record in each.curriculum:
            if record["kept"]:
                ax.axvline(record["step"], color=_colour(each, story), linewidth=1, linestyle=(0, (1, 2)))
    ax.set_ylim(0, 1)


def _mismatch(ax: Axes, rl: Sequence[Trained], story: Story) -> None:
    """Means drawn through, greatest values dashed, and the two bounds."""
    least, most = MOST_MISMATCH["mean"], 4 * MOST_MISMATCH["max"]
    for each in rl:
        steps = [step for step in each.steps if step["groups_varying"]]
        if not steps:
            continue
        x = np.array([step["step"] for step in steps], float)
        for field, style in (("mismatch_mean", "-"), ("mismatch_max", (0, (4, 2)))):
            y = np.maximum([step[field] for step in steps], LEAST_MISMATCH)
            least, most, label = min(least, *y), max(most, *(2 * y)), each.label if style == "-" else None
            ax.plot(*thin(x, y), color=_colour(each, story), linewidth=1, linestyle=style, label=label)
    ax.set_yscale("log")
    for name in ("mean", "max"):
        ax.axhline(MOST_MISMATCH[name], color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
        ax.text(
            1, MOST_MISMATCH[name], f"bound of the {name}", transform=ax.get_yaxis_transform(), ha="right", va="bottom",
            fontsize=7.5, color=MUTED,
        )  # fmt: skip
    ax.set_ylim(least / 10, most)  # room for the legend below
    _legend(ax, loc="lower right")


def _validation(ax: Axes, tuned: Sequence[Trained], story: Story) -> None:
    """Further SFT, dashed, goes on where the domain's SFT ends."""
    ends = {each.domain: each.evaluations[-1]["step"] for each in tuned if each.name == SFT}
    for each in tuned:
        x, y = (
            np.array(z, float)
            for z in zip(*((e["step"], e["loss"]["dialogues"]) for e in each.evaluations), strict=True)
        )
        more = each.name == CONTROL
        x = x + max(0.0, ends.get(each.domain, 0) - x[0]) if more else x
        style: Any = (0, (3, 2)) if more else "-"
        ax.plot(x, y, color=_colour(each, story), marker="o", markersize=3, linestyle=style, label=each.label)
    ax.set_ylim(bottom=0)
    _legend(ax)


def _bought(story: Story) -> str:
    """Bars with standard errors: each domain after SFT, as much more SFT, RL, and of the unified model in both modes."""
    rows = _bars_of(story)
    series = list(dict.fromkeys(name for found in rows.values() for name in found))
    figure = Figure(figsize=(11.2, 3.2), layout="constrained")
    ax = figure.subplots()
    begin, middles = 0.0, []
    for found in rows.values():
        for i, (name, (value, error)) in enumerate(found.items()):
            ax.bar(
                begin + i, value, 0.92, yerr=error, color=COLOURS[series.index(name)], ecolor=MUTED, error_kw={"lw": 1}
            )
        middles.append(begin + (len(found) - 1) / 2)
        begin += len(found) + 1
    ax.set_xticks(middles, list(rows))
    ax.tick_params(axis="x", labelcolor=INK)
    ax.grid(visible=False, axis="x")
    ax.set_ylim(0, 1)
    keys = [Patch(color=COLOURS[i], label=name) for i, name in enumerate(series)]
    ax.legend(handles=keys, ncols=len(series), loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
    title = "Share of held-out tasks solved, and its standard error"
    ax.set_title(title, pad=8)
    return svg(figure, title)


def _bars_of(story: Story) -> dict[str, dict[str, tuple[float, float]]]:
    """Domain and level -> name of a bar -> (score, standard error)."""
    rows: dict[str, dict[str, tuple[float, float]]] = {}
    places = dict.fromkeys((score["domain"], score["level"]) for score in story.scores)
    for domain, level in sorted(places, key=lambda place: place[1]):
        wanted = {
            "SFT": (f"{domain}-{SFT}", THINKING),
            "as much more SFT": (f"{domain}-{CONTROL}", THINKING),
            "RL": (f"{domain}-{RL}", THINKING),
            "unified, thinking": (story.final, THINKING),
            "unified, direct": (story.final, DIRECT),
        }
        found = {bar: story.score(name, domain, level, mode) for bar, (name, mode) in wanted.items() if name}
        rows[f"{domain}, level {level}"] = {bar: scores.pass_at_1(s) for bar, s in found.items() if s}
    return {place: bars for place, bars in rows.items() if bars}
