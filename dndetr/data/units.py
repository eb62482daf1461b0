"""Whether the numbers of boxes look like x, y, width, height in pixels, or like something else."""

from collections.abc import Sequence

import numpy as np

_FAR = 0.05  # of the image's side: farther outside, a box was not just drawn or rounded over the border


class Shares:
    """Whether boxes are shares of the image's sides: all in [0, 1], and not all whole. They come in parts."""

    def __init__(self):
        self._inside, self._broken = True, False

    def add(self, boxes: np.ndarray) -> None:
        """More boxes [n, 4] of four finite numbers."""
        self._inside = self._inside and bool(((boxes >= 0) & (boxes <= 1)).all())
        self._broken = self._broken or (self._inside and bool((boxes % 1 != 0).any()))

    @property
    def are_all(self) -> bool:
        """Whether all that were added are."""
        return self._inside and self._broken


def are_shares(boxes: Sequence[Sequence[float]]) -> bool:
    """Whether boxes of four finite numbers are shares of the image's sides."""
    shares = Shares()
    shares.add(np.asarray(boxes, np.float64).reshape(-1, 4))
    return shares.are_all


class UnitDoubt:
    """Whether most boxes of a split reach far beyond their images; boxes come in any number of parts."""

    def __init__(self):
        self._count = self._far = 0
        self._ascending = self._fits = True

    def add(self, boxes: np.ndarray, sizes: np.ndarray) -> None:
        """More boxes [n, 4] x, y, width, height; sizes [n, 2]: (height, width) of their images."""
        sides = sizes[:, ::-1]
        self._count += len(boxes)
        self._far += int((boxes[:, :2] + boxes[:, 2:] > (1 + _FAR) * sides + 1).any(axis=1).sum())
        self._ascending &= bool((boxes[:, 2:] >= boxes[:, :2]).all())
        self._fits &= bool((boxes[:, 2:] <= sides + 1).all())

    def sentence(self) -> str | None:
        """What to say of them; None where there is nothing."""
        if 2 * self._far <= self._count:
            return None
        said = f"{self._far:,} of {self._count:,} boxes reach far beyond their image: "
        if self._ascending and self._fits:
            return said + "they seem to be x0, y0, x1, y1, but x, y, width, height are read"
        return said + "are they in pixels, and of images of this size?"


def unit_doubt(boxes: np.ndarray, sizes: np.ndarray) -> str | None:
    """A sentence where most boxes [n, 4] xywh reach far beyond their image; sizes: its (height, width), [n, 2]."""
    doubt = UnitDoubt()
    doubt.add(boxes, sizes)
    return doubt.sentence()
