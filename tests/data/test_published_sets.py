"""LVIS and Objects365 as they are unpacked: files and images are found wherever people put them."""

import json
import shutil

import numpy as np
import pytest
from lvis_folders import change, write_lvis
from PIL import Image
from splits import read_split

from dndetr.data.errors import DataError
from dndetr.data.folder_dataset import FolderDataset
from dndetr.data.source import open_source
from dndetr.data.transforms import Unresized


def everything_is_there(root, split="train"):
    dataset = FolderDataset(read_split(root, split), Unresized())
    return [dataset.sample(index).image_id for index in range(len(dataset))]


def test_lvis(tmp_path):
    root = write_lvis(tmp_path / "lvis", 5)
    source = open_source(root)
    assert source.splits == ("train", "val") and source.about == "COCO, annotations/lvis_v1_train.json"
    records = source.read("train")
    assert records.names[:4] == [f"{'val' if n == 3 else 'train'}2017/{5000 + n:012}.jpg" for n in range(4)]
    assert everything_is_there(root) == [5000, 5001, 5002, 5003, 5004]
    assert everything_is_there(root, "val") == [3000, 3001, 3002, 3003]


def move_into(folder):
    def move(root):
        for place in ("train2017", "val2017"):
            (root / folder).mkdir(parents=True, exist_ok=True)
            shutil.move(root / place, root / folder / place)

    return move


def all_in(folder):
    def move(root):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for place in ("train2017", "val2017"):
            for file in (root / place).iterdir():
                shutil.move(file, root / folder / file.name)
            (root / place).rmdir()

    return move


def at_the_top(root):
    for split in ("train", "val"):
        shutil.move(root / "annotations" / f"lvis_v1_{split}.json", root / f"lvis_v1_{split}.json")
    (root / "annotations").rmdir()


@pytest.mark.parametrize("change", [move_into("images"), all_in("images"), at_the_top], ids=["inner", "flat", "top"])
def test_other_places_of_lvis(tmp_path, change):
    root = write_lvis(tmp_path / "lvis", 5)
    change(root)
    assert open_source(root).splits == ("train", "val")
    assert len(everything_is_there(root)) == 5 and len(everything_is_there(root, "val")) == 4


def test_addresses_alone_do_in_any_coco_file(tmp_path):
    root = write_lvis(tmp_path / "lvis", 5)
    all_in("train")(root)
    shutil.move(root / "annotations/lvis_v1_train.json", root / "annotations/instances_train.json")
    assert len(everything_is_there(root)) == 5


def test_files_of_coco_come_first(tmp_path):
    root = write_lvis(tmp_path / "lvis", 5)
    content = json.loads((root / "annotations/lvis_v1_train.json").read_text())
    images = [image | {"file_name": image["coco_url"].rpartition("/")[2]} for image in content["images"][:3]]
    content |= {"images": images, "annotations": content["annotations"][:2]}
    (root / "annotations/instances_train2017.json").write_text(json.dumps(content))
    assert everything_is_there(root) == [5000, 5001, 5002]


def test_an_image_that_is_nowhere_is_named_by_its_path(tmp_path):
    root = write_lvis(tmp_path / "lvis", 5)
    (root / "train2017" / "000000005001.jpg").unlink()
    with pytest.raises(DataError, match=r"image 5001: .*/train2017/000000005001.jpg is missing"):
        everything_is_there(root)


@pytest.mark.parametrize(
    ("address", "what"),
    [
        (None, "has no file_name; give the file's name"),
        (7, "has no file_name; give the file's name"),
        ("http://images.cocodataset.org", "has no file_name; give the file's name"),
        ("http://host/a/../b.jpg", "which leads out of the image folder"),
        ("http://host/a/%00.jpg", "which is no text; give the file's name"),
    ],
)
def test_addresses_that_name_no_file(tmp_path, address, what):
    root = write_lvis(tmp_path / "lvis", 5)
    change(root, lambda document: document["images"][0].update(coco_url=address))
    with pytest.raises(DataError, match=rf"lvis_v1_train.json: image 5000 .*({what})"):
        everything_is_there(root)


NAMES = ("images/v1/patch8/objects365_v1_00420917.jpg", "images/v2/patch16/objects365_v2_00900003.jpg")


def write_objects365(root, place, file="annotations/zhiyuan_objv2_{}.json"):
    """Two images; place: their path as of (split, whole name, patch, file)."""
    for split in ("train", "val"):
        images = [{"id": 5 + n, "file_name": name, "height": 8, "width": 9} for n, name in enumerate(NAMES)]
        objects = [{"id": n, "image_id": 5 + n, "category_id": 1, "bbox": [1, 1, 5, 5], "isfake": 0} for n in (0, 1)]
        categories = [{"id": 1, "name": "Person"}]
        path = root / file.format(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"images": images, "annotations": objects, "categories": categories}))
        for name in NAMES:
            path = root / place.format(split=split, whole=name, patch=name.split("/")[2], name=name.rpartition("/")[2])
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(path)
    return root


@pytest.mark.parametrize(
    "place",
    [
        "{split}/{patch}/{name}",
        "images/{split}/{patch}/{name}",
        "images/{patch}/{name}",
        "{patch}/{name}",
        "{whole}",
        "{split}/{whole}",
        "{split}/{name}",
        "images/{name}",
    ],
)
def test_objects365(tmp_path, place):
    root = write_objects365(tmp_path / "objects", place)
    source = open_source(root)
    assert source.splits == ("train", "val") and source.about == "COCO, annotations/zhiyuan_objv2_train.json"
    for split in source.splits:
        assert everything_is_there(root, split) == [5, 6]
        assert source.read(split).verified is None
        expected = [
            place.format(split=split, whole=name, patch=name.split("/")[2], name=name.rpartition("/")[2])
            for name in NAMES
        ]
        assert source.read(split).names == expected


def test_objects365_under_other_names(tmp_path):
    root = write_objects365(tmp_path / "a", "{split}/{patch}/{name}", "annotations/instances_{}.json")
    assert everything_is_there(root) == [5, 6]
    root = write_objects365(tmp_path / "b", "{split}/{patch}/{name}", "zhiyuan_objv2_{}.json")
    assert everything_is_there(root, "val") == [5, 6]


def test_other_names_are_left_as_they_are(tmp_path, make_document):
    content = make_document()
    content["images"][0] |= {"file_name": "deep/0.png", "coco_url": "http://host/train/0.png"}
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train").mkdir()
    (tmp_path / "annotations" / "instances_train.json").write_text(json.dumps(content))
    for name, size in (("0.png", (60, 40)), ("1.png", (30, 50))):
        Image.new("RGB", size).save(tmp_path / "train" / name)
    with pytest.raises(DataError, match=r"train/deep/0.png is missing, but there is '0.png'"):
        everything_is_there(tmp_path)
