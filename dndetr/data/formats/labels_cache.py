"""What was read of images and their label files, kept between runs."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..remembered import STAMP, Remembered, stamp

_VERSION = 2  # of how rows are read


class Known(NamedTuple):
    """Images in columns: (height, width) [n, 2], numbers of objects [n]; their classes [m] and x, y, width, height in
    pixels [m, 4], image by image."""

    sizes: np.ndarray
    counts: np.ndarray
    classes: np.ndarray
    boxes: np.ndarray

    def where(self, chosen: np.ndarray) -> "Known":
        """Those images [n] bool that a mask chooses."""
        if chosen.all():
            return self
        rows = np.repeat(chosen, self.counts)
        return Known(self.sizes[chosen], self.counts[chosen], self.classes[rows], self.boxes[rows])


def stamps(images: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """What changes with the files of each image and its labels [n, 6] int64; zeros for a file that is not there."""
    found: list[int] = []
    for image, label in zip(images, labels, strict=True):
        for path in (image, label):
            try:
                found += stamp(os.stat(path))
            except (OSError, ValueError):
                # A link that leads nowhere is a file that cannot be read, and not one that is not there.
                found += stamp(None) if not os.path.lexists(path) else (-1, 0, 0)
    return np.array(found, np.int64).reshape(-1, 2 * STAMP)


class LabelsCache:
    """The images of one split whose files were good; key: whatever else decides how they are read."""

    def __init__(self, key: str):
        self._remembered = Remembered("labels", f"{_VERSION} {key}")

    def recall(self, names: Sequence[str], now: np.ndarray) -> tuple[np.ndarray, Known]:
        """Which of the images [n] bool are known as their files are now, and those that are, in the order of ``names``.

        now: their ``stamps``.
        """
        places = self._remembered.places(names, now)
        same = places >= 0
        if not same.any():
            return same, Known(np.zeros((0, 2), np.int64), *np.zeros((2, 0), np.int64), np.zeros((0, 4)))
        sizes, counts, classes, boxes = known = Known(**self._remembered.columns)
        chosen = places[same]
        if np.array_equal(chosen, np.arange(len(counts))):
            return same, known
        starts, wanted = np.cumsum(counts) - counts, counts[chosen]
        # Rows of each chosen image: from its start on, as many as it has.
        rows = np.repeat(starts[chosen] - (np.cumsum(wanted) - wanted), wanted) + np.arange(wanted.sum())
        return same, Known(sizes[chosen], wanted, classes[rows], boxes[rows])

    def keep(self, names: Sequence[str], now: np.ndarray, known: Known) -> None:
        """Remember these images."""
        self._remembered.keep(names, now, known._asdict())
