"""The built-in shapes: what they are, and that they never change."""

import hashlib
from itertools import combinations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from dndetr.data import shapes
from dndetr.data.errors import DataError
from dndetr.data.shapes import CLASSES, ShapesDataset, render


def digest(split: str, indices, size: int = 128) -> tuple[str, str]:
    """Short hashes of (labels and boxes), and of pixels."""
    objects, pixels = hashlib.sha256(), hashlib.sha256()
    for index in indices:
        image, boxes, labels = render(split, index, size)
        objects.update(labels.astype("<i8").tobytes() + boxes.astype("<f4").tobytes())
        pixels.update(image.tobytes())
    return objects.hexdigest()[:16], pixels.hexdigest()[:16]


FROZEN = [
    ("val", 0, 200, 128, "c86fd1e227f318b5", "ceea9ab15dbd0983"),
    ("train", 0, 100, 128, "956f17448a8eae28", "d52c875205302dc9"),
    ("train", 1000000000, 20, 128, "34dcbb0d7ebd6fb7", "0adb2b2426927d49"),
    ("val", 0, 10, 256, "e638a0290da55f56", "ad67634ac1afbaa3"),
]


@pytest.mark.parametrize(("split", "first", "count", "size", "objects", "pixels"), FROZEN)
def test_frozen(split, first, count, size, objects, pixels):
    """Other results refer to this data: a change needs another VERSION, not another hash."""
    assert shapes.VERSION == 1
    assert digest(split, range(first, first + count), size) == (objects, pixels)


@pytest.fixture(scope="module")
def validation():
    return [render("val", index) for index in range(200)]


def test_the_task_is_what_it_claims(validation):
    training = [render("train", index) for index in range(600)]
    for images in (validation, training):
        counts = [len(labels) for _, _, labels in images]
        boxes = np.concatenate([boxes for _, boxes, _ in images])
        assert np.mean(counts) >= 4.5 and min(counts) >= 1 and max(counts) == 8
        sides = boxes[:, 2:] - boxes[:, :2]
        assert np.median(sides[:, 0]) <= 30 and np.median(sides[:, 1]) <= 30
        assert np.median(np.sqrt(sides.prod(axis=1))) <= 30
        assert (boxes >= 0).all() and (boxes <= 128).all() and sides.min() > 4
        assert 0.15 < ((boxes == 0) | (boxes == 128)).any(axis=1).mean() < 0.45  # cut by the border
        share = np.bincount(np.concatenate([labels for *_, labels in images]), minlength=6) / len(boxes)
        assert len(share) == len(CLASSES) and share.min() > 0.12 and share.max() < 0.21
        overlaps = [_overlap(a, b) for _, boxes, _ in images for a, b in combinations(boxes, 2)]
        assert 0.2 < max(overlaps) <= 0.25


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Shared area over that of the smaller box."""
    shared = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None).prod()
    return shared / min((a[2:] - a[:2]).prod(), (b[2:] - b[:2]).prod())


def test_grounds_are_textured_and_noisy(validation):
    for image, _, _ in validation[:50]:
        pixels = image.astype(float)
        assert pixels.std(axis=(1, 2)).max() > 8
        fine = pixels[:, :, 1:] - pixels[:, :, :-1]
        assert np.median(np.abs(fine)) >= 1


def test_boxes_are_the_tight_bounds_of_what_was_filled(monkeypatch):
    filled = []
    fill = shapes._fill

    def record(corners, following, owner, extent):
        opacities = fill(corners, following, owner, extent)
        filled.append([(*corner, opacity) for corner, opacity in zip(extent[:2].T.tolist(), opacities, strict=True)])
        return opacities

    monkeypatch.setattr(shapes, "_fill", record)
    for index in range(150):
        _, boxes, labels = render("train", index)
        objects = [patch for patch in filled[-1] if patch[2].size][-len(labels) :]
        for (x0, y0, opacity), box in zip(objects, boxes, strict=True):
            rows, columns = np.flatnonzero(opacity.max(1) > 0), np.flatnonzero(opacity.max(0) > 0)
            found = (x0 + columns[0], y0 + rows[0], x0 + columns[-1] + 1, y0 + rows[-1] + 1)
            # A pixel is covered in part, and a sharp corner may lie between two sub-rows.
            assert np.abs(box - found).max() <= 1.3, (index, box, found)


def test_filling_measures_area():
    rectangle = np.array([[64 * 2 + 32, 64 * 5, 64 * 5, 64 * 2 + 32], [64, 64, 64 * 3 + 16, 64 * 3 + 16]])
    hole = np.array([[192, 192, 256, 256], [64, 128, 128, 64]])  # the other way round
    corners = np.concatenate((rectangle, hole), axis=1)
    following = np.array([1, 2, 3, 0, 5, 6, 7, 4])
    (opacity,) = shapes._fill(corners, following, np.zeros(8, int), np.array([[2], [1], [5], [4]]))
    assert opacity.tolist() == [[0.5, 0.0, 1.0], [0.5, 1.0, 1.0], [0.125, 0.25, 0.25]]


def test_filling_agrees_with_supersampling():
    """Every outline against Pillow's filling at 16 times the resolution."""
    for kind, contours in enumerate(shapes._outlines()):
        corners = shapes._CORNERS[kind] * 20 * 64 // 1024 + 32 * 64
        (opacity,) = shapes._fill(
            corners.T, shapes._FOLLOWING[kind], np.zeros(len(corners), int), np.array([[0], [0], [64], [64]])
        )
        image = Image.new("L", (1024, 1024))
        for hole, contour in enumerate(contours):
            points = [(x * 320 + 512, y * 320 + 512) for x, y in contour]
            ImageDraw.Draw(image).polygon(points, fill=0 if hole else 255)
        wanted = np.asarray(image.reduce(16)) / 255
        assert np.abs(opacity - wanted).max() < 0.25 and np.abs(opacity - wanted).mean() < 0.004


