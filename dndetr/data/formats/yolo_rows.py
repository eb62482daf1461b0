"""The rows of YOLO's label files, as boxes in pixels.

A row is ``class cx cy w h``, in shares of the image's sides; or a class and the corners of a polygon, whose bounding
box is taken; or a box and keypoints, which are passed over.
"""

import math
from contextlib import suppress
from typing import NamedTuple

import numpy as np

_SLACK = 0.01  # of a side: so far outside of the image a number may lie, as tools round and draw
_FINE = 17  # digits of a number that is written in full
_GRIDS = (0, 1, 2, 3, 4)  # decimals of a pixel that coordinates are likely to have had


class Labels(NamedTuple):
    """The rows of one file: classes [m], boxes as m times cx, cy, w, h in shares, and their decimals [m].

    mistakes: line, from 1 on, and what is wrong with it, of the rows that cannot be boxes.
    """

    classes: list[int]
    shares: list[float]
    decimals: list[int]
    mistakes: list[tuple[int, str]]


def parse_labels(text: str, keypoints: int | None = None) -> Labels:
    """The rows of a file; keypoints: how many numbers follow a box, None where that is not known."""
    labels = Labels([], [], [], [])
    for line, row in enumerate(text.split("\n"), start=1):
        fields = row.split()
        if not fields:
            continue
        try:
            if "_" in row or not row.isascii():  # Python reads 1_0, and the digits of all scripts
                raise ValueError(_not_numbers(fields))
            number, box = _parse(fields, keypoints)
        except ValueError as error:
            labels.mistakes.append((line, str(error)))
            continue
        labels.classes.append(number)
        labels.shares.extend(box)
        labels.decimals.append(_decimals(fields))
    return labels


def _parse(fields: list[str], keypoints: int | None) -> tuple[int, list[float]]:
    """Class and cx, cy, w, h of a row; ValueError in words."""
    try:
        number = int(fields[0])
        values = [float(field) for field in fields[1:]]
    except ValueError:
        raise ValueError(_not_numbers(fields)) from None
    box = values if len(values) == 4 else _box_of(values, keypoints)
    cx, cy, w, h = box
    # Compared so that NaN is none of it.
    if not (
        -_SLACK <= cx <= 1 + _SLACK and -_SLACK <= cy <= 1 + _SLACK and 0 <= w <= 1 + _SLACK and 0 <= h <= 1 + _SLACK
    ):
        raise ValueError(_out_of_range(box))
    if not 0 <= number < 2**31:
        raise ValueError(f"has class {fields[0][:20]}; classes are counted from 0, up to that of the last name")
    return number, box


def pixel_boxes(shares: np.ndarray, decimals: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Shares [m, 4] cx, cy, w, h of images of these sizes [m, 2] (height, width) -> [m, 4] x, y, w, h in pixels.

    A share with few digits stands for a range of pixels. Of these the shortest decimal number is taken, which is the
    one that was annotated where that was in whole pixels, or in tenths or hundredths of them.
    """
    sides = sizes[:, ::-1].astype(np.float64)
    spans = shares[:, 2:] * sides
    corners = shares[:, :2] * sides - spans / 2
    half = 0.5 * 10.0 ** -decimals[:, None].astype(np.float64)
    # Sums of numbers written in full are off by some of their last bits.
    return np.concatenate(
        (
            _shortest(corners, np.maximum(1.5 * half, 1e-14) * sides),
            _shortest(spans, np.maximum(half, 1e-14) * sides),
        ),
        axis=1,
    )


def _shortest(values: np.ndarray, slack: np.ndarray) -> np.ndarray:
    """The decimal number of the fewest digits within ``slack``, where it is not just any: its grid is far wider."""
    found, left = values.copy(), np.ones(values.shape, bool)
    for digits in _GRIDS:
        rounded = np.round(values, digits)
        near = left & (np.abs(rounded - values) <= slack * (1 + 1e-6)) & (8 * slack <= 10.0**-digits)
        found[near] = rounded[near]
        left &= ~near
    return found


def _decimals(fields: list[str]) -> int:
    """Digits behind the point of the number that has most."""
    most = 0
    for field in fields[1:]:
        if "e" in field or "E" in field:
            return _FINE
        _, _, digits = field.partition(".")
        most = max(most, len(digits))
    return min(most, _FINE)


def _box_of(values: list[float], keypoints: int | None) -> list[float]:
    """cx, cy, w, h of a row that is more than a box, or none; ValueError in words."""
    count = len(values)
    if keypoints:
        if count != 4 + keypoints:
            raise ValueError(f"has {count + 1} numbers; kpt_shape asks for a class, a box and {keypoints} more")
        return values[:4]
    if count > 5 and _are_keypoints(values[4:], certain=count % 2 == 1):
        return values[:4]
    if count < 6 or count % 2:
        score = "; take the score of a prediction out" if count == 5 else ""
        raise ValueError(
            f"has {count + 1} numbers; give class cx cy w h, or a class and the points of a polygon{score}"
        )
    xs, ys = values[::2], values[1::2]
    if not all(-_SLACK <= value <= 1 + _SLACK for value in values):
        raise ValueError(_out_of_range(values))
    return [(min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2, max(xs) - min(xs), max(ys) - min(ys)]


def _are_keypoints(values: list[float], certain: bool) -> bool:
    """Whether these are x, y and visibility, by turns; certain: no polygon has as many numbers."""
    visible = values[2::3]
    return len(values) % 3 == 0 and all(value in (0, 1, 2) for value in visible) and (certain or 2 in visible)


def _not_numbers(fields: list[str]) -> str:
    if "," in fields[0] or any("," in field for field in fields):
        return f"is {_short(' '.join(fields))}; separate the numbers by blanks"
    with suppress(ValueError):
        if "." in fields[0] and float(fields[0]).is_integer() and all(map(math.isfinite, map(float, fields[1:]))):
            return f"has class {fields[0]}; write it as a whole number"
    return f"is {_short(' '.join(fields))}; give numbers: class cx cy w h"


def _out_of_range(values: list[float]) -> str:
    if not all(map(math.isfinite, values)):
        return "has a number that is not finite; correct or remove it"
    if len(values) == 4 and min(values[2:]) < 0:
        return "has a negative width or height; give cx cy w h"
    strange = max(values, key=lambda value: abs(value - 0.5))
    unit = "; these are pixels: divide them by the image's width and height" if strange > 2 else ""
    return f"has {strange:g}, which is no share of the image's side from 0 to 1{unit}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
