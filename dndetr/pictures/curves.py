"""Training curves of one run from its metrics.jsonl: losses, average precision, matching instability, denoising."""

import math
from pathlib import Path

from ..files import write_atomic
from ..runs.run_log import read_rows
from .charts import AMBER, BLUE, CORAL, DASHED, GREEN, GREY, INK, VIOLET, figure, finish, png

_TERMS = {"label": (BLUE, "label (focal)"), "l1": (GREEN, "box L1"), "giou": (AMBER, "box GIoU")}


def draw_curves(metrics_path: str | Path, output_path: str | Path, title: str = "") -> None:
    """Draw the rows of a metrics.jsonl as one PNG with six panels; few rows, or none, and nulls are no error.

    "train" rows: step, loss, matching, denoising, the unweighted terms label, l1, giou and dn_label, dn_l1, dn_giou,
    dn_share, one_to_many, and every key that begins with "lr"; "eval" rows: epoch, AP, AP50, AP75, IS, IS_layers,
    dn_flip_rate, dn_box_shift. What a run lacks is left out.
    """
    rows = read_rows(metrics_path)
    train = [row for row in rows if row["event"] == "train"]
    evaluations = [row for row in rows if row["event"] == "eval"]
    page = figure((18.5, 8), title)
    page.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    (total, precision, stability), (terms, rate, denoising) = page.subplots(2, 3)

    for name, colour, label in (
        ("loss", INK, "total"), ("matching", BLUE, "matching part"), ("denoising", CORAL, "denoising part"),
        ("one_to_many", GREEN, "one-to-many part"),
    ):  # fmt: skip
        _smoothed(total, *_series(train, "step", name), colour, label)
    finish(total, "Loss (log scale)", "step", log=True)

    last = []
    for name, colour in (("AP50", GREEN), ("AP75", AMBER), ("AP", BLUE)):
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
    finish(precision, "Average precision on the validation images", "epoch")

    for name, (colour, label) in _TERMS.items():
        _smoothed(terms, *_series(train, "step", name), colour, label, faint=False)
        _smoothed(terms, *_series(train, "step", f"dn_{name}"), colour, "", faint=False, linestyle=DASHED)
    if any(f"dn_{name}" in row for row in train for name in _TERMS):
        terms.plot([], [], color=GREY, linestyle=DASHED, label="of denoising queries")
    finish(terms, "Terms of the loss, as weighted (log scale)", "step", log=True)

    names = sorted({key for row in train for key in row if key.startswith("lr")})
    for name, colour in zip(names, (VIOLET, CORAL, GREEN, AMBER, BLUE), strict=False):
        steps, values = _series(train, "step", name)
        marker = "o" if len(steps) == 1 else None
        rate.plot(steps, values, color=colour, linewidth=1.8, marker=marker, label=name.replace("_", " "))
    rate.set_ylim(bottom=0)
    rate.yaxis.set_major_formatter(lambda value, _: "0" if value == 0 else f"{value:.1e}".replace(".0e", "e"))
    finish(rate, "Learning rate", "step", legend=len(names) > 1)

    _draw_instability(stability, evaluations)
    draw_denoising_log(denoising, rows)

    write_atomic(output_path, png(page))


def _draw_instability(axes, evaluations: list[dict]) -> None:
    """Queries that changed their object since the evaluation before: the last layer, over the others."""
    counted = [row for row in evaluations if row.get("IS_layers") and "epoch" in row]
    layers = list(zip(*(row["IS_layers"] for row in counted), strict=True))
    epochs = [row["epoch"] for row in counted]
    for index, values in enumerate(layers):
        last = index + 1 == len(layers)
        style = (
            {"linewidth": 1.8, "label": "last layer"}
            if last
            else {"linewidth": 1, "alpha": 0.25 + 0.35 * index / len(layers)}
        )
        axes.plot(epochs, values, color=VIOLET, marker="o" if len(epochs) <= 60 else None, markersize=3, **style)
    if len(layers) > 1:
        axes.plot([], [], color=VIOLET, alpha=0.35, linewidth=1, label="layers before it, later ones darker")
    axes.set_ylim(bottom=0)
    finish(axes, "Matching instability: queries per image that changed object", "epoch")


def draw_denoising_log(axes, rows: list[dict]) -> None:
    """The denoising part's share of the loss and what the noise achieved, of a log's rows, over steps."""
    for event, name, colour, label in (
        ("train", "dn_share", CORAL, "share of the loss"),
        ("eval", "dn_flip_rate", AMBER, "labels flipped"),
        ("eval", "dn_box_shift", BLUE, "mean shift of the boxes"),
    ):
        steps, values = _series([row for row in rows if row["event"] == event], "step", name)
        if steps:
            marker = "o" if event == "eval" or len(steps) == 1 else None
            axes.plot(steps, values, color=colour, linewidth=1.8, marker=marker, markersize=3, label=label)
    axes.set_ylim(0, 1)
    finish(axes, "Denoising", "step")


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
