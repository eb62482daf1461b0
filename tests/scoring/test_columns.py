"""Detections and ground truth in columns, and the dictionaries that they stand for."""

import copy
import json

import numpy as np
import pytest
from scenes import awkward_scene

from dndetr.data.records import Records, make_objects
from dndetr.files import write_json_rows
from dndetr.scoring.calibration import calibration_error
from dndetr.scoring.coco import coco_evaluate
from dndetr.scoring.confusion import confusion_matrix
from dndetr.scoring.ids import places_in, shared_keys
from dndetr.scoring.results import Results
from dndetr.scoring.truth import Truth

ROWS = [
    {"image_id": 7, "category_id": 2, "bbox": [1.5, 2.0, 3.25, 0.0], "score": 0.5},
    {"image_id": 3, "category_id": 1, "bbox": [-1.0, 2.0, 3.0, 4.0], "score": 1.0},
    {"image_id": 7, "category_id": 2, "bbox": [0.1, 0.2, 0.3, 0.4], "score": 1e-06},
]


def test_a_sequence_of_dictionaries_that_are_made_when_asked_for():
    results = Results.of(ROWS)
    assert len(results) == 3 and list(results) == ROWS and results == ROWS
    assert ROWS.__eq__(results) is NotImplemented, "then Python asks the other one"
    assert (results[0], results[-1], results[np.int64(1)]) == (ROWS[0], ROWS[-1], ROWS[1])
    assert isinstance(results[1:], Results) and results[1:] == ROWS[1:] and results[::-1] == ROWS[::-1]
    assert list(reversed(results)) == ROWS[::-1] and ROWS[1] in results and results.index(ROWS[2]) == 2
    assert copy.deepcopy(results) == results
    for place in (3, -4):
        with pytest.raises(IndexError):
            results[place]
    assert {type(value) for value in results[0].values()} == {int, list, float}, "what JSON knows"


def test_what_is_not_equal():
    results = Results.of(ROWS)
    assert results != ROWS[:2] and results != ROWS[::-1] and results != Results.of(ROWS[:2]) and results != "no rows"
    for name, value in (("score", 0.25), ("image_id", 8), ("bbox", [0.0, 0.0, 0.0, 0.0])):
        other = [ROWS[0] | {name: value}, *ROWS[1:]]
        assert results != other and results != Results.of(other)


def test_columns_are_typed_also_where_there_is_nothing():
    for results in (Results.of(ROWS), Results.of([]), Results.joined([])):
        assert [column.dtype for column in results.columns] == [np.int64, np.int64, np.float64, np.float64]
        assert results.boxes_xywh.shape == (len(results), 4)
    assert Results.of([]) == [] and list(Results.of([])) == []
    results = Results.of(ROWS)
    assert Results.of(results) is results and Results.of(iter(ROWS)) == ROWS
    assert Results.joined([results[:1], results[1:1], results[1:]]) == ROWS


@pytest.mark.parametrize("count", [0, 1, 9_999, 10_000, 10_001, 20_000, 25_000])
def test_a_file_has_the_bytes_of_the_whole_list(tmp_path, count):
    rng = np.random.default_rng(count)
    boxes, scores = rng.normal(0, 1e3, (count, 4)).round(3), rng.random(count).round(6)
    results = Results(rng.integers(0, 2**60, count), rng.integers(0, 365, count), boxes, scores)
    write_json_rows(tmp_path / "rows.json", results)
    text = json.dumps(list(results), separators=(",", ":"))
    assert (tmp_path / "rows.json").read_bytes() == (text + "\n").encode()
    assert [*tmp_path.iterdir()] == [tmp_path / "rows.json"]


def test_a_row_that_json_does_not_know_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.json"
    write_json_rows(path, ROWS)
    before = path.read_bytes()
    rows = Results.of([ROWS[0]] * 10_001)
    rows.scores[-1] = np.nan
    with pytest.raises(ValueError, match="Out of range float"):
        write_json_rows(path, rows)
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]


def some_records(tmp_path) -> Records:
    objects = make_objects([2, 0, 0], [1, 0, 1], [[0, 0, 9, 9], [1, 2, 3, 4], [5, 5, 2, 2]], [False, True, False])
    classes, names = [(20, "b"), (10, "a")], ["x.png", "y.png", "z.png"]
    sizes = np.full((3, 2), 50)
    return Records("val", tmp_path, tmp_path, tmp_path, classes, names, np.array([9, 5, 7]), sizes, objects)


def test_records_and_their_document_are_the_same_truth(tmp_path):
    records = some_records(tmp_path)
    mine, its = Truth.of(records), Truth.of(records.coco_dict())
    assert mine.classes == its.classes and Truth.of(mine) is mine
    for name in set(Truth._fields) - {"classes"}:
        a, b = getattr(mine, name), getattr(its, name)
        assert a.dtype == b.dtype and np.array_equal(a, b), name
    found = [{"image_id": 7, "category_id": 10, "bbox": [0, 0, 9, 8], "score": 0.9}]
    assert coco_evaluate(records, found) == coco_evaluate(records.coco_dict(), found) != coco_evaluate(records, [])


def test_a_document_may_lack_areas_and_crowds():
    entries = [
        {"image_id": 1, "category_id": 1, "bbox": [0, 0, 4, 5]},
        {"image_id": 1, "category_id": 1, "bbox": [0, 0, 4, 5], "area": None, "iscrowd": None},
        {"image_id": 1, "category_id": 1, "bbox": [0, 0, 4, 5], "area": 7, "iscrowd": 1},
    ]
    truth = Truth.of({"annotations": entries})
    assert truth.areas.tolist() == [20, 20, 7] and truth.crowd.tolist() == [False, False, True]
    assert len(truth.images) == 0 and truth.classes == []


def document(truth: Truth) -> dict:
    columns = (column.tolist() for column in truth[2:])
    keys = ("image_id", "category_id", "bbox", "area", "iscrowd")
    return {
        "images": [{"id": number} for number in truth.images.tolist()],
        "categories": [{"id": number, "name": name} for number, name in truth.classes],
        "annotations": [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)],
    }


def test_columns_measure_as_dictionaries_do():
    told = 0
    for seed in range(30):
        truth, results = awkward_scene(seed)
        rows, category_ids = list(results), [number for number, _ in truth.classes]
        error = calibration_error(truth, results)
        assert error == calibration_error(document(truth), rows)
        counts = confusion_matrix(truth, results, category_ids)
        assert np.array_equal(counts, confusion_matrix(document(truth), rows, category_ids))
        assert counts[:-1].sum() == (~truth.crowd).sum(), "every object is found as something, or missed"
        told += error is not None and counts[:-1, :-1].sum() > 0
    assert told > 10


def test_places_of_ids():
    known = np.array([2, 5, 2**62])
    assert places_in(known, np.array([5, 2**62, 3, 9, 2, 2**62 + 1])).tolist() == [1, 2, -1, -1, 0, -1]
    assert places_in(known, np.zeros(0, np.int64)).tolist() == [] and places_in(known[:0], known).tolist() == [-1] * 3
    assert places_in(np.array(["2", "5"]), known).tolist() == [-1] * 3, "a number is no text"
    assert places_in(np.array(["2", "5"]), np.array(["5", "x"])).tolist() == [1, -1]


def test_keys_that_both_have():
    found = [*shared_keys(np.array([-1, 2, 2, 3, 5, 5]), np.array([0, 2, 4, 5, 5, 5]))]
    assert found == [(slice(1, 3), slice(1, 2)), (slice(4, 6), slice(3, 6))]
    assert [*shared_keys(np.array([], int), np.array([1]))] == []
