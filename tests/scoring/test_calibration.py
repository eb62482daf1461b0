"""Expected calibration error against cases counted by hand."""

import pytest

from dndetr.scoring.calibration import calibration_error


def objects(*boxes, crowd=()):
    entries = [{"image_id": 1, "category_id": 1, "bbox": list(box), "iscrowd": 0} for box in boxes]
    entries += [{"image_id": 1, "category_id": 1, "bbox": list(box), "iscrowd": 1} for box in crowd]
    return {"images": [{"id": 1}], "categories": [{"id": 1, "name": "a"}], "annotations": entries}


def found(*rows, category=1):
    return [{"image_id": 1, "category_id": category, "bbox": list(box), "score": score} for score, box in rows]


A, B, FAR = (0, 0, 10, 10), (20, 20, 10, 10), (50, 50, 10, 10)


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        (found((1.0, A)), 0.0),
        (found((0.75, A)), 0.25),
        (found((0.75, A), (0.35, FAR)), (0.25 + 0.35) / 2),
        (found((0.72, A), (0.78, FAR)), abs(1 - 0.72 - 0.78) / 2),  # one bin: what errs in both ways is even
        (found((0.9, A), (0.8, A)), (0.1 + 0.8) / 2),  # an object is found once, by the better score
        (found((0.9, (0, 0, 10, 5)), (0.8, (0, 0, 10, 4))), (0.1 + 0.8) / 2),  # an IoU of one half is enough
        (found((0.9, A), category=2), 0.9),  # of another class
        (found((0.9, A), (0.04, FAR)), 0.1),  # below the threshold
        ([], None),
        (found((0.04, A)), None),
    ],
)
def test_by_hand(results, expected):
    given = calibration_error(objects(A, B), results)
    assert given is None if expected is None else given == pytest.approx(expected)


def test_a_crowd_region_hides_what_lies_in_it():
    truth = objects(A, crowd=[(48, 48, 30, 30)])
    assert calibration_error(truth, found((0.9, A), (0.6, FAR))) == pytest.approx(0.1)


def test_a_detection_takes_the_free_object_it_overlaps_most():
    near = (0, 0, 10, 9)
    assert calibration_error(objects(A, near), found((0.9, A), (0.9, A))) == pytest.approx(0.1)
