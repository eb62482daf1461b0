"""YOLO folders as they are written: other programs read them, and what was in a set comes back."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from coco_folders import BOXES, document, tree, write_set, write_small
from hypothesis import given, settings
from hypothesis import strategies as st
from splits import read_split

from dndetr.data.conversion import convert
from dndetr.data.records import Records
from dndetr.data.source import open_source

ODD = ["yes", "no", "1", "1.0", "null", "~", "#x", "'q'", '"', "猫", "😀", "{x}", "[", "!t", "%"]
ODD += ["a: b", "- a", "a\u2028b"]


@pytest.fixture
def small(tmp_path) -> Path:
    return write_small(tmp_path / "set")


def converted(data: Path, folder: Path, format: str = "yolo", images: str = "copy") -> list[str]:
    return convert(open_source(data), folder, format, images=images)


def yolo_rows(root: Path, image: str) -> list[list[float]]:
    text = (root / "labels" / image).with_suffix(".txt").read_text()
    return [[float(number) for number in row.split()] for row in text.splitlines()]


def assert_same(before: Records, after: Records, slack: float = 1e-9) -> None:
    """The same images in the same order, with the same objects, but for those of crowds."""
    assert [os.path.basename(name) for name in after.names] == [os.path.basename(name) for name in before.names]
    assert after.sizes.tolist() == before.sizes.tolist()
    assert [name for _, name in after.classes] == [name for _, name in before.classes]
    objects = before.objects.where(~before.objects.crowd)
    assert after.objects.image.tolist() == objects.image.tolist()
    assert after.objects.label.tolist() == objects.label.tolist()
    assert np.abs(after.objects.boxes - objects.boxes).max(initial=0) <= slack


def test_yolo_as_other_programs_read_it(small, tmp_path):
    out = tmp_path / "out"
    told = converted(small, out)
    description = yaml.safe_load((out / "data.yaml").read_text())
    names = {0: "dog", 1: "cat"}
    assert description == {"train": "train.txt", "val": "images/val", "nc": 2, "names": names}
    files = ["images/train/img10.png", "images/train/deep/img2.png", "images/train/img1.png"]
    assert (out / "train.txt").read_text().splitlines() == [f"./{file}" for file in files]
    assert sorted(tree(out)) == sorted(
        ["data.yaml", "train.txt", *files, "images/val/a.png", "images/val/b.png"]
        + [f"labels/{name}.txt" for name in ("train/img10", "train/deep/img2", "train/img1", "val/a", "val/b")]
    )
    assert yolo_rows(out, "train/deep/img2.png") == [] == yolo_rows(out, "val/a.png")
    boxes = {"img10.png": BOXES[::2], "img1.png": BOXES[1::2]}
    for label, (image, expected) in enumerate(boxes.items()):
        rows = yolo_rows(out, f"train/{image}")
        assert [row[0] for row in rows] == [label] * len(rows)
        for (_, cx, cy, w, h), box in zip(rows, expected, strict=True):
            found = np.array([(cx - w / 2) * 64, (cy - h / 2) * 48, w * 64, h * 48])
            if box[0] == 60:  # its centre is below the image
                box = [60, 40, 4, 8]
            assert np.abs(found - box).max() < 1e-12 * 64 and min(cx, cy, w, h) >= 0 and max(cx, cy, w, h) <= 1
    assert "train: 1 box clipped to the image, for the centre or a side is beyond it" in told


def test_there_and_back(small, tmp_path):
    shutil.copytree(small, tmp_path / "clipped")
    changed = document(small)
    changed["annotations"][4]["bbox"] = [60, 40, 4, 8]
    (tmp_path / "clipped" / "annotations" / "instances_train.json").write_text(json.dumps(changed))
    converted(small, tmp_path / "yolo")
    converted(tmp_path / "yolo", tmp_path / "coco", "coco")
    converted(tmp_path / "yolo/data.yaml", tmp_path / "again")
    assert tree(tmp_path / "again") == tree(tmp_path / "yolo")
    assert document(tmp_path / "coco")["images"][1]["file_name"] == "deep/img2.png"
    for split in ("train", "val"):
        assert_same(read_split(tmp_path / "clipped", split), read_split(tmp_path / "coco", split))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_boxes_come_back_as_they_were(tmp_path_factory, data):
    width, height = data.draw(st.tuples(st.integers(1, 1200), st.integers(1, 900)))
    digits = data.draw(st.integers(0, 3))

    def span(side):
        ends = st.floats(0, side) if data.draw(st.booleans()) else st.integers(0, side * 10**digits)
        low, high = sorted(data.draw(ends) for _ in range(2))
        exact = isinstance(low, int)
        return (low / 10**digits, (high - low) / 10**digits, True) if exact else (low, high - low, False)

    spans = [(span(width), span(height)) for _ in range(5)]
    boxes = [[x, y, w, h] for (x, w, _), (y, h, _) in spans]
    folder = tmp_path_factory.mktemp("boxes")
    write_set(folder / "set", ["a.png"], [(0, 3, box, {}) for box in boxes], size=(height, width))
    converted(folder / "set", folder / "out")
    found = read_split(folder / "out", "train").objects.boxes
    assert np.abs(found - boxes).max() < 1e-9
    for (horizontal, vertical), box, back in zip(spans, boxes, found.tolist(), strict=True):
        assert not horizontal[2] or box[::2] == back[::2]
        assert not vertical[2] or box[1::2] == back[1::2]


def test_any_name_of_a_class_is_read(tmp_path):
    classes = list(enumerate(ODD, start=5))
    root = write_set(tmp_path / "set", ["a.png"], [(0, number, [1, 2, 3, 4], {}) for number, _ in classes], classes)
    converted(root, tmp_path / "out")
    text = (tmp_path / "out" / "data.yaml").read_text()
    assert yaml.safe_load(text)["names"] == dict(enumerate(ODD)) and "猫" in text
    assert read_split(tmp_path / "out", "train").classes == list(enumerate(ODD))


def test_classes_of_one_name_are_told_apart(tmp_path):
    root = write_set(tmp_path / "set", ["a.png"], [(0, 4, [1, 2, 3, 4], {})], [(2, "x"), (4, "x"), (9, "")])
    told = converted(root, tmp_path / "out")
    assert yaml.safe_load((tmp_path / "out/data.yaml").read_text())["names"] == {
        0: "x (id 2)",
        1: "x (id 4)",
        2: "(id 9)",
    }
    assert "class 4 'x' is called 'x (id 4)', since names tell classes apart" in told and len(told) == 4


def test_what_yolo_cannot_hold_is_told(tmp_path):
    boxes = [[0, 0, 64, 48], [-1, 0, 66, 48], [70, 5, 5, 5], [5, 5, 0, 3], [1, 2, 3, 4]]
    objects = [(0, 3, box, {"iscrowd": int(place == 4)}) for place, box in enumerate(boxes)]
    root = write_set(tmp_path / "set", ["a.png"], objects)
    told = converted(root, tmp_path / "out")
    assert told == [
        "train: 1 images, 5 objects of 2 classes",
        "train: 1 crowd region left out, since YOLO has none",
        "train: 1 box outside the image left out",
        "train: 1 box clipped to the image, for the centre or a side is beyond it",
    ]
    found = read_split(tmp_path / "out", "train").objects.boxes.tolist()
    assert found == [[0, 0, 64, 48], [0, 0, 64, 48], [5, 5, 0, 3]]


def test_images_that_would_share_labels_get_names_of_their_own(tmp_path):
    names = ["a.png", "a.jpg", "a-2.jpg", "b/a.png", "a.bmp"]
    objects = [(place, 3, [place, 1, 5, 5], {}) for place in range(5)]
    root = write_set(tmp_path / "set", names, objects)
    told = converted(root, tmp_path / "out")
    assert (
        told[1] == "train: 2 images renamed, since labels belong to names without endings; the first: a.jpg is a-3.jpg"
    )
    listed = [row.removeprefix("./images/train/") for row in (tmp_path / "out/train.txt").read_text().splitlines()]
    assert listed == ["a.png", "a-3.jpg", "a-2.jpg", "b/a.png", "a-4.bmp"]
    after = read_split(tmp_path / "out", "train")
    assert after.objects.boxes[:, 0].tolist() == [0, 1, 2, 3, 4] and after.remarks == []
    for index, name in enumerate(names):
        assert after.path(index).read_bytes() == (root / "train" / name).read_bytes()


def test_two_entries_of_one_file(tmp_path):
    root = write_set(tmp_path / "set", ["a.png", "a.png"], [(0, 3, [1, 1, 5, 5], {}), (1, 3, [2, 2, 5, 5], {})])
    converted(root, tmp_path / "coco", "coco", "link")
    assert document(tmp_path / "coco") == document(root)
    converted(root, tmp_path / "yolo")
    assert read_split(tmp_path / "yolo", "train").objects.image.tolist() == [0, 1]


def test_folders_of_images_inside_images(tmp_path):
    names = ["left/images/a.png", "right/images/a.png"]
    root = write_set(tmp_path / "set", names, [(0, 3, [1, 1, 5, 5], {}), (1, 7, [2, 2, 5, 5], {})])
    converted(root, tmp_path / "out")
    assert (tmp_path / "out/images/train/left/labels/a.txt").read_text().startswith("0 ")
    assert_same(read_split(root, "train"), read_split(tmp_path / "out", "train"))


def test_both_formats_are_divided_alike(tmp_path):
    names = [f"{place % 3}/img{place}.png" for place in range(30)]
    objects = [(place, (3, 7)[place % 2], [1, 1, 5, 5], {"iscrowd": int(place > 20)}) for place in range(25)]
    converted(write_set(tmp_path / "coco", names, objects), tmp_path / "yolo")
    sides = [open_source(tmp_path / kind, 0.2).read("val").names for kind in ("coco", "yolo")]
    assert [f"images/train/{name}" for name in sides[0]] == sides[1] and len(sides[0]) == 6


@pytest.mark.parametrize("name", ["bccd", "coco_tiny"])
def test_real_data_there_and_back(name, real_data, tmp_path):
    root = real_data(name)
    for source, target, kind in ((root, "yolo", "yolo"), (tmp_path / "yolo", "coco", "coco")):
        converted(source, tmp_path / target, kind, "link")
    for split in ("train", "val"):
        before, after = read_split(root, split), read_split(tmp_path / "coco", split)
        assert_same(before, after)
        assert after.names == before.names and len(before) > 50
