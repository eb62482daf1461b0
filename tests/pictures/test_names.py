"""Names of any kind in pictures: each its own, as it is, and nothing that a font lacks ends or litters anything."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image, ImageDraw

from dndetr.pictures import draw_boxes, draw_predictions, fonts
from dndetr.pictures.scores import draw_confusion, draw_precision_recall

ODD = ["_hidden", "$a$ and $b_1$", "[red]100%[/red]", r"\alpha", "שלום", "مرحبا", "(id 4)", "Größe", "__", "%s"]


@pytest.fixture
def figures(monkeypatch) -> list[list[str]]:
    """The texts of every figure that is saved, as they are shown."""
    shown, save = [], Figure.savefig

    def look(figure, *arguments, **options):
        save(figure, *arguments, **options)
        shown.append(
            [
                text._preprocess_math(text.get_text())
                for text in figure.findobj(lambda one: isinstance(one, Text) and one.get_visible())
            ]
        )

    monkeypatch.setattr(Figure, "savefig", look)
    return shown


@pytest.fixture
def drawn(monkeypatch) -> list[str]:
    """What is written into pictures."""
    texts, write = [], ImageDraw.ImageDraw.text
    keep = lambda self, place, text, **options: (texts.append(text), write(self, place, text, **options))  # noqa: E731
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", keep)
    return texts


@pytest.fixture(autouse=True)
def _nothing_told_yet(monkeypatch):
    monkeypatch.setattr(fonts, "_told", set())


def test_odd_names_stand_in_figures_as_they_are(figures, tmp_path: Path):
    draw_precision_recall(tmp_path / "pr.png", {name: np.full((10, 101), 0.5) for name in ODD})
    draw_confusion(tmp_path / "confusion.png", np.eye(len(ODD) + 1, dtype=np.int64), ODD)
    curves, matrix = figures
    for name in ODD:
        assert curves.count((f"{name}  0.500", False)) == 1 and matrix.count((name, False)) == 2  # rows and columns


def test_odd_names_stand_in_pictures_as_they_are(drawn, tmp_path: Path):
    count = len(ODD)
    boxes = torch.tensor([[10.0, 10, 90, 90]]).repeat(count, 1)
    found = (torch.full((count,), 0.9), torch.arange(count), boxes)
    draw_predictions(tmp_path / "predictions.png", [Image.new("RGB", (100, 100))], [found], None, ODD)
    for name in ODD:
        assert drawn.count(name) == 1 and drawn.count(f"{name} 0.90") == 1


def test_what_the_font_lacks_is_told_once_in_a_line_of_ours(figures, drawn, tmp_path: Path, capsys):
    names = ["猫", "犬 🚗", "a\nb\tc", "Ωmega"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            draw_confusion(tmp_path / "confusion.png", np.eye(5, dtype=np.int64), names)
            draw_precision_recall(tmp_path / "pr.png", {name: np.full((10, 101), 0.5) for name in names})
            draw_boxes(Image.new("RGB", (300, 300)), [[10, 10, 90, 90]] * 4, range(4), None, names)
    told = capsys.readouterr()
    assert told.err == "note: the font of the pictures lacks 犬猫🚗; they show codes such as \\u72ac\n" and not told.out
    shown = [r"\u732b", r"\u72ac \U0001f697", r"a\nb\tc", "Ωmega"]
    assert sorted(drawn) == sorted(shown * 2) and all((name, False) in figures[0] for name in shown)


def test_long_names_fit_and_stay_different(figures, drawn, tmp_path: Path):
    long = "very " * 40
    names = [f"{long}large", f"{long}small", f"{long}x{long}", f"{long}y{long}", "short"]
    for most in (24, 28, 40):
        cut = fonts.short(names, most)
        assert len(set(cut)) == len(names) and max(map(len, cut)) <= most and cut[-1] == "short"
    assert fonts.short([f"{long}large", "b"], 28) == [f"{long[:25]}...", "b"]
    draw_confusion(tmp_path / "confusion.png", np.eye(6, dtype=np.int64), names)
    draw_boxes(Image.new("RGB", (400, 400)), [[10, 10, 90, 90]] * 5, range(5), None, names)
    assert len(set(drawn)) == 5
    labels = [text for text, _ in figures[0] if text.startswith("very")]
    assert len(labels) == 8 and len(set(labels)) == 4
