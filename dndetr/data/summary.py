"""What is to be known of all objects of a split before training, worked out once and in bounded memory."""

from typing import NamedTuple

import numpy as np

from .units import UnitDoubt

_BLOCK = 1 << 19  # objects looked at together


class Summary(NamedTuple):
    """A split's objects in numbers.

    starts [n + 1] int64: where the objects of each image begin; counts [n] int64: how many of them training uses;
    classes [K] int64: how many of these each class has, in label order; remarks: what is not used, in words.
    """

    starts: np.ndarray
    counts: np.ndarray
    classes: np.ndarray
    remarks: list[str]


def corners_of(boxes: np.ndarray) -> np.ndarray:
    """Boxes [m, 4] x, y, width, height as x0, y0, x1, y1."""
    return np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), axis=1)


def clip(corners: np.ndarray, sizes: np.ndarray, crowd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [m, 4] xyxy clipped to images of these sizes, [2] or [m, 2] (height, width), and which are used [m] bool.

    Those are no crowds [m], and nothing without an area within its image.
    """
    clipped = corners.clip(0, sizes[..., [1, 0, 1, 0]].astype(np.float64))
    return clipped, ~crowd & (clipped[:, 2:] > clipped[:, :2]).all(axis=1)


def summarise(sizes: np.ndarray, objects: tuple[np.ndarray, ...], classes: int) -> Summary:
    """The summary of images of these sizes [n, 2], and objects (``records.Objects``) of so many classes."""
    image, label, boxes, crowd = objects[:4]
    total, counts = np.zeros((2, len(sizes)), np.int64)
    found = np.zeros(classes, np.int64)
    crowds = flat = outside = moved = 0
    doubt = UnitDoubt()
    for at in range(0, len(image), _BLOCK):
        block = slice(at, at + _BLOCK)
        own, given, alone = sizes[image[block]], boxes[block], ~crowd[block]
        corners = corners_of(given)
        clipped, used = clip(corners, own, crowd[block])
        # Images are in ascending order, so a block has few of them.
        first, last = (int(image[block][place]) for place in (0, -1))
        here = image[block] - first
        total[first : last + 1] += np.bincount(here, minlength=last - first + 1)
        counts[first : last + 1] += np.bincount(here[used], minlength=last - first + 1)
        found += np.bincount(label[block][used], minlength=classes)
        empty = alone & (given[:, 2:] == 0).any(axis=1)
        crowds += int(crowd[block].sum())
        flat += int(empty.sum())
        outside += int((alone & ~used & ~empty).sum())
        # Annotation tools round to a pixel; less is not worth a word.
        moved += int((used & (np.abs(clipped - corners) > 1).any(axis=1)).sum())
        doubt.add(given[alone], own[alone].astype(np.float64))
    remarks = [
        f"{count:,} {noun if count == 1 else plural} {what}"
        for count, noun, plural, what in (
            (crowds, "crowd region", "crowd regions", "left out of training"),
            (flat, "box", "boxes", "without area left out"),
            (outside, "box", "boxes", "outside the image left out"),
            (moved, "box", "boxes", "clipped to the image"),
            (int((counts == 0).sum()), "image", "images", "without objects"),
        )
        if count
    ]
    said = doubt.sentence()
    return Summary(np.concatenate(([0], total.cumsum())), counts, found, remarks if said is None else [*remarks, said])
