"""The plots of a report, as SVG text that stands in the page itself."""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from glm_jax.config import Run
from glm_jax.evals.told import Told

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
COLOURS = ("#2b59c3", "#d1495b", "#2a9d8f", "#e09f3e", "#7b5ea7", "#3a86a8", "#8d6e63", "#5f6b7a")
POINTS = 400  # of a curve; more than a screen shows
COLUMNS = 160  # of a heat map
LAYERS = 8  # heat maps at most, of the layers that are worst in the end
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "text.color": INK,
    "axes.edgecolor": GRID, "axes.labelcolor": MUTED, "axes.titlesize": 10.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.titlepad": 17, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.7,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.major.size": 0, "ytick.major.size": 0,
    "legend.frameon": False, "legend.fontsize": 8.5, "lines.linewidth": 1.5, "figure.facecolor": "none",
    "axes.facecolor": "none",
}  # fmt: skip


def curves(told: Sequence[Told]) -> dict[str, str]:
    """Name -> SVG over the tokens seen: losses, held-out bits per byte, gradient norm, learning rate, batch size,
    throughput."""
    steps = [step for each in told for step in each.steps]
    if not steps:
        return {}
    with matplotlib.rc_context(STYLE):
        return {
            "loss": _over_tokens(told, "Next-token loss, nats", lambda ax: _smoothed(ax, told, "loss", COLOURS[0])),
            "mtp loss": _over_tokens(
                told,
                "Loss of the MTP layer (two tokens ahead), nats",
                lambda ax: _smoothed(ax, told, "mtp_loss", COLOURS[4]),
            ),
            "bits per byte": _over_tokens(told, "Held-out bits per byte", lambda ax: _evaluations(ax, told)),
            "gradient norm": _over_tokens(
                told, "Gradient norm before clipping", lambda ax: _smoothed(ax, told, "gradient_norm", COLOURS[5])
            ),
            "learning rate": _over_tokens(told, "Learning rate", lambda ax: _line(ax, steps, "lr", COLOURS[1])),
            "batch size": _over_tokens(
                told, "Tokens per step", lambda ax: _line(ax, steps, "batch_tokens", COLOURS[3], floor=0)
            ),
            "throughput": _over_tokens(told, "Tokens per second", lambda ax: _throughput(ax, told)),
        }


def experts(run: Run, told: Sequence[Told]) -> dict[str, str]:
    """Name -> SVG: each layer's max/mean over the tokens, and each expert's share over the steps where it was logged."""
    steps = [step for each in told for step in each.steps]
    if not steps or not steps[0]["load_max_over_mean"]:
        return {}
    names = layer_names(run)
    with matplotlib.rc_context(STYLE):
        found = {
            "ratio": _over_tokens(
                told, "Max/mean expert load of each layer, per step", lambda ax: _ratios(ax, steps, names), (11.2, 3.0)
            )
        }
        if all("load" in step for step in steps):
            found["map"] = _heat_maps(told, steps, names)
    return found


def layer_names(run: Run) -> list[str]:
    """Names of the rows of an expert load: the MoE layers, the MTP layer last."""
    cfg = run.model
    return [f"layer {cfg.dense_layers + i + 1}" for i in range(cfg.moe_layers)] + ["MTP layer"] * cfg.mtp_layers


def _over_tokens(told: Sequence[Told], title: str, draw: Any, size: tuple[float, float] = (5.6, 3.0)) -> str:
    figure = Figure(figsize=size, layout="constrained")
    ax = figure.subplots()
    draw(ax)
    ax.set_title(title)
    ax.set_xlabel("million tokens")
    ax.margins(x=0.01)
    _boundaries(ax, [(each.stage.name, each.steps[-1]["tokens_seen"] / 1e6) for each in told if each.steps])
    return svg(figure, title)


def _boundaries(ax: Axes, ends: Sequence[tuple[str, float]]) -> None:
    """A line where one stage ends and the next begins; names above the plot, in the middle of each stage."""
    begin = 0.0
    width = ends[-1][1]
    for i, (name, end) in enumerate(ends):
        if i < len(ends) - 1:
            ax.axvline(end, color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)))
        if (end - begin) / width > 0.08:
            ax.text(
                (begin + end) / 2, 1.01, name, transform=ax.get_xaxis_transform(), ha="center", va="bottom",
                fontsize=7.5, color=MUTED,
            )  # fmt: skip
        begin = end


def _tokens(steps: Sequence[dict[str, Any]]) -> np.ndarray:
    return np.array([step["tokens_seen"] for step in steps]) / 1e6


