"""What is known of all objects before training: worked out in blocks, it is what one look at all of them gives."""

import numpy as np
import pytest

from dndetr.data import summary
from dndetr.data.records import make_objects
from dndetr.data.summary import clip, corners_of, summarise
from dndetr.data.units import are_shares, unit_doubt


def at_once(sizes, objects, classes):
    """Starts, counts, classes and remarks, from arrays of everything."""
    own = sizes[objects.image]
    corners = np.concatenate((objects.boxes[:, :2], objects.boxes[:, :2] + objects.boxes[:, 2:]), axis=1)
    clipped = corners.clip(0, own[:, [1, 0, 1, 0]].astype(np.float64))
    used = ~objects.crowd & (clipped[:, 2:] > clipped[:, :2]).all(axis=1)
    moved = (np.abs(clipped - corners) > 1).any(axis=1)
    single = ~objects.crowd
    flat = single & (objects.boxes[:, 2:] == 0).any(axis=1)
    counts = np.bincount(objects.image[used], minlength=len(sizes))
    numbers = (
        objects.crowd.sum(),
        flat.sum(),
        (single & ~used & ~flat).sum(),
        (used & moved).sum(),
        (counts == 0).sum(),
    )
    words = (
        ("crowd region", "crowd regions", "left out of training"),
        ("box", "boxes", "without area left out"),
        ("box", "boxes", "outside the image left out"),
        ("box", "boxes", "clipped to the image"),
        ("image", "images", "without objects"),
    )
    remarks = [
        f"{n:,} {one if n == 1 else more} {what}" for n, (one, more, what) in zip(numbers, words, strict=True) if n
    ]
    doubt = unit_doubt(objects.boxes[single], own[single].astype(np.float64))
    starts = np.concatenate(([0], np.bincount(objects.image, minlength=len(sizes)).cumsum()))
    found = np.bincount(objects.label[used], minlength=classes)
    return starts, counts, found, remarks + [doubt] * (doubt is not None)


@pytest.mark.parametrize("block", [1, 7, 1000])
@pytest.mark.parametrize("case", range(12))
def test_blocks_are_the_whole(case, block, monkeypatch):
    monkeypatch.setattr(summary, "_BLOCK", block)
    draw = np.random.default_rng(case)
    images, objects, classes = (
        int(draw.integers(1, 30)),
        int(draw.integers(0, 80)) * (case > 1),
        int(draw.integers(1, 5)),
    )
    sizes = draw.integers(20, 50, (images, 2))
    boxes = draw.integers(-10, 60 + 40 * (case % 2), (objects, 4)) + draw.random((objects, 4)).round(1)
    boxes[:, 2:] = np.abs(boxes[:, 2:]) * draw.choice((0, 1), (objects, 2), p=(0.1, 0.9))
    which, labels = draw.integers(0, images, objects), draw.integers(0, classes, objects)
    made = make_objects(which, labels, boxes, draw.random(objects) < 0.2)
    *arrays, remarks = summarise(sizes, made, classes)
    *expected, told = at_once(sizes, made, classes)
    assert remarks == told and all(np.array_equal(a, b) for a, b in zip(arrays, expected, strict=True))
    for image in range(images):
        own = slice(arrays[0][image], arrays[0][image + 1])
        clipped, used = clip(corners_of(made.boxes[own]), sizes[image], made.crowd[own])
        whole, all_used = clip(corners_of(made.boxes), sizes[made.image], made.crowd)
        assert np.array_equal(clipped, whole[own]) and np.array_equal(used, all_used[own])


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [([], False), ([[0, 0, 1, 1]], False), ([[0, 0.5, 1, 1]], True), ([[0.5] * 4, [0, 0, 2, 1]], False),
     ([[0.5] * 4, [-0.1, 0, 1, 1]], False), ([[0, 0, 1, 1], [0.5] * 4], True), ([[float("nan")] * 4], False)],
)  # fmt: skip
def test_shares(boxes, expected):
    assert are_shares(boxes) is expected
