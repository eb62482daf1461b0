"""The figure of a comparison: accuracy, matching instability and losses against epochs and against training time."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from ..files import write_atomic
from .charts import AMBER, BLUE, CORAL, DASHED, GREEN, GREY, INK, VIOLET, figure, finish, png
from .fonts import plain

_COLOURS = (BLUE, CORAL, GREEN, AMBER, VIOLET)
_PANELS = (
    ("AP", "AP"),
    ("AP50", "AP50"),
    ("IS", "Matching instability (queries per image)"),
    ("matching", "Loss: matching part, denoising dashed"),
)


def draw_comparison(path: str | Path, told: dict) -> None:
    """Draw a verdict (see ``analysis.comparison.verdict``) as one PNG, also before all its runs are done.

    Every value has one colour: the mean of its seeds as a line, the range between them as a band. The dotted line is
    the baseline's final AP, and the mark on it where another value reaches it.
    """
    page = figure((20, 8.6), _title(told))
    page.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    field, values = told["field"], told["values"]
    # The baseline is last, and always of the same colour.
    colours = dict(zip([values[-1], *values[:-1]], [CORAL, *(c for c in _COLOURS if c != CORAL)], strict=False))
    minutes = max((run["seconds"][-1] for run in told["runs"] if run["seconds"]), default=0) >= 120
    unit, divisor = ("minutes", 60) if minutes else ("seconds", 1)
    across = (("epochs", "epoch"), ("seconds", f"{unit} of training"))
    for row, (x, label) in zip(page.subplots(2, len(_PANELS)), across, strict=True):
        scale = divisor if x == "seconds" else 1
        for axes, (name, title) in zip(row, _PANELS, strict=True):
            for value in values:
                runs = [run for run in told["runs"] if run["value"] == value and run["epochs"]]
                colour = colours.get(value, GREY)
                _band(axes, runs, x, name, scale, colour, plain(f"{field} {value}"))
                if name == "matching" and any(any(run["denoising"]) for run in runs):
                    _band(axes, runs, x, "denoising", scale, colour, "", linestyle=DASHED)
            if name == "AP":
                _mark(axes, told, f"{x}_to_baseline_AP", f"share_of_{x}", scale, colours)
            if name in ("AP", "AP50", "IS"):
                axes.set_ylim(bottom=0)
            finish(axes, title, label, whole=x == "epochs")
    write_atomic(path, png(page))


def _title(told: dict) -> str:
    seeds = len(told["seeds"])
    text = f"{told['field']}: {' against '.join(told['values'])}"
    return f"{text}, {seeds} seed{'s' if seeds > 1 else ''}" if seeds else text


def _band(axes, runs: Sequence[dict], x: str, name: str, scale: float, colour: str, label: str, linestyle="-") -> None:
    """Mean and range over the seeds, at the evaluations that all of them have."""
    points = []
    for column in range(min((len(run["epochs"]) for run in runs), default=0)):
        numbers = [run[name][column] for run in runs]
        if all(number is not None for number in numbers):
            places = statistics.fmean(run[x][column] for run in runs) / scale
            points.append((places, statistics.fmean(numbers), min(numbers), max(numbers)))
    if not points:
        return
    xs, means, lows, highs = zip(*points, strict=True)
    marker = "o" if len(points) <= 60 else None
    axes.plot(xs, means, color=colour, linewidth=1.9, linestyle=linestyle, marker=marker, markersize=3.5, label=label)
    if len(runs) > 1:
        axes.fill_between(xs, lows, highs, color=colour, alpha=0.16, linewidth=0)


def _mark(axes, told: dict, reached: str, share: str, scale: float, colours: dict) -> None:
    """Where each value reaches the baseline's final AP."""
    for one in told["comparisons"]:
        target, place = one["final_AP_of_baseline"]["mean"], one[reached]
        axes.axhline(target, color=INK, linewidth=0.8, linestyle=":")
        if place is None:
            continue
        x, colour = place["mean"] / scale, colours.get(one["value"], GREY)
        axes.plot([x, x], [0, target], color=colour, linewidth=0.9, linestyle=":")
        axes.plot([x], [target], color=colour, marker="D", markersize=6, markeredgecolor="white")
        axes.annotate(
            f"{one[share]['mean']:.0%}", (x, target), (-7, 6), textcoords="offset points", ha="right",
            color=colour, fontsize=11, fontweight="bold",
        )  # fmt: skip
