"""COCO-format folders: what is read, what is dropped, and what is said about broken ones."""

import copy
import json
import re
import shutil

import numpy as np
import pytest
import torch
from splits import read_split
from whole_documents import find_problems

from dndetr.data.errors import DataError
from dndetr.data.folder_dataset import FolderDataset
from dndetr.data.sample import IMAGENET, Sample
from dndetr.data.transforms import FixedTraining, Unresized


def test_gapped_ids_become_labels_in_order_of_id(make_document, make_folder):
    content = make_document(boxes=((5, 6, 20, 10), (1, 2, 3, 4)), categories=((2**40, "cat"), (3, "dog")))
    content["annotations"][0]["id"] = 2**52
    dataset = FolderDataset(read_split(make_folder(content), "train"), Unresized())
    assert dataset.classes == [(3, "dog"), (2**40, "cat")]
    sample = dataset[0]
    assert sample.labels.tolist() == [1, 0] and sample.labels.dtype == torch.int64
    assert sample.boxes_xyxy.tolist() == [[5, 6, 25, 16], [1, 2, 4, 6]]
    assert (sample.image_id, sample.original_size, sample.pixels.shape) == (11, (40, 60), (40, 60, 3))


def test_crowds_and_empty_boxes_are_dropped_and_the_rest_is_clipped(make_document, make_folder):
    boxes = ((-5, -5, 20, 20), (50, 30, 40, 40), (5, 5, 0, 0), (5, 5, 3, 0), (70, 5, 5, 5), (1, 1, 2, 2))
    content = make_document(images=((40, 60),), boxes=boxes)
    content["annotations"][-1]["iscrowd"] = 1
    sample = FolderDataset(read_split(make_folder(content), "train"), Unresized())[0]
    assert sample.boxes_xyxy.tolist() == [[0, 0, 15, 15], [50, 30, 60, 40]]
    assert sample.labels.tolist() == [1, 0]


def test_ground_truth_is_the_json_and_only_what_it_lacks_is_added(make_document, make_folder):
    content = make_document(boxes=((5, 6, 20, 10), (5, 5, 0, 0)))
    content["annotations"][0].update(area=17.5, iscrowd=1)
    truth = FolderDataset(read_split(make_folder(content), "train"), Unresized()).records.coco_dict()
    assert truth["annotations"][0] == content["annotations"][0]
    assert (truth["annotations"][1]["area"], truth["annotations"][1]["iscrowd"]) == (0, 0)
    assert truth["images"] == content["images"]
    assert truth["categories"] == sorted(content["categories"], key=lambda category: category["id"])


@pytest.mark.parametrize(
    ("asked", "layout"),
    [
        ("train", "annotations/instances_train.json train"),
        ("train", "annotations/instances_train2017.json train2017"),
        ("val", "annotations/instances_val2017.json val2017"),
        ("val", "valid/_annotations.coco.json valid"),
        ("test", "test/_annotations.coco.json test"),
        ("night", "annotations/instances_night.json night"),
    ],
)
def test_splits_are_found(tmp_path, make_document, asked, layout):
    path, images = layout.split()
    for folder in ("annotations", images):
        (tmp_path / folder).mkdir()
    (tmp_path / path).write_text(json.dumps(make_document()))
    read = read_split(tmp_path, asked)
    assert (read.name, read.file, read.folder) == (asked, tmp_path / path, tmp_path / images)


def test_the_folder_within_an_unpacked_archive_is_named(make_document, make_folder, tmp_path):
    make_folder(make_document()).rename(tmp_path / "my set")
    (tmp_path / "archive" / "export").mkdir(parents=True)
    (tmp_path / "archive" / "__MACOSX").mkdir()
    (tmp_path / "my set").rename(tmp_path / "archive" / "export" / "my set")
    for given in ("archive", "archive/export"):
        with pytest.raises(DataError, match=rf"{given}: no annotations here; give the folder within, .*export/my set$"):
            read_split(tmp_path / given, "train")
    (tmp_path / "archive" / "another").mkdir()
    with pytest.raises(DataError, match=r"archive: no annotations here; a COCO-format folder"):
        read_split(tmp_path / "archive", "train")


