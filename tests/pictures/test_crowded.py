"""Pictures of very many boxes and classes: made in time that grows with their number, and still to be read."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dndetr.data.classes import match_classes
from dndetr.pictures import draw_boxes, draw_first_batch
from dndetr.pictures.boxes import BoxCanvas, class_colour
from dndetr.pictures.scores import _merged, _most_confused, draw_confusion, draw_precision_recall

NAMES = ["cell", "dust", "hair"]


def some_boxes(count: int, side: int = 1000) -> list[list[float]]:
    rng = np.random.default_rng(count)
    corner = rng.uniform(0, 0.95 * side, (count, 2))
    return np.concatenate((corner, corner + rng.uniform(0.005, 0.04, (count, 2)) * side), axis=1).tolist()


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds, the better of two."""
    spent = []
    for _ in range(2):
        started = time.process_time()
        work()
        spent.append(time.process_time() - started)
    return min(spent)


@pytest.mark.parametrize("scored", [True, False])
def test_time_grows_with_the_boxes_and_not_with_their_square(scored: bool):
    picture = Image.new("RGB", (1000, 1000))

    def drawn(count: int) -> float:
        scores = np.linspace(0, 1, count) if scored else None
        return seconds(lambda: draw_boxes(picture, some_boxes(count), [0] * count, scores, NAMES))

    few, more, many = drawn(400), drawn(800), drawn(1600)
    assert many < 2
    assert more < 2.2 * few + 0.05 and many < 2.2 * more + 0.05


def test_a_first_batch_of_crowded_images_takes_seconds(tmp_path: Path):
    count = 800
    boxes = torch.tensor(some_boxes(count, 1)).repeat(2, 1, 1)
    boxes = torch.cat(((boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]), -1)
    labels = torch.zeros(2, count, dtype=torch.int64)
    parts = {"images": torch.zeros(2, 3, 96, 96), "sizes": torch.tensor([[96, 96]] * 2), "boxes": boxes}
    parts |= {"labels": labels, "counts": torch.tensor([count, 3]), "class_names": NAMES}
    parts |= {"noised_boxes": boxes[:, None].repeat(1, 2, 1, 1), "noised_labels": labels[:, None].repeat(1, 2, 1) + 1}
    started = time.process_time()
    draw_first_batch(tmp_path / "first_batch.png", **parts)
    assert time.process_time() - started < 4


def placed_slowly(size: tuple[int, int], boxes: list, width: float, height: float, edge: int) -> list[tuple]:
    """Where tags of one size go, box by box: the place that hides the least, as ``BoxCanvas.tag`` has it."""

    def overlap(a, b):
        return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))

    tags: list[tuple] = []
    for x0, y0, x1, y1 in boxes:
        costs = []
        for rank, (x, y) in enumerate([
            (x0, y0 - height), (x0, y1 + 1), (x1 - width + 1, y0 - height), (x1 - width + 1, y1 + 1), (x1 + edge, y0),
            (x0 - width, y0), (x1 + edge, y1 - height), (x0 - width, y1 - height), (x0, y0), (x1 - width, y1 - height),
        ]):  # fmt: skip
            left, up = max(0, min(x, size[0] - 1 - width)), max(0, min(y, size[1] - 1 - height))
            area = (left, up, left + width, up + height)
            hidden = 10 * sum(overlap(area, tag) for tag in tags) + 0.5 * sum(overlap(area, box) for box in boxes)
            moved = (abs(left - x) + abs(up - y)) * height * 0.5
            costs.append((hidden + moved + rank * 0.01 * width * height, rank, area))
        tags.append(min(costs)[2])
    return tags


def test_the_tags_of_a_normal_picture_lie_where_they_hide_the_least():
    canvas = BoxCanvas(Image.new("RGB", (640, 480)), 1.0)
    boxes = [[round(value) for value in box] for box in some_boxes(60, 440)]
    for box in boxes:
        canvas.outline(box, class_colour(0))
    canvas.tag_all([(box, "dust 0.50", class_colour(0)) for box in boxes], crowd=len(boxes))
    size = canvas._tag_size("dust 0.50")
    assert canvas._tags == placed_slowly((640, 480), boxes, *size, edge=canvas._width)


@pytest.mark.parametrize(("side", "fewest"), [(1000, 60), (300, 10)])
def test_a_crowd_stays_visible_and_its_picture_says_how_many_have_tags(side: int, fewest: int, monkeypatch):
    written = []
    draw_tag = BoxCanvas._draw_tag
    monkeypatch.setattr(BoxCanvas, "_draw_tag", lambda self, *told: (written.append(told[1]), draw_tag(self, *told)))
    scores = np.random.default_rng(0).uniform(0, 1, 300)
    picture = Image.new("RGB", (side, side), (7, 7, 7))
    drawn = draw_boxes(picture, some_boxes(300, side), [0] * 300, scores, NAMES, scale=1.0)
    *tags, note = written
    assert fewest <= len(tags) <= 100 and note == f"tags: {len(tags)} best of 300"
    assert tags == [f"cell {score:.2f}" for score in sorted(scores, reverse=True)[: len(tags)]]
    assert (np.asarray(drawn) == 7).all(-1).mean() > 0.5


def test_without_scores_the_largest_boxes_are_tagged(monkeypatch):
    monkeypatch.setattr("dndetr.pictures.boxes._CROWD", 5)
    canvas = BoxCanvas(Image.new("RGB", (400, 400)), 1.0)
    boxes = [[40 * place, 10, 40 * place + 2 + place, 20] for place in range(8)]
    marked = []
    monkeypatch.setattr(canvas, "tag", lambda box, *_, **__: (marked.append(box), box)[1])
    canvas.tag_all([(box, "cell", class_colour(0)) for box in boxes], crowd=8)
    assert marked == boxes[:2:-1]


def test_a_matrix_of_many_classes_shows_the_most_confused_ones(tmp_path: Path):
    counts = np.eye(1204, dtype=np.int64) * 50
    counts[-1, -1] = 0
    counts[700, 20], counts[3, 1200], counts[5, -1] = 9, 8, 300
    shown = _most_confused(counts)
    assert len(shown) == 40 and {20, 700, 3, 1200, 5} <= set(shown)
    merged = _merged(counts, shown)
    assert merged.sum() == counts.sum() and merged[-2, -2] == 1163 * 50
    assert merged[shown.index(700), shown.index(20)] == 9 and merged[shown.index(5), -1] == 300
    names = [f"class {number}" for number in range(1203)]
    path = tmp_path / "confusion.png"
    assert seconds(lambda: draw_confusion(path, counts, names, "many")) < 3
    with Image.open(path) as image:
        assert max(image.size) < 2000


def test_curves_of_many_classes_are_drawn_as_ranges(tmp_path: Path):
    curves = {f"class {number}": np.full((10, 101), number / 1203) for number in range(1203)}
    draw_precision_recall(tmp_path / "curves.png", curves)
    with Image.open(tmp_path / "curves.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    half, four_fifths = (np.abs(pixels - colour).sum(-1) < 12 for colour in ((170, 201, 235), (223, 235, 248)))
    assert half.mean() > 0.03 and four_fifths.mean() > 0.03


def test_classes_are_matched_in_time_that_grows_with_their_number():
    classes = [(number, "one" if number % 2 else f"class {number}") for number in range(20_000)]
    assert seconds(lambda: match_classes(classes[::-1], classes)) < 1
    assert match_classes(classes[::-1], classes) == list(range(20_000))[::-1]