def test_images_depend_on_split_index_seed_and_nothing_else(validation):
    assert (render("val", 7)[0] == validation[7][0]).all()
    for other in (render("train", 7), render("val", 8), render("val", 7, seed=1)):
        assert not np.array_equal(other[0], validation[7][0])
    hashes = {render(split, index)[0].tobytes() for split in ("train", "val") for index in range(100)}
    assert len(hashes) == 200


def test_training_images_are_never_repeated_and_validation_always():
    training, validation = ShapesDataset("train", 10), ShapesDataset("val", 10)
    assert np.array_equal(validation.sample(3, epoch=0).pixels, validation.sample(3, epoch=5).pixels)
    assert not np.array_equal(training.sample(3, epoch=0).pixels, training.sample(3, epoch=5).pixels)
    longer = ShapesDataset("train", 5)
    assert np.array_equal(training.sample(3, epoch=1).pixels, longer.sample(3, epoch=2).pixels)


def test_a_dataset_and_its_ground_truth_agree():
    dataset = ShapesDataset("val", 6, size=160)
    truth = dataset.coco_dict()
    assert [(c["id"], c["name"]) for c in truth["categories"]] == dataset.classes
    for index in range(6):
        sample = dataset[index]
        mine = [a for a in truth["annotations"] if a["image_id"] == sample.image_id]
        assert sample.pixels.shape == (160, 160, 3) and sample.original_size == dataset.canvas == (160, 160)
        assert [dataset.classes[label][0] for label in sample.labels.tolist()] == [a["category_id"] for a in mine]
        x0, y0, x1, y1 = sample.boxes_xyxy.T.tolist()
        assert [a["bbox"] for a in mine] == [[a, b, c - a, d - b] for a, b, c, d in zip(x0, y0, x1, y1, strict=True)]


def test_impossible_data_is_refused():
    with pytest.raises(DataError, match="no split 'test'"):
        ShapesDataset("test", 5)
    with pytest.raises(DataError, match="at least 128"):
        ShapesDataset("train", 5, size=64)