def test_missing_parts_of_a_folder_are_named(tmp_path, make_document, make_folder):
    with pytest.raises(DataError, match=r"nowhere: no such folder"):
        read_split(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match=r"no annotations here.*annotations/instances_train.json.*dndetr.shapes"):
        read_split(tmp_path, "train")
    root = make_folder(make_document())
    with pytest.raises(DataError, match=r"instances_train.json: is no data set; give the folder of one"):
        read_split(root / "annotations" / "instances_train.json", "train")
    with pytest.raises(DataError, match=r"no 'val' split; looked for .*val2017.json.*; there is .*train.json"):
        read_split(root, "val")
    (root / "train" / "1.png").unlink()
    with pytest.raises(DataError, match=r"instances_train.json: image 12: .*train/1.png is missing; put it there"):
        FolderDataset(read_split(root, "train"), Unresized())
    shutil.rmtree(root / "train")
    with pytest.raises(DataError, match=r"image folder .*train is missing"):
        read_split(root, "train")


def _set(key, value, which="annotations"):
    def change(content):
        content[which][0][key] = value

    return change


def _drop(key, which="annotations"):
    return lambda content: content[which][0].pop(key)


def _twice(which):
    return lambda content: content[which].append(copy.deepcopy(content[which][0]))


BROKEN = {
    "unknown-category": (_set("category_id", 5), "unknown category", r"annotation 100 has category_id 5"),
    "unknown-image": (_set("image_id", 999), "unknown image", r"annotation 100 has image_id 999"),
    "no-bbox": (_drop("bbox"), "box", r"annotation 100 \(image 11\) has no bbox"),
    "three-numbers": (_set("bbox", [1, 2, 3]), "box", r"annotation 100 .*\[1, 2, 3\], not four numbers"),
    "text-in-bbox": (_set("bbox", [1, 2, 3, "4"]), "box", r"annotation 100 .*not four numbers"),
    "nan": (_set("bbox", [1, 2, float("nan"), 4]), "box", r"annotation 100 .*not finite"),
    "negative-size": (_set("bbox", [10, 10, -4, 5]), "box", r"annotation 100 .*negative size"),
    "image-twice": (_twice("images"), "image id", r"image id 11 is there twice"),
    "annotation-twice": (_twice("annotations"), "annotation id", r"annotation id 100 is there twice"),
    "category-twice": (_twice("categories"), "category id", r"category id 7 is there twice"),
    "no-annotation-id": (_drop("id"), "annotation id", r"annotation number 0 .*None"),
    "text-id": (_set("id", "11", "images"), "image id", r"image number 0 .*'11'"),
    "no-width": (_drop("width", "images"), "image size", r"image 11 has width None"),
    "zero-height": (_set("height", 0, "images"), "image size", r"image 11 has height 0"),
    "no-file-name": (_drop("file_name", "images"), "image file name", r"image 11 has no file_name"),
    "no-category-name": (_drop("name", "categories"), "category name", r"category 7 has no name"),
}


