"""Rows of YOLO's label files: boxes, polygons, keypoints, and how many digits mean which pixel."""

import numpy as np
import pytest

from dndetr.data.formats.yolo_labels import text_of
from dndetr.data.formats.yolo_rows import parse_labels, pixel_boxes

ROWS = {
    "box": ("1 0.5 0.5 0.25 0.5", [24, 12, 16, 24]),
    "tabs-and-blanks": (" \t1\t0.5  0.5 0.25\t0.5 \r", [24, 12, 16, 24]),
    "triangle": ("1 0.25 0.25 0.5 0.75 0.375 0.5", [16, 12, 16, 24]),
    "turned-box": ("1 0.25 0.5 0.5 0.25 0.75 0.5 0.5 0.75", [16, 12, 32, 24]),
    "keypoints": ("1 0.5 0.5 0.25 0.5 0.5 0.5 2 0.25 0.75 0 0.1 0.1 1", [24, 12, 16, 24]),
    "one-keypoint": ("1 0.5 0.5 0.25 0.5 0.5 0.5 2", [24, 12, 16, 24]),
    "even-keypoints": ("1 0.5 0.5 0.25 0.5 0.5 0.5 2 0.25 0.75 2", [24, 12, 16, 24]),
    "a-little-outside": ("1 1.005 0.5 0.25 0.5", [56.32, 12, 16, 24]),
    "no-area": ("1 0.5 0.5 0 0", [32, 24, 0, 0]),
    "exponent": ("1 5e-1 0.5 2.5E-1 0.5", [24, 12, 16, 24]),
    "whole": ("1 0.5 0.5 1 1", [0, 0, 64, 48]),
}


@pytest.mark.parametrize(("row", "box"), ROWS.values(), ids=ROWS)
def test_rows(row, box):
    found = parse_labels(f"\n{row}\n\n")
    assert found.mistakes == [] and found.classes == [1]
    boxes = pixel_boxes(np.array([found.shares]), np.array(found.decimals), np.array([[48, 64]]))
    assert boxes.tolist() == [pytest.approx(box, abs=1e-9)]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends(tmp_path, end):
    rows = ["0 0.5 0.5 0.5 0.5", "1 0.5 0.5 0.25 0.25", "1 0.25 0.25 0.125 0.125", ""]
    (tmp_path / "a.txt").write_bytes(end.join(rows).encode())
    assert text_of(str(tmp_path / "a.txt")) == "\n".join(rows)


def test_keypoints_are_known_by_their_shape():
    row = "0 0.5 0.5 0.25 0.5 0.5 0.5 0.25 0.75"  # two points without visibility, or four corners
    assert parse_labels(row, keypoints=4).shares == [0.5, 0.5, 0.25, 0.5]
    assert parse_labels(row).shares == [0.375, 0.625, 0.25, 0.25]
    assert parse_labels(row, keypoints=6).mistakes == [
        (1, "has 9 numbers; kpt_shape asks for a class, a box and 6 more")
    ]


def test_few_digits_are_not_made_more_than_they_are():
    """A coordinate moves at most by what its digits leave open."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(100, 4000, (5000, 2))
    spans = rng.uniform(0.01, 0.5, (5000, 2))
    shares = np.concatenate((spans / 2 + rng.uniform(0, 0.5, (5000, 2)), spans), axis=1)
    for digits in (2, 4, 6, 17):
        written = np.round(shares, digits) if digits < 17 else shares
        boxes = pixel_boxes(written, np.full(5000, digits), sizes)
        sides = sizes[:, ::-1]
        plain = np.concatenate(((written[:, :2] - written[:, 2:] / 2) * sides, written[:, 2:] * sides), axis=1)
        open_ = np.concatenate((0.75 * sides, 0.5 * sides), axis=1) * 10.0**-digits
        assert (np.abs(boxes - plain) <= open_ * 1.001 + 1e-9).all()
