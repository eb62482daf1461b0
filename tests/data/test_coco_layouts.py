"""Where tools put COCO annotations and their images, and what they write there."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from splits import read_split

from dndetr.data.errors import DataError
from dndetr.data.folder_dataset import FolderDataset
from dndetr.data.source import open_source
from dndetr.data.transforms import Unresized


def put(folder, content, file, images="images"):
    """Writes a document, and its pictures below a folder by the last parts of their names."""
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / images).mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(json.dumps(content))
    for image in content["images"]:
        pixels = np.zeros((image["height"], image["width"], 3), np.uint8)
        Image.fromarray(pixels).save(folder / images / image["file_name"].replace("\\", "/").rpartition("/")[2])


LAYOUTS = {
    "ours": ("annotations/instances_{}.json", "{}"),
    "images-by-split": ("annotations/instances_{}.json", "images/{}"),
    "one-image-folder": ("annotations/instances_{}.json", "images"),
    "short-names": ("annotations/{}.json", "images/{}"),
    "at-the-top": ("{}.json", "images"),
    "roboflow": ("{}/_annotations.coco.json", "{}"),
}


@pytest.mark.parametrize(
    "names", [("train", "val"), ("train2017", "val2017"), ("train", "valid"), ("Train", "Validation")]
)
@pytest.mark.parametrize(("file", "images"), LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(tmp_path, make_document, file, images, names):
    content = make_document()
    for name in names:
        put(tmp_path, content, file.format(name), images.format(name))
    source = open_source(tmp_path)
    assert source.splits == ("train", "val") and source.about.startswith("COCO, ")
    for split, name in zip(("train", "val"), names, strict=True):
        records = source.read(split)
        assert records.file == tmp_path / file.format(name) and records.folder == tmp_path / images.format(name)
        assert FolderDataset(records, Unresized())[0].image_id == 11


@pytest.mark.parametrize("images", ["images", "images/default"])
def test_a_set_that_nobody_has_divided(tmp_path, make_document, images):
    put(tmp_path, make_document(), "annotations/instances_default.json", images)
    source = open_source(tmp_path)
    assert source.about == "COCO of CVAT, annotations/instances_default.json" and source.splits == ("train",)
    assert FolderDataset(source.read("train"), Unresized()).counts == [1, 1]
    with pytest.raises(DataError, match=r"no 'val' split; .*instances_default.json; .* give --val-share 0.2"):
        source.read("val")


LABEL_STUDIO = {
    "within": "images/{}",
    "bare": "{}",
    "windows": "images\\{}",
    "of-the-server": "..\\..\\label-studio\\data\\media\\upload\\1\\{}",
    "local-files": "data/local-files/?d=some/where/{}",
    "upload": "/data/upload/3/{}",
    "quoted": "/data/local-files/?d=some%5Cwhere%5C{}",
    "address": "http://localhost:8080/data/upload/3/{}",
}


@pytest.mark.parametrize("form", LABEL_STUDIO.values(), ids=LABEL_STUDIO)
def test_file_names_of_label_studio(tmp_path, make_document, form):
    content = make_document()
    put(tmp_path, content, "result.json")
    for image in content["images"]:
        image["file_name"] = form.format(image["file_name"])
    (tmp_path / "result.json").write_text(json.dumps(content))
    source = open_source(tmp_path)
    assert source.about == "COCO of Label Studio, result.json"
    assert source.read("train").names == ["images/0.png", "images/1.png"]
    assert FolderDataset(source.read("train"), Unresized())[1].original_size == (50, 30)
    (tmp_path / "images" / "1.png").unlink()
    with pytest.raises(DataError, match=r"result.json: image 12: .*/images/1.png is missing"):
        FolderDataset(source.read("train"), Unresized())


def test_two_images_of_label_studio_in_one_file(tmp_path, make_document):
    content = make_document()
    put(tmp_path, content, "result.json")
    for folder, image in zip("ab", content["images"], strict=True):
        image["file_name"] = f"{folder}/0.png"
    (tmp_path / "result.json").write_text(json.dumps(content))
    (problem,) = read_split(tmp_path, "train").problems
    assert problem.message.startswith("images 11 and 12 are both images/0.png, since files of one name overwrote each")


def roboflow(make_document, root=0, **more):
    content = make_document(categories=((1, "red"), (2, "white")))
    for category in content["categories"]:
        category["supercategory"] = "cells"
    content["categories"].insert(0, {"id": root, "name": "cells", "supercategory": "none"} | more)
    return content


def test_the_root_category_of_roboflow_is_left_out_and_said(tmp_path, make_document):
    for split in ("train", "valid"):
        put(tmp_path, roboflow(make_document), f"{split}/_annotations.coco.json", split)
    for split in ("train", "val"):
        records = read_split(tmp_path, split)
        assert records.classes == [(1, "red"), (2, "white")]
        assert records.remarks == ["category cells left out: it names the others and has no objects"]
        assert FolderDataset(records, Unresized()).remarks == records.remarks


def test_a_category_with_objects_or_without_others_stays(tmp_path, make_document):
    content = roboflow(make_document)
    content["annotations"][0]["category_id"] = 0
    put(tmp_path, content, "train/_annotations.coco.json", "train")
    assert [name for _, name in read_split(tmp_path, "train").classes] == ["cells", "red", "white"]
    content = make_document(categories=((1, "person"), (2, "dog"), (3, "cat")))
    for category, group in zip(content["categories"], ("person", "animal", "animal"), strict=True):
        category["supercategory"] = group
    content["annotations"] = content["annotations"][:0]
    put(tmp_path, content, "train/_annotations.coco.json", "train")
    assert len(read_split(tmp_path, "train").classes) == 3


def test_coco_is_read_where_there_is_a_data_yaml_too(tmp_path, make_document, make_folder):
    root = make_folder(make_document())
    shutil.copytree(root, tmp_path / "both")
    (tmp_path / "both" / "data.yaml").write_text("train: train\nnames: [a]\n")
    assert open_source(tmp_path / "both").about == "COCO, annotations/instances_train.json"
