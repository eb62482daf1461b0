"""Training curves of one run from its metrics.jsonl: losses, average precision, matching instability, denoising."""

import io
import math
from pathlib import Path

from ..files import write_atomic
from ..runs.run_log import read_rows
from .fonts import plain

_BLUE, _CORAL, _GREEN, _VIOLET, _AMBER = "#2d7dd2", "#f0544f", "#1fa774", "#8b5cf6", "#e69f00"
_INK, _FAINT = "#22252b", "#d9dce1"
_DASHED = (0, (4, 2))
_TERMS = {"label": (_BLUE, "label (focal)"), "l1": (_GREEN, "box L1"), "giou": (_AMBER, "box GIoU")}


def draw_curves(metrics_path: str | Path, output_path: str | Path, title: str = "") -> None:
    """Draw the rows of a metrics.jsonl as one PNG with six panels; few rows, or none, and nulls are no error.

    "train" rows: step, loss, matching, denoising, the unweighted terms label, l1, giou and dn_label, dn_l1, dn_giou,
    dn_share, and every key that begins with "lr"; "eval" rows: epoch, AP, AP50, AP75, IS, IS_layers, dn_flip_rate,
    dn_box_shift. What a run lacks is left out.
    """
    # Without pyplot there is no global figure list, and no display is ever looked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_rows(metrics_path)
    train = [row for row in rows if row["event"] == "train"]
    evaluations = [row for row in rows if row["event"] == "eval"]
    figure = Figure(figsize=(18.5, 8), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    (total, precision, stability), (terms, rate, denoising) = figure.subplots(2, 3)
    if title:
        figure.suptitle(plain(title), fontsize=15, fontweight="bold", color=_INK, x=0.01, ha="left")

    for name, colour, label in (
        ("loss", _INK, "total"), ("matching", _BLUE, "matching part"), ("denoising", _CORAL, "denoising part")
    ):  # fmt: skip
        _smoothed(total, *_series(train, "step", name), colour, label)
    _finish(total, "Loss (log scale)", "step", log=True)

    last = []
    for name, colour in (("AP50", _GREEN), ("AP75", _AMBER), ("AP", _BLUE)):
        epochs, values = _series(evaluations, "epoch", name)
        if epochs:
            marker = "o" if len(epochs) <= 60 else None
            precision.plot(epochs, values, color=colour, marker=marker, markersize=3.5, linewidth=1.8, label=name)
            last.append((values[-1], epochs[-1], colour))
    height = -1.0
    for value, epoch, colour in sorted(last):
        height = max(value, height + 0.045)  # numbers that are close would be printed over each other
        precision.annotate(
            f"{value:.3f}", (epoch, height), (6, 0), textcoords="offset points", color=colour,
            va="center", fontsize=9, fontweight="bold",
        )  # fmt: skip
    precision.set_ylim(0, 1.02)
    precision.margins(x=0.09)
    _finish(precision, "Average precision on the validation images", "epoch")

    for name, (colour, label) in _TERMS.items():
        _smoothed(terms, *_series(train, "step", name), colour, label, faint=False)
        _smoothed(terms, *_series(train, "step", f"dn_{name}"), colour, "", faint=False, linestyle=_DASHED)
    if any(f"dn_{name}" in row for row in train for name in _TERMS):
        terms.plot([], [], color="#8a8f98", linestyle=_DASHED, label="of denoising queries")
    _finish(terms, "Terms of the loss, as weighted (log scale)", "step", log=True)

    names = sorted({key for row in train for key in row if key.startswith("lr")})
    for name, colour in zip(names, (_VIOLET, _CORAL, _GREEN, _AMBER, _BLUE), strict=False):
        steps, values = _series(train, "step", name)
        marker = "o" if len(steps) == 1 else None
        rate.plot(steps, values, color=colour, linewidth=1.8, marker=marker, label=name.replace("_", " "))
    rate.set_ylim(bottom=0)
    rate.yaxis.set_major_formatter(lambda value, _: "0" if value == 0 else f"{value:.1e}".replace(".0e", "e"))
    _finish(rate, "Learning rate", "step", legend=len(names) > 1)

    _draw_instability(stability, evaluations)
    draw_denoising_log(denoising, rows)

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomic(output_path, buffer.getvalue())


def _draw_instability(axes, evaluations: list[dict]) -> None:
    """Queries that changed their object since the evaluation before: the last layer, over the others."""
    counted = [row for row in evaluations if row.get("IS_layers")]
    layers = list(zip(*(row["IS_layers"] for row in counted), strict=True))
    epochs = [row["epoch"] for row in counted]
    for index, values in enumerate(layers):
        last = index + 1 == len(layers)
        style = (
            {"linewidth": 1.8, "label": "last layer"}
            if last
            else {"linewidth": 1, "alpha": 0.25 + 0.35 * index / len(layers)}
        )
        axes.plot(epochs, values, color=_VIOLET, marker="o" if len(epochs) <= 60 else None, markersize=3, **style)
    if len(layers) > 1:
        axes.plot([], [], color=_VIOLET, alpha=0.35, linewidth=1, label="layers before it, later ones darker")
    axes.set_ylim(bottom=0)
    _finish(axes, "Matching instability: queries per image that changed object", "epoch")


def draw_denoising_log(axes, rows: list[dict]) -> None:
    """The denoising part's share of the loss and what the noise achieved, of a log's rows, over steps."""
    for event, name, colour, label in (
        ("train", "dn_share", _CORAL, "share of the loss"),
        ("eval", "dn_flip_rate", _AMBER, "labels flipped"),
        ("eval", "dn_box_shift", _BLUE, "mean shift of the boxes"),
    ):
        steps, values = _series([row for row in rows if row["event"] == event], "step", name)
        if steps:
            marker = "o" if event == "eval" or len(steps) == 1 else None
            axes.plot(steps, values, color=colour, linewidth=1.8, marker=marker, markersize=3, label=label)
    axes.set_ylim(0, 1)
    _finish(axes, "Denoising", "step")


def _series(rows: list[dict], x: str, y: str) -> tuple[list[float], list[float]]:
    """The rows in which both values are numbers."""
    pairs = [(row[x], row[y]) for row in rows if _is_number(row.get(x)) and _is_number(row.get(y))]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _smoothed(axes, xs, values, colour, label, faint: bool = True, linestyle="-") -> None:
    """The moving average, over the values themselves drawn faintly."""
    if not xs:
        return
    if faint:
        axes.plot(xs, values, color=colour, alpha=0.18, linewidth=1)
    keep = 1 - 1 / min(max(1.0, len(values) / 40), 50.0)
    average, weight, smooth = 0.0, 0.0, []
    for value in values:
        average = keep * average + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        smooth.append(average / weight)  # without the pull of the start at zero
    marker = "o" if len(xs) == 1 else None
    axes.plot(xs, smooth, color=colour, linewidth=1.8, label=label, linestyle=linestyle, marker=marker)


def _finish(axes, title: str, x: str, log: bool = False, legend: bool = True, whole: bool = True) -> None:
    axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold", color=_INK)
    axes.set_xlabel(x, color=_INK, fontsize=9.5)
    if whole:
        axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.grid(True, color=_FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_FAINT)
    axes.tick_params(colors=_INK, labelsize=9, length=0)
    if not axes.lines:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.text(0.5, 0.5, "nothing recorded yet", transform=axes.transAxes, ha="center", color="#8a8f98")
        return
    if log and all(value > 0 for line in axes.lines for value in line.get_ydata()):
        axes.set_yscale("log")
        axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: "")
    if legend:
        axes.legend(frameon=False, fontsize=9, labelcolor=_INK)
