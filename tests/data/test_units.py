"""Annotations in other units than pixels, and in other types than numbers."""

import json
import re

import numpy as np
import pytest
from splits import read_split
from whole_documents import find_problems

from dndetr.data.errors import DataError
from dndetr.data.folder_dataset import FolderDataset
from dndetr.data.training import shapes_or_folder
from dndetr.data.transforms import Unresized
from dndetr.data.units import unit_doubt


def kinds(content):
    return [problem.kind for problem in find_problems(content)]


@pytest.mark.parametrize("boxes", [((0.1, 0.2, 0.5, 0.4), (0, 0, 1, 1)), ((0.5, 0.5, 1, 1),)], ids=["some", "one"])
def test_shares_of_the_image_are_no_boxes(make_document, make_folder, boxes):
    root = make_folder(make_document(boxes=boxes))
    with pytest.raises(DataError, match=r"the boxes all lie within \[0, 1\] and .* give x, y, width, height in pixels"):
        FolderDataset(read_split(root, "train"), Unresized())


@pytest.mark.parametrize(
    "boxes", [(), ((0, 0, 1, 1),), ((0.1, 0.2, 0.5, 0.4), (5, 5, 2, 2))], ids=["none", "a-pixel", "small"]
)
def test_small_boxes_are_boxes(make_document, boxes):
    assert kinds(make_document(boxes=boxes)) == []


@pytest.mark.parametrize(
    ("boxes", "said"),
    [
        ([[10, 20, 50, 38], [30, 25, 58, 36], [1, 1, 8, 9]], "2 of 3 .* they seem to be x0, y0, x1, y1, but"),
        ([[100, 20, 40, 30], [10, 70, 40, 30], [1, 2, 3, 4]], "2 of 3 boxes reach far beyond .* of this size"),
        ([[100, 20, 40, 30], [1, 2, 40, 30], [1, 2, 3, 4]], None),
        ([[30, 20, 32, 21], [30, 20, 31, 22]], None),
    ],
    ids=["corners", "another-size", "one-mistake", "a-little"],
)
def test_boxes_beyond_their_image_are_doubted(make_document, make_folder, boxes, said):
    doubt = unit_doubt(np.array(boxes, np.float64), np.array([[40.0, 60.0]] * len(boxes)))
    assert doubt is None if said is None else re.search(said, doubt)
    dataset = FolderDataset(
        read_split(make_folder(make_document(images=((40, 60),), boxes=boxes)), "train"), Unresized()
    )
    assert [remark for remark in dataset.remarks if "reach far" in remark] == ([] if said is None else [doubt])


def test_whole_floats_are_integers(make_document, make_folder):
    content = make_document()
    whole = FolderDataset(read_split(make_folder(content), "train"), Unresized())
    expected = whole.records.coco_dict()
    for which in ("images", "annotations", "categories"):
        for entry in content[which]:
            entry.update({key: float(value) for key, value in entry.items() if isinstance(value, int)})
    assert '"id": 11.0' in json.dumps(content)
    whole.records.file.write_text(json.dumps(content))
    made = FolderDataset(read_split(whole.records.root, "train"), Unresized())
    assert (made.ids, made.sizes, made.classes) == (whole.ids, whole.sizes, whole.classes)
    assert all(isinstance(number, int) for number in (*made.ids, *made.sizes[0], made.classes[0][0]))
    assert made.records.coco_dict() == expected and json.dumps(made.records.coco_dict()) == json.dumps(expected)


TEXTS = {
    "images": {"id": "image number 0 of the list has id '11'", "width": "image 11 has width '60'"},
    "categories": {"id": "category number 0 of the list has id '7'"},
    "annotations": {
        "id": "annotation number 0 of the list has id '100'",
        "image_id": "annotation 100 has image_id '11'",
        "category_id": "annotation 100 has category_id '7'",
        "area": "annotation 100 has area '200'",
        "iscrowd": "annotation 100 has iscrowd '0'",
    },
}


@pytest.mark.parametrize(
    ("which", "field", "where"), [(which, *about) for which, fields in TEXTS.items() for about in fields.items()]
)
def test_numbers_as_text_are_named_as_that(make_document, which, field, where):
    content = make_document()
    entry = content[which][0]
    entry[field] = str(entry.get(field, {"area": 200, "iscrowd": 0}.get(field)))
    told = [problem.message for problem in find_problems(content)]
    assert f"{where}, which is a text; write the number without quotation marks" in told


def test_texts_in_a_box_and_numbers_for_a_name_are_named_as_that(make_document):
    content = make_document()
    content["annotations"][0]["bbox"] = ["1", "2", "3", "4.5"]
    content["images"][0]["file_name"] = 17
    content["categories"][0]["name"] = 3
    told = [problem.message for problem in find_problems(content)]
    assert any("but texts: write them without quotation marks" in message for message in told)
    assert "image 11 has file_name 17, which is no text; give the file's name" in told
    assert "category 7 has name 3, which is no text; give it a text" in told


def test_null_for_area_and_crowd_is_nothing_given(make_document, make_folder):
    content = make_document()
    content["annotations"][0].update(area=None, iscrowd=None)
    entry = FolderDataset(read_split(make_folder(content), "train"), Unresized()).records.coco_dict()["annotations"][0]
    assert (entry["area"], entry["iscrowd"]) == (200, 0)


def test_shapes_is_the_built_in_data_and_a_folder_of_that_name_is_told_of(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shapes_or_folder("shapes") == []
    (tmp_path / "shapes").mkdir()
    (said,) = shapes_or_folder("shapes")
    assert "built-in shapes, not the folder of that name" in said and "--data ./shapes" in said
    assert shapes_or_folder("./shapes") == []
