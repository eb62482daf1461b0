"""Every way in which a data set can be broken, through the train command: one plain line, and nothing left behind."""

import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from broken_sets import FLAGS, assert_check_lists, assert_training_stops, cut, train
from PIL import Image


def write_set(root: Path) -> Path:
    """Four training and two validation images, one of each kind JPEG; ids with gaps, the last image without objects."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        (root / split).mkdir(parents=True)
        images, annotations = [], []
        for i in range(count):
            name = f"{i}.{'jpg' if i % 2 else 'png'}"
            Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(root / split / name)
            images.append({"id": 2**40 + 7 * i, "file_name": name, "height": 48, "width": 64})
            for box in [[5.5, 6, 20, 10], [30, 20, 10.25, 12]] if i < 3 else []:
                entry = {"id": 500 + len(annotations), "image_id": 2**40 + 7 * i, "bbox": box, "iscrowd": 0}
                annotations.append(entry | {"category_id": 3 + 4 * (len(annotations) % 2), "area": box[2] * box[3]})
        categories = [{"id": 3, "name": "dog"}, {"id": 7, "name": "cat"}]
        document = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))
    return root


@pytest.fixture(scope="module")
def good_set(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("good") / "set")


def change(edit, split="train"):
    """Edits the JSON of a split: ``edit(document)``."""

    def apply(root: Path):
        path = root / "annotations" / f"instances_{split}.json"
        document = json.loads(path.read_text())
        edit(document)
        path.write_text(json.dumps(document))

    return apply


def put(key, value, which="annotations", split="train"):
    return change(lambda document: document[which][0].__setitem__(key, value), split)


def repeat(which, **fields):
    return change(lambda document: document[which].append(document[which][0] | fields))


def damage(name: str):
    """Bytes in the middle of the compressed pixels, so that both ends of the file are as they should be."""

    def apply(root: Path):
        content = bytearray((root / name).read_bytes())
        middle = len(content) // 2
        content[middle : middle + 200] = bytes(200)
        (root / name).write_bytes(content)

    return apply


def bomb(root: Path):
    """A PNG header that claims ten thousand million pixels."""
    content = bytearray((root / "train/0.png").read_bytes())
    content[16:24] = struct.pack(">II", 100_000, 100_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (root / "train/0.png").write_bytes(content)


def texture(root: Path):
    """A texture of a game, in a way of packing that there is not: its plugin has an error of its own for that."""
    Image.new("P", (64, 48)).save(root / "train/0.png", format="BLP")
    content = bytearray((root / "train/0.png").read_bytes())
    content[4:8] = struct.pack("<i", 9)
    (root / "train/0.png").write_bytes(content)


def pipe(root: Path):
    """Whoever opens it waits for another program."""
    (root / "train/0.png").unlink()
    os.mkfifo(root / "train/0.png")


FIRST = 2**40
BROKEN = {
    "missing-image": (lambda r: (r / "train/1.jpg").unlink(), f"image {FIRST + 7}: ", "train/1.jpg is missing"),
    "missing-val-image": (lambda r: (r / "val/1.jpg").unlink(), f"image {FIRST + 7}: ", "val/1.jpg is missing"),
    "truncated-jpeg": (cut("train/1.jpg", 0.5), f"image {FIRST + 7}: ", "train/1.jpg: the file is cut off"),
    "no-end-of-jpeg": (cut("train/1.jpg", 0.999), f"image {FIRST + 7}: ", "train/1.jpg: the file is cut off"),
    "truncated-png": (cut("val/0.png", 0.9), f"image {FIRST}: ", "val/0.png: the file is cut off"),
    "empty-image": (cut("train/0.png", 0), f"image {FIRST}: ", "train/0.png: not an image"),
    "text-as-image": (lambda r: (r / "train/1.jpg").write_text("hi"), f"image {FIRST + 7}: ", "1.jpg: not an image"),
    "corrupt-png": (damage("train/2.png"), f"image {FIRST + 14}: ", "train/2.png: cannot be decoded"),
    "other-size": (put("width", 65, "images"), f"image {FIRST}: ", "0.png: the file is 64x48 pixels"),
    "bomb": (bomb, f"image {FIRST}: ", "train/0.png: cannot be decoded"),
    "odd-error": (texture, f"image {FIRST}: ", "train/0.png: cannot be decoded (Unknown BLP compression 9)"),
    "unknown-category": (put("category_id", 5), "instances_train.json: annotation 500 has category_id 5", ""),
    "unknown-image": (put("image_id", 99), "instances_train.json: annotation 500 has image_id 99", ""),
    "image-twice": (repeat("images"), f"instances_train.json: image id {FIRST} is there twice", ""),
    "annotation-twice": (repeat("annotations"), "instances_train.json: annotation id 500 is there twice", ""),
    "category-twice": (repeat("categories"), "instances_train.json: category id 3 is there twice", ""),
    "no-bbox": (change(lambda d: d["annotations"][0].pop("bbox")), "annotation 500 ", "has no bbox"),
    "nan": (put("bbox", [1, 2, float("nan"), 4]), "annotation 500 ", "not finite"),
    "negative-size": (put("bbox", [9, 9, -4, 5], split="val"), "instances_val.json: annotation 500 ", "negative size"),
    "nan-area": (put("area", float("nan")), "annotation 500 has area nan", ""),
    "vast-area": (put("area", 10**11), "annotation 500 has area 100000000000", ""),  # COCO would pass over the object
    "long-number": (put("bbox", [1, 2, 10**400, 4]), "annotation 500 ", "000..., which is not finite, or beyond"),
    "name-that-cannot-be-written": (put("name", "\ud800", "categories"), r"category 3 has name '\ud800'", "control"),
    "name-of-two-lines": (put("name", "a\nb", "categories"), r"category 3 has name 'a\nb'", "control characters"),
    "endless-file-name": (put("file_name", "a" * 5000, "images"), f"image {FIRST}: ", "is missing"),
    "pipe": (pipe, f"image {FIRST}: ", "train/0.png: is no file"),
    "no-objects": (change(lambda d: d.update(annotations=[])), "the train split has no objects", "annotate"),
    "no-images": (change(lambda d: d.update(images=[], annotations=[])), "instances_train.json: ", "images is empty"),
    "broken-json": (cut("annotations/instances_val.json", 0.7), "instances_val.json: not valid JSON", "line 1"),
    "no-annotations": (lambda r: shutil.rmtree(r / "annotations"), "no annotations here", "instances_train.json"),
    "no-val": (lambda r: (r / "annotations/instances_val.json").unlink(), "no 'val' split", "instances_val.json"),
    "no-image-folder": (lambda r: shutil.rmtree(r / "train"), "its image folder", "train is missing"),
    "parent": (put("file_name", "../val/0.png", "images"), f"image {FIRST} has file_name '../val/0.png'", "leads out"),
    "hidden-parent": (put("file_name", "a/../../val/0.png", "images"), f"image {FIRST} has file_name", "leads out"),
    "absolute": (put("file_name", "/etc/passwd", "images"), f"image {FIRST} has file_name '/etc/passwd'", "leads out"),
    "zero-width": (put("width", 0, "images"), f"image {FIRST} has width 0", ""),
    "negative-height": (put("height", -48, "images"), f"image {FIRST} has height -48", ""),
    "huge-width": (put("width", 10**6, "images"), f"image {FIRST} has width 1000000", "at most 100,000"),
    "half-a-pixel": (put("width", 64.5, "images"), f"image {FIRST} has width 64.5", "whole pixels"),
    "too-many-pixels": (
        change(lambda d: d["images"][0].update(width=90_000, height=90_000)),
        f"image {FIRST} is 90000x90000 pixels",
        "cut it into tiles",
    ),
    "no-list": (put("neg_category_ids", 3, "images"), f"image {FIRST} has neg_category_ids 3", "give a list"),
    "absent-unknown": (
        put("neg_category_ids", [3, 99], "images"),
        f"image {FIRST} has neg_category_ids with 99, which is not in the list of categories",
        "add that category",
    ),
    "partial-text": (
        put("not_exhaustive_category_ids", [7, "3"], "images"),
        f"image {FIRST} has not_exhaustive_category_ids with '3', which is not in the list",
        "",
    ),
    "classes-differ": (put("name", "wolf", "categories", "val"), "category 3 is 'wolf' here and 'dog' in training", ""),
}


@pytest.fixture(scope="module")
def good_run(good_set, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, train(folder, good_set)


def test_the_untouched_set_passes(good_set, good_run):
    folder, done = good_run
    assert done.returncode == 0, done.stderr
    assert (folder / "runs" / "small-1" / "best.pt").is_file()
    assert sorted(path.name for path in good_set.iterdir()) == ["annotations", "train", "val"]


def test_remarks_are_said_once(good_run):
    _, done = good_run
    assert done.stdout.count("train: 1 image without objects\n") == 1
    warning = (
        "training from scratch: a frozen norm does not normalise random weights and 4 images are few to learn from"
    )
    assert done.stdout.count(warning) == 1 and "--init FILE" in done.stdout


@pytest.mark.parametrize(("breakage", "where", "what"), BROKEN.values(), ids=BROKEN)
def test_broken_sets_stop_training(broken, command, breakage, where, what):
    data, folder = broken
    breakage(data)
    assert_training_stops(command, data, folder, where, what)


def test_a_process_of_its_own_says_the_same(broken, command):
    data, folder = broken
    (data / "train" / "1.jpg").unlink()
    done = train(folder, data)
    assert not any(folder.iterdir())
    assert (done.returncode, done.stdout, done.stderr) == command(folder, "dndetr.train", *FLAGS, "--data", str(data))


@pytest.mark.parametrize(("breakage", "where", "what"), BROKEN.values(), ids=BROKEN)
def test_the_check_lists_what_stops_training(broken, command, breakage, where, what):
    data, folder = broken
    breakage(data)
    assert_check_lists(command, data, folder, where, what)


def test_unreadable_images_are_skipped_and_counted_on_request(good_set, tmp_path):
    data = tmp_path / "set"
    shutil.copytree(good_set, data)
    for breakage in (cut("train/1.jpg", 0.5), damage("train/2.png"), cut("val/0.png", 0.9)):
        breakage(data)
    done = train(tmp_path, data, "--images.skip-unreadable")
    assert done.returncode == 0, done.stderr
    assert f"train: 2 of 4 images cannot be read and are skipped; the first: image {FIRST + 7}: " in done.stdout
    assert "val: 1 of 2 images cannot be read and are skipped" in done.stdout
    assert "2 training and 1 validation images" in done.stdout
    results = json.loads((tmp_path / "runs/small-1/detections_val.json").read_text())
    assert {result["image_id"] for result in results} == {FIRST + 7}
