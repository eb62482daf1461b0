"""The convert command: what it writes, where, and what stops it."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from coco_folders import document, tree, write_set, write_small
from PIL import Image
from splits import read_split

from dndetr import convert
from dndetr.data import conversion
from dndetr.data.source import open_source


@pytest.fixture
def small(tmp_path) -> Path:
    return write_small(tmp_path / "set")


def run(*arguments) -> int:
    return convert.main([str(argument) for argument in arguments])


def test_coco_as_coco_is_the_same_document(small, tmp_path, capsys):
    changed = document(small)
    changed["annotations"][1] |= {"iscrowd": 1, "area": 12.25}
    changed["annotations"].sort(key=lambda entry: -entry["image_id"])
    (small / "annotations" / "instances_train.json").write_text(json.dumps(changed))
    before = tree(small)
    assert run(small, tmp_path / "out", "--format", "coco") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{small}: COCO, annotations/instances_train.json",
        "train: 3 images, 5 objects of 2 classes",
        "val: 2 images, 1 objects of 2 classes",
        f"written as COCO to {tmp_path / 'out'}",
    ]
    assert {split: document(tmp_path / "out", split) for split in ("train", "val")} == {
        split: document(small, split) for split in ("train", "val")
    }
    after = tree(tmp_path / "out")
    assert after.keys() == before.keys() == tree(small).keys() and tree(small) == before
    assert all(after[name] == before[name] for name in after if name.endswith(".png"))


def test_yolo_images_of_several_places(tmp_path):
    for place in ("one", "two"):
        write_set(tmp_path / place, ["a.png"], [(0, 3, [1, 1, 5, 5], {})])
        assert run(tmp_path / place, tmp_path / f"{place}-yolo", "--format", "yolo") == 0
    (tmp_path / "here").mkdir()
    text = "train: [../one-yolo/images/train, ../two-yolo/images/train]\nnames: [dog, cat]\n"
    (tmp_path / "here/data.yaml").write_text(text)
    assert run(tmp_path / "here", tmp_path / "out", "--format", "coco") == 0
    read = read_split(tmp_path / "out", "train")
    assert read.names == ["one-yolo/images/train/a.png", "two-yolo/images/train/a.png"]
    assert read.objects.image.tolist() == [0, 1]


def test_links_in_place_of_copies(small, tmp_path, monkeypatch, capsys):
    before = tree(small)
    assert run(small, tmp_path / "link", "--format", "yolo", "--images", "link") == 0
    assert run(small, tmp_path / "hard", "--format", "coco", "--images", "hardlink") == 0
    assert run(tmp_path / "link", tmp_path / "again", "--format", "coco", "--images", "link") == 0
    original = small / "train" / "deep" / "img2.png"
    assert os.readlink(tmp_path / "link/images/train/deep/img2.png") == str(original)
    assert os.readlink(tmp_path / "again/train/deep/img2.png") == str(original)  # not a link to a link
    assert (tmp_path / "hard/train/deep/img2.png").samefile(original)
    capsys.readouterr()
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(18, "Invalid cross-device link")))
    assert run(small, tmp_path / "no", "--format", "coco", "--images", "hardlink") == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: --images hardlink: .*\(Invalid cross-device link\); give --images copy\n", error)
    assert not (tmp_path / "no").exists() and tree(small) == before


def test_an_undivided_set_gets_a_val_split(small, tmp_path, capsys):
    (small / "annotations" / "instances_val.json").unlink()
    assert (
        run(small, tmp_path / "out", "--format", "yolo", "--val-share", "0.3", "--split-file", tmp_path / "s.json") == 0
    )
    sides = json.loads((tmp_path / "s.json").read_text())
    for side in ("train", "val"):
        found = [os.path.basename(name) for name in read_split(tmp_path / "out", side).names]
        assert found == [os.path.basename(name) for name in sides[side]]
    assert run(small, tmp_path / "whole", "--format", "yolo") == 0
    assert open_source(tmp_path / "whole").splits == ("train",)


def test_splits_by_name(small, tmp_path, capsys):
    for kind in ("annotations/instances_{}.json", "{}"):
        (small / kind.format("val")).rename(small / kind.format("night"))
    assert run(small, tmp_path / "out", "--format", "coco", "--splits", "night", "train") == 0
    assert document(tmp_path / "out", "night") == document(small, "night")
    capsys.readouterr()
    for splits, message in (
        (["night"], "--splits night: give train, val, test"),
        (["val"], "no 'val' split; looked for"),
    ):
        assert run(small, tmp_path / "no", "--format", "yolo", "--splits", *splits) == 1
        assert message in capsys.readouterr().err
    assert run(small, tmp_path / "no", "--format", "coco", "--splits", "../night") == 1
    assert "--splits ../night: give names of splits" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def cut(root):
    path = root / "val" / "b.png"
    path.write_bytes(path.read_bytes()[:-20])


def change(key, value, which="annotations"):
    def changed(root):
        content = document(root)
        content[which][0][key] = value
        (root / "annotations" / "instances_train.json").write_text(json.dumps(content))

    return changed


def turned(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48)).save(root / "train" / "img10.jpg", exif=exif)
    change("file_name", "img10.jpg", "images")(root)


def unnamed(root):
    (root / "train" / "img10.png").rename(root / "train" / "img10")
    change("file_name", "img10", "images")(root)


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (
            change("category_id", 99),
            r"instances_train.json: annotation 50 has category_id 99, which is not in the list",
        ),
        (change("name", "wolf", "categories"), r"instances_val.json: category 3 is 'dog' here and 'wolf' in training"),
        (
            lambda root: (root / "train/img1.png").unlink(),
            r"instances_train.json: image 986: .*img1.png is missing; put",
        ),
        (cut, r"instances_val.json: image 993: .*b.png: the file is cut off, its end is missing; replace it"),
        (change("width", 50, "images"), r"image 1000: .*is 64x48 pixels, its annotation says 50x48"),
        (
            turned,
            r"image 1000: .*img10.jpg: annotated as stored, but all who read YOLO turn it by its EXIF data; write",
        ),
        (unnamed, r"image 1000: .*img10: YOLO knows images by names that end in .jpg or the like, .*; rename the file"),
        (lambda root: shutil.rmtree(root / "annotations"), r"set: no annotations here"),
    ],
)
def test_what_is_wrong_with_a_set_is_told_in_one_line(small, tmp_path, capsys, breakage, message):
    breakage(small)
    before = tree(small)
    assert run(small, tmp_path / "new" / "out", "--format", "yolo") == 1
    error = capsys.readouterr().err
    assert re.match(rf"error: .*{message}", error) and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["set"] and tree(small) == before


def test_where_nothing_is_written(small, tmp_path, monkeypatch, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    inside, link = small / "train" / "out", tmp_path / "link"
    link.symlink_to(small)
    for folder, message in (
        (tmp_path / "full", "full is already there and not empty; give a new folder"),
        (tmp_path / "full" / "precious", "precious is already there and not empty"),
        (tmp_path / "full" / "precious" / "out", "out cannot be made: .*precious is a file: give another folder"),
        (small, "set is already there and not empty"),
        (inside, r"out is inside the data set .*set, which is only read; give a folder elsewhere"),
        (link / "out", r"link/out is inside the data set .*set, which is only read"),
    ):
        before = tree(tmp_path)
        assert run(small, folder, "--format", "coco") == 1
        assert re.match(rf"error: .*{message}", capsys.readouterr().err)
        assert tree(tmp_path) == before
    assert run(small, tmp_path / "out") == 1 and "--format" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    (tmp_path / "way").symlink_to(tmp_path / "empty")
    assert run(small, tmp_path / "way", "--format", "coco") == 0
    assert document(tmp_path / "empty")["images"] == document(small)["images"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_of_half_a_conversion(small, tmp_path, monkeypatch, capsys, failure):
    copied = []

    def copy_one(file, target):
        if copied:
            raise failure
        copied.append(Path(target).write_bytes(Path(file).read_bytes()))

    monkeypatch.setattr(conversion.shutil, "copyfile", copy_one)
    assert run(small, tmp_path / "deep" / "out", "--format", "yolo") in (1, 130)
    told = capsys.readouterr().err
    assert told in (f"error: cannot write {tmp_path / 'deep/out'}: No space left on device\n", "interrupted\n")
    assert len(copied) == 1 and [path.name for path in tmp_path.iterdir()] == ["set"]