@pytest.mark.parametrize(("change", "kind", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_entries_are_named(make_document, make_folder, change, kind, message):
    content = make_document()
    root = make_folder(content)
    assert list(find_problems(content)) == []
    change(content)
    problems = list(find_problems(content))
    assert any(problem.kind == kind and re.match(message, problem.message) for problem in problems)
    (root / "annotations" / "instances_train.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"instances_train.json: {re.escape(problems[0].message)}"):
        FolderDataset(read_split(root, "train"), Unresized())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [', "not valid JSON.*line 1"),
        ("[]", "top level"),
        ('{"images": [], "annotations": []}', "no list 'categories'"),
        ('{"images": [], "annotations": [], "categories": []}', "list of images is empty"),
        ('{"images": [1], "annotations": [], "categories": []}', "every entry of 'images' must be an object"),
    ],
)
def test_broken_files_are_named(make_document, make_folder, text, message):
    root = make_folder(make_document())
    (root / "annotations" / "instances_train.json").write_text(text)
    with pytest.raises(DataError, match=f"instances_train.json: .*{message}"):
        FolderDataset(read_split(root, "train"), Unresized())


def test_validation_must_use_the_classes_of_training(make_document, make_folder):
    root = make_folder(make_document())
    make_folder(make_document(categories=((7, "cat"),)), "val")
    training = FolderDataset(read_split(root, "train"), Unresized())
    assert FolderDataset(read_split(root, "val"), Unresized(), training.classes)[0].labels.tolist() == [1]
    make_folder(make_document(categories=((7, "cat"), (9, "cow"))), "val")
    with pytest.raises(DataError, match=r"instances_val.json: category 9 \('cow'\) is not among the classes of train"):
        FolderDataset(read_split(root, "val"), Unresized(), training.classes)
    make_folder(make_document(categories=((7, "dog"), (3, "cat"))), "val")
    with pytest.raises(DataError, match=r"category 3 is 'cat' here and 'dog' in training"):
        FolderDataset(read_split(root, "val"), Unresized(), training.classes)


def same_image(a: Sample, b: Sample) -> bool:
    return np.array_equal(a.pixels, b.pixels) and torch.equal(a.colours, b.colours)


def test_a_sample_depends_on_seed_epoch_and_index_alone(make_document, make_folder):
    root = make_folder(make_document())
    transform = FixedTraining(canvas=(24, 32))
    first, again, other = (FolderDataset(read_split(root, "train"), transform, seed=seed) for seed in (1, 1, 2))
    wanted = first.sample(1, epoch=3)
    for _ in range(2):
        again.sample(0, epoch=3)
        assert same_image(again.sample(1, epoch=3), wanted)
    for different in (first.sample(1, 4), first.sample(0, 3), other.sample(1, 3)):
        assert not same_image(different, wanted)


def test_kept_and_reread_pictures_are_the_same(make_document, make_folder):
    root = make_folder(make_document())
    kept, reread = (FolderDataset(read_split(root, "train"), Unresized(), cache_bytes=n) for n in (1 << 30, 0))
    for _ in range(2):
        assert same_image(kept[0], reread[0])
    assert kept.picture(0) is kept.picture(0)
    assert reread.picture(0) is not reread.picture(0)


@pytest.mark.parametrize(
    ("name", "split", "images", "objects", "classes"),
    [("bccd", "train", 205, 2804, 3), ("bccd", "val", 87, 1137, 3), ("coco_tiny", "train", 59, 577, 80)],
)
def test_real_data(real_data, name, split, images, objects, classes):
    dataset = FolderDataset(read_split(real_data(name), split), Unresized())
    assert (len(dataset), sum(dataset.counts), len(dataset.classes)) == (images, objects, classes)
    truth, document = dataset.records.coco_dict(), json.loads(dataset.records.file.read_text())
    position = {number: place for place, number in enumerate(dataset.ids)}
    objects = sorted(document["annotations"], key=lambda entry: position[entry["image_id"]])
    for made, written in zip(truth["annotations"], objects, strict=True):
        assert made == {key: written[key] for key in made}
    assert [entry["id"] for entry in truth["images"]] == [entry["id"] for entry in document["images"]]
    for index in range(0, images, 20):
        sample = dataset[index]
        height, width = sample.original_size
        assert sample.pixels.shape == (height, width, 3) and sample.pixels.dtype == np.uint8
        assert torch.equal(sample.colours, IMAGENET)
        assert (sample.boxes_xyxy >= 0).all()
        assert (sample.boxes_xyxy <= torch.tensor([width, height, width, height])).all()


def test_real_samples_hold_every_annotation_but_the_crowds(real_data):
    dataset = FolderDataset(read_split(real_data("coco_tiny"), "train"), Unresized())
    wanted = [a for a in dataset.records.coco_dict()["annotations"] if not a["iscrowd"]]
    for index, image_id in enumerate(dataset.ids):
        sample = dataset.sample(index)
        mine = [a for a in wanted if a["image_id"] == image_id]
        assert [dataset.classes[label][0] for label in sample.labels.tolist()] == [a["category_id"] for a in mine]
        boxes = np.array([a["bbox"] for a in mine]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        assert np.abs(boxes - sample.boxes_xyxy.numpy()).max(initial=0) < 0.02
