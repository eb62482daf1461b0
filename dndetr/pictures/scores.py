"""Figures of an evaluation: precision over recall, and which class was taken for which."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..files import write_atomic
from .boxes import class_colour
from .charts import AMBER, BLUE, CORAL, FAINT, GREEN, INK, figure, head, png
from .fonts import plain, short

_NAMED = 12  # classes in a legend
_LETTERS = 28  # of a class name; longer ones would push the figure aside
_COUNTED = 20  # classes up to which cells show their counts
_ALL = 100  # classes up to which every one has its own line or row
_CONFUSED = 40  # classes shown of more than that


def draw_precision_recall(path: str | Path, curves: Mapping[str, np.ndarray], title: str = "") -> None:
    """Precision over recall as PNG: each class at IoU 0.5, and the mean of all classes at several IoUs.

    Of more than 100 classes the range is drawn in which most of them lie.

    curves: by class name, [10, 101] precision at IoU 0.5 to 0.95 and recall 0 to 1, -1 where a class has no objects.
    """
    page = figure((13, 5.6), title, letters=13)
    single, mean = page.subplots(1, 2)
    recall = np.linspace(0, 1, 101)
    measured = {name: values for name, values in curves.items() if (values > -1).any()}
    if len(measured) > _ALL:
        _spread(single, recall, np.stack([values[0] for values in measured.values()]))
        _axes(single, f"{len(measured):,} classes at IoU 0.5", legend=True)
    else:
        texts = []
        for label, (name, text) in enumerate(zip(curves, short(list(curves), _LETTERS), strict=True)):
            if name in measured:
                colour, values = tuple(channel / 255 for channel in class_colour(label)), measured[name][0]
                single.plot(recall, values, color=colour, linewidth=1.6, label=str(label))
                texts.append(plain(f"{text}  {values.mean():.3f}"))
        named = 0 < len(measured) <= _NAMED
        _axes(single, "Each class at IoU 0.5" + " (AP50 in the legend)" * named, legend=named)
        # Afterwards, since matplotlib leaves out whatever label begins with an underscore.
        for entry, text in zip(single.get_legend().get_texts() if named else (), texts, strict=named):
            entry.set_text(text)
    if measured:
        average = np.mean(list(measured.values()), axis=0)
        for row, colour in ((0, GREEN), (5, AMBER), (8, CORAL)):
            text = f"IoU {0.5 + 0.05 * row:.2f}  {average[row].mean():.3f}"
            mean.plot(recall, average[row], color=colour, linewidth=1.6, label=text)
        text = f"IoU 0.50:0.95  {average.mean():.3f}"
        mean.plot(recall, average.mean(axis=0), color=BLUE, linewidth=2.4, label=text)
    _axes(mean, "Mean of the classes (AP in the legend)", legend=bool(measured))
    write_atomic(path, png(page))


def _spread(axes, recall: np.ndarray, curves: np.ndarray) -> None:
    """Median and quantiles of many curves [n, 101]."""
    low, quarter, median, upper, high = np.quantile(curves, (0.1, 0.25, 0.5, 0.75, 0.9), axis=0)
    axes.fill_between(recall, low, high, color=BLUE, alpha=0.15, linewidth=0, label="four fifths of the classes")
    axes.fill_between(recall, quarter, upper, color=BLUE, alpha=0.3, linewidth=0, label="half of the classes")
    axes.plot(recall, median, color=BLUE, linewidth=2.4, label="median")


def draw_confusion(path: str | Path, counts: np.ndarray, names: Sequence[str], title: str = "") -> None:
    """A confusion matrix as PNG; rows are true classes, colours shares of a row.

    Of more than 100 classes only those confused most have a row and a column of their own.

    counts [K + 1, K + 1] as from ``scoring.confusion.confusion_matrix``: the last row holds detections of nothing, the
    last column objects that were missed.
    """
    note = ""
    if len(names) > _ALL:
        shown = _most_confused(counts)
        note = f"the {len(shown)} of {len(names):,} classes that are confused most"
        counts, names = _merged(counts, shown), [*(names[place] for place in shown), "(all others)"]
    side = min(4.2 + 0.28 * len(counts), 16)
    page = figure((side + 0.6, side), title, letters=13)
    axes = page.subplots()
    if note:
        axes.set_title(note, loc="left", fontsize=11.5, color=INK)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    places, names = range(len(counts)), [plain(name) for name in short(names, _LETTERS)]
    size = 9 if len(counts) <= 30 else 6.5
    axes.set_xticks(places, [*names, "(missed)"], rotation=90 if len(counts) > 6 else 30, fontsize=size)
    axes.set_yticks(places, [*names, "(nothing)"], fontsize=size)
    axes.set_xlabel("detected as", color=INK, fontsize=9.5)
    axes.set_ylabel("true class", color=INK, fontsize=9.5)
    for edge in axes.spines.values():
        edge.set_color(FAINT)
    axes.tick_params(colors=INK, length=0)
    if len(counts) <= _COUNTED + 1:
        for row, column in np.argwhere(counts):
            ink = "white" if shares[row, column] > 0.55 else INK
            axes.text(column, row, int(counts[row, column]), ha="center", va="center", color=ink, fontsize=size)
    write_atomic(path, png(page))


def _most_confused(counts: np.ndarray) -> list[int]:
    """Classes of the largest numbers off the diagonal, both of each pair; then those with most other errors."""
    mistakes = counts[:-1, :-1].copy()
    np.fill_diagonal(mistakes, 0)
    largest = np.argsort(-mistakes, axis=None, kind="stable")[: min(_CONFUSED**2, np.count_nonzero(mistakes))]
    pairs = np.stack(np.unravel_index(largest, mistakes.shape), axis=-1)
    others = np.argsort(-(counts[:-1, -1] + counts[-1, :-1]), kind="stable")
    return sorted(list(dict.fromkeys([*pairs.flatten().tolist(), *others.tolist()]))[:_CONFUSED])


def _merged(counts: np.ndarray, shown: list[int]) -> np.ndarray:
    """The matrix with the classes that are not shown added up in one row and one column, before the last."""
    place = np.full(len(counts), len(shown))
    place[shown] = np.arange(len(shown))
    place[-1] = len(shown) + 1
    merged = np.zeros((len(shown) + 2, len(shown) + 2), counts.dtype)
    np.add.at(merged, (place[:, None], place), counts)
    return merged


def _axes(axes, title: str, legend: bool) -> None:
    head(axes, title)
    axes.set(xlim=(0, 1.005), ylim=(0, 1.02))
    axes.set_xlabel("recall", color=INK, fontsize=9.5)
    axes.set_ylabel("precision", color=INK, fontsize=9.5)
    if legend:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower left")
