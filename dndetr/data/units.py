"""Whether the numbers of boxes look like x, y, width, height in pixels, or like something else."""

from collections.abc import Sequence

import numpy as np

_FAR = 0.05  # of the image's side: farther outside, a box was not just drawn or rounded over the border


def are_shares(boxes: Sequence[Sequence[float]]) -> bool:
    """Whether boxes of four numbers are shares of the image's sides: all in [0, 1], and not all whole."""
    return all(0 <= value <= 1 for box in boxes for value in box) and any(value % 1 for box in boxes for value in box)


def unit_doubt(boxes: np.ndarray, sizes: np.ndarray) -> str | None:
    """A sentence where most boxes [n, 4] xywh reach far beyond their image; sizes: its (height, width), [n, 2]."""
    sides = sizes[:, ::-1]
    far = (boxes[:, :2] + boxes[:, 2:] > (1 + _FAR) * sides + 1).any(axis=1)
    if 2 * far.sum() <= len(boxes):
        return None
    said = f"{far.sum():,} of {len(boxes):,} boxes reach far beyond their image: "
    if (boxes[:, 2:] >= boxes[:, :2]).all() and (boxes[:, 2:] <= sides + 1).all():
        return said + "they seem to be x0, y0, x1, y1, but x, y, width, height are read"
    return said + "are they in pixels, and of images of this size?"
