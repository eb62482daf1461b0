"""Federated annotations (LVIS, arXiv 1908.03195): in which image which classes were looked for.

Of an image some classes are verified to be absent, of some not every instance is annotated, and of the other classes
that it has objects of, all instances are. Of all else nobody knows whether it is there. An image of which nothing is
stated is annotated in full, as in COCO.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ABSENT, PARTIAL = "neg_category_ids", "not_exhaustive_category_ids"
"""LVIS' names of the two lists of an image."""


class Lists(NamedTuple):
    """A list of labels for each of n images, one after the other: that of image i from starts[i] to starts[i + 1].

    labels [m] int64; starts [n + 1] int64.
    """

    labels: np.ndarray
    starts: np.ndarray

    def of(self, image: int) -> np.ndarray:
        """An image's labels."""
        return self.labels[self.starts[image] : self.starts[image + 1]]

    def take(self, chosen: np.ndarray) -> "Lists":
        """Those of some of the images."""
        lengths = np.diff(self.starts)[chosen]
        starts = np.concatenate(([0], lengths.cumsum()))
        places = np.arange(starts[-1]) + np.repeat(self.starts[chosen] - starts[:-1], lengths)
        return Lists(self.labels[places], starts)


def make_lists(rows: Sequence[Sequence[int]]) -> Lists:
    """Lists from one of labels for each image."""
    starts = np.concatenate(([0], np.cumsum([len(row) for row in rows], dtype=np.int64)))
    return Lists(np.fromiter((label for row in rows for label in row), np.int64, starts[-1]), starts)


class Verified(NamedTuple):
    """What is stated of each of n images of a split, by its labels.

    stated [n] bool: whether anything is; absent: classes that are verified not to be there; partial: classes that are
    there, and not annotated in full.
    """

    stated: np.ndarray
    absent: Lists
    partial: Lists

    def take(self, chosen: np.ndarray) -> "Verified":
        """The same of some of the images."""
        return Verified(self.stated[chosen], self.absent.take(chosen), self.partial.take(chosen))

    def unverified(self, image: int, annotated: np.ndarray, classes: int) -> np.ndarray:
        """Which of so many classes are no negatives in an image [classes] bool; annotated: labels of its objects."""
        if not self.stated[image]:
            return np.zeros(classes, bool)
        found = np.ones(classes, bool)
        found[self.absent.of(image)] = False
        found[annotated] = False
        found[self.partial.of(image)] = True
        return found

    def fields(self, numbers: Sequence[int]) -> list[dict[str, list[int]]]:
        """For each image its lists under LVIS' names, or nothing where nothing is stated; numbers: ids by label."""
        lists = {ABSENT: self.absent, PARTIAL: self.partial}
        return [
            {name: [numbers[label] for label in rows.of(image).tolist()] for name, rows in lists.items()}
            if stated
            else {}
            for image, stated in enumerate(self.stated.tolist())
        ]