def thin(*series: np.ndarray) -> list[np.ndarray]:
    every = -(-len(series[0]) // POINTS)
    return [z[::every] for z in series]


def _line(ax: Axes, steps: Sequence[dict[str, Any]], field: str, colour: str, floor: float | None = None) -> None:
    ax.plot(*thin(_tokens(steps), np.array([step[field] for step in steps])), color=colour)
    ax.set_ylim(bottom=floor)


def _smoothed(ax: Axes, told: Sequence[Told], field: str, colour: str) -> None:
    """Every step faintly, and an average over about a fortieth of the stage."""
    every = []
    for each in told:
        if not each.steps:
            continue
        values, tokens = np.array([step[field] for step in each.steps]), _tokens(each.steps)
        ax.plot(*thin(tokens, values), color=colour, alpha=0.25, linewidth=0.8)
        ax.plot(*thin(tokens, average(values, max(1, len(values) // 40))), color=colour)
        every.append(values)
    values = np.concatenate(every)
    low, high = values.min(), np.quantile(values, 0.995)
    if high > low:
        ax.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))


def average(values: np.ndarray, width: int) -> np.ndarray:
    """Centred moving average; shorter at both ends."""
    kernel = np.ones(2 * min(width, (len(values) - 1) // 2) + 1)  # never longer than the values
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _evaluations(ax: Axes, told: Sequence[Told]) -> None:
    names = [name for name in told[0].evaluations[0]["bits_per_byte"] if "+" not in name] if told[0].evaluations else []
    for name, colour in zip(names, COLOURS, strict=False):
        for i, each in enumerate(told):
            points = [(e["tokens_seen"] / 1e6, e["bits_per_byte"][name]) for e in each.evaluations]
            if points:
                ax.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3.5, label=None if i else name)
    ax.legend(ncols=2, loc="upper right")


def _throughput(ax: Axes, told: Sequence[Told]) -> None:
    """Means over about a fiftieth of a stage. A stage's first step, which waits for compilation, only starts the clock."""
    for each in told:
        marks = each.steps[:: max(1, len(each.steps) // 50)]
        seen, seconds = (np.array([step[name] for step in marks], float) for name in ("tokens_seen", "seconds"))
        ax.plot(seen[1:] / 1e6, np.diff(seen) / np.maximum(np.diff(seconds), 1e-9), color=COLOURS[2])
    ax.set_ylim(bottom=0)


def _ratios(ax: Axes, steps: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    ratios = np.array([step["load_max_over_mean"] for step in steps])
    width = max(1, len(steps) // 100)
    for i in range(ratios.shape[1]):
        label = names[i] if ratios.shape[1] <= len(COLOURS) else None
        ax.plot(
            *thin(_tokens(steps), average(ratios[:, i], width)),
            color=COLOURS[i % len(COLOURS)],
            label=label,
            linewidth=1.2,
        )
    ax.set_ylim(1, max(2.0, float(np.quantile(ratios, 0.99))))
    if ratios.shape[1] <= len(COLOURS):
        ax.legend(ncols=ratios.shape[1], loc="upper right")


def _heat_maps(told: Sequence[Told], steps: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """A row of pixels per expert, a column per few steps: its count over the layer's mean."""
    load_SLE = np.array([step["load"] for step in steps], float)
    chunks = np.array_split(np.arange(len(steps)), min(COLUMNS, len(steps)))
    share_CLE = np.stack([load_SLE[chunk].sum(axis=0) for chunk in chunks])
    share_CLE /= share_CLE.mean(axis=2, keepdims=True)
    worst = np.argsort(-share_CLE[-5:].mean(axis=0).max(axis=1), kind="stable")[:LAYERS]
    figure = Figure(figsize=(11.2, 1.0 + 0.95 * len(worst)), layout="constrained")
    axes = figure.subplots(len(worst), 1, sharex=True, squeeze=False)[:, 0]
    ends = np.cumsum([len(each.steps) for each in told])
    norm = TwoSlopeNorm(1.0, 0.0, 2.0)
    for ax, layer in zip(axes, sorted(worst), strict=True):
        image = ax.imshow(
            share_CLE[:, layer].T, aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest",
            extent=(0, len(steps), load_SLE.shape[2], 0),
        )  # fmt: skip
        for end in ends[:-1]:
            ax.axvline(end, color=INK, linewidth=0.8, linestyle=(0, (3, 3)))
        ax.set_ylabel(names[layer], rotation=0, ha="right", va="center")
        ax.set_yticks([])
        ax.grid(False)
    axes[0].set_title("Load of each expert over its layer's mean")
    axes[-1].set_xlabel("step")
    bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.01, ticks=[0, 0.5, 1, 1.5, 2])
    bar.ax.set_yticklabels(["0", "0.5", "1", "1.5", "2 or more"])
    bar.outline.set_visible(False)
    return svg(figure, "heat map: load of each expert over its layer's mean")


def svg(figure: Figure, title: str) -> str:
    """The <svg> element alone, as wide as its place, with ids that no other figure of the page has."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": title}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r'\bwidth="[^"]*" height="[^"]*"|(?<=<svg )height="[^"]*" |width="[^"]*"(?= )', "", text, count=1)
    label = title.replace("&", "&amp;").replace('"', "&quot;")
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
