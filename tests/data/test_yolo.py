"""YOLO data sets in all their forms: where images and labels are, and what a row is."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image
from splits import read_split
from yolo_sets import YAML, coco_as_yolo, write_yolo

from dndetr.data.errors import DataError
from dndetr.data.folder_dataset import FolderDataset
from dndetr.data.review.image_files import check_files
from dndetr.data.source import open_source
from dndetr.data.transforms import Unresized

BOXES = [[8, 6, 16, 12], [36, 12, 8, 24]]  # of write_yolo, in pixels


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dndetr"


@pytest.fixture
def folder(tmp_path):
    return write_yolo(tmp_path / "set")


def bases(records):
    return [os.path.basename(name) for name in records.names]


def check(root, train=4, val=2):
    """The set is that of ``write_yolo``: its images, with their boxes."""
    source = open_source(root)
    assert source.splits[:2] == ("train", "val")
    for split, count in (("train", train), ("val", val)):
        records = source.read(split)
        assert records.problems == []
        assert sorted(bases(records)) == [f"{split}_{i}.{'jpg' if i % 2 else 'png'}" for i in range(count)]
        assert records.ids.tolist() == list(range(1, count + 1))
        assert records.sizes.tolist() == [[48, 64]] * count
        for place, base in enumerate(bases(records)):
            found = records.objects.where(records.objects.image == place)
            with_labels = int(base.split("_")[1][0]) < 3
            assert found.boxes.tolist() == (BOXES if with_labels else [])
            assert found.label.tolist() == ([0, 1] if with_labels else [])
        sample = FolderDataset(records, Unresized())[0]
        assert sample.boxes_xyxy.tolist() == [[8, 6, 24, 18], [36, 12, 44, 36]]
    return source


def test_a_plain_set(folder):
    source = check(folder)
    assert source.about == "YOLO, data.yaml"
    assert source.read("train").classes == [(0, "dog"), (1, "cat")]
    assert (source.read("train").file, source.root) == (folder / "data.yaml", folder)


HEADS = {
    "absent": "",
    "here": "path: .\n",
    "slash": "path: ./\n",
    "null": "path:\n",
    "stock": "path: coco8\n",
    "elsewhere": "path: /nowhere/at/all\n",
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_path_may_be_absent_relative_or_wrong(folder, head):
    (folder / "data.yaml").write_text(head + YAML)
    said = check(folder).about
    assert ("is not there, so all paths start from the file's folder" in said) == ("coco8" in head or "nowhere" in head)


def test_path_may_be_absolute_or_another_folder(folder, tmp_path):
    (tmp_path / "cfg").mkdir()
    shutil.move(folder / "data.yaml", tmp_path / "cfg" / "mine.yaml")
    for path in (str(folder), "../set", "..\\set"):
        (tmp_path / "cfg" / "mine.yaml").write_text(f"path: {path}\n{YAML}")
        for given in (tmp_path / "cfg", tmp_path / "cfg" / "mine.yaml"):
            check(given)


SPLITS = {
    "roboflow": ("train: ../train/images\nval: ../valid/images\n", "{split}/images", "{split}/labels"),
    "dots": ("train: ./images/train\nval: ./images/val/\n", "images/{split}", "labels/{split}"),
    "valid": ("train: images/train\nvalid: images/val\n", "images/{split}", "labels/{split}"),
    "validation": ("train: images/train\nvalidation: images/val\n", "images/{split}", "labels/{split}"),
    "folder-of-both": ("train: train\nval: val\n", "{split}/images", "{split}/labels"),
    "sibling": ("train: pics/train\nval: pics/val\n", "pics/{split}/jpg", "pics/{split}/labels"),
    "beside": ("train: train\nval: val\n", "{split}", "{split}"),
    "twice-images": (
        "train: images/images/train\nval: images/images/val\n",
        "images/images/{split}",
        "images/labels/{split}",
    ),
    "backslashes": ("train: images\\train\nval: images\\val\n", "images/{split}", "labels/{split}"),
    "deeper": ("train: images/train\nval: images/val\n", "images/{split}/a/b", "labels/{split}/a/b"),
    "list": ("train: [images/train]\nval:\n- images/val\n", "images/{split}", "labels/{split}"),
    "quoted": ("train: 'images/train'\nval: \"images/val\"\ntest: ''\n", "images/{split}", "labels/{split}"),
    "no-test": ("train: images/train\nval: images/val\ntest: []\n", "images/{split}", "labels/{split}"),
    "empty-test": ("train: images/train\nval: images/val\ntest:\n", "images/{split}", "labels/{split}"),
}


@pytest.mark.parametrize(("head", "images", "labels"), SPLITS.values(), ids=SPLITS)
def test_where_images_and_labels_may_be(tmp_path, head, images, labels):
    root = write_yolo(tmp_path / "set", f"{head}names: [dog, cat]\n", images, labels)
    if "valid/images" in head:
        (root / "val").rename(root / "valid")
    assert check(root).splits == ("train", "val")


def test_a_folder_within_a_folder_of_that_name(tmp_path):
    """The last ``images`` of a path is swapped, of those whose ``labels`` is there."""
    check(write_yolo(tmp_path / "images" / "set"))
    check(write_yolo(tmp_path / "images" / "flat", "train: train\nval: val\nnames: [dog, cat]\n", "{split}", "{split}"))


LISTS = {
    "plain": "images/{split}/{name}",
    "dots": "./images/{split}/{name}",
    "backslashes": ".\\images\\{split}\\{name}",
    "absolute": "{root}/images/{split}/{name}",
    "cvat": "data/images/{split}/{name}",
}


@pytest.mark.parametrize("row", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("where", ["", "lists/"])
def test_lists_of_images_keep_their_order(folder, row, where):
    (folder / "lists").mkdir()
    for split in ("train", "val"):
        names = sorted((path.name for path in (folder / "images" / split).iterdir()), reverse=True)
        rows = [row.format(split=split, name=name, root=folder) for name in names]
        (folder / f"{where}{split}.txt").write_text("\n".join(rows) + "\n\n")
    (folder / "data.yaml").write_text(f"train: {where}train.txt\nval: [{where}val.txt]\nnames: [dog, cat]\n")
    source = open_source(folder)
    assert bases(source.read("train")) == ["train_3.jpg", "train_2.png", "train_1.jpg", "train_0.png"]
    assert np.bincount(source.read("train").objects.image).tolist() == [0, 2, 2, 2]
    assert bases(source.read("val")) == ["val_1.jpg", "val_0.png"]


def test_lists_in_the_working_directory_with_everything_beside_them(tmp_path, monkeypatch):
    write_yolo(tmp_path, "train: train.txt\nval: val.txt\nnames: [dog, cat]\n", "", "")
    for split, count in (("train", 4), ("val", 2)):
        rows = "".join(f"{split}_{i}.{'jpg' if i % 2 else 'png'}\n" for i in range(count))
        (tmp_path / f"{split}.txt").write_text(rows)
    monkeypatch.chdir(tmp_path)
    check(".")


def test_several_folders_one_image_and_a_list_together(folder):
    (folder / "more").mkdir()
    (folder / "images/train/train_0.png").rename(folder / "more" / "x.png")
    (folder / "one.txt").write_text("./images/train/train_1.jpg\n")
    (folder / "data.yaml").write_text(
        "train:\n - more\n - one.txt\n - images/train/train_2.png\n - images/train\nval: images/val\nnames: [a, b]\n"
    )
    records = read_split(folder, "train")
    assert bases(records) == ["x.png", "train_1.jpg", "train_2.png", "train_3.jpg"]
    assert records.remarks == ["1 label file left out, of images that are not read"]


def test_names_are_counted_as_people_count(folder):
    for number in (10, 9, 100, 1):
        shutil.copy(folder / "images/train/train_0.png", folder / f"images/train/img{number}.png")
    assert bases(read_split(folder, "train"))[:4] == ["img1.png", "img9.png", "img10.png", "img100.png"]


NAMES = {
    "list": "[dog, cat]",
    "mapping": "{0: dog, 1: cat}",
    "out-of-order": "\n  1: cat\n  0: dog",
    "digits-as-text": "{'0': dog, \"1\": cat}",
    "count-too": "[dog, cat]\nnc: 2",
}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_forms_of_names(folder, names):
    (folder / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames: {names}\n")
    assert read_split(folder, "train").classes == [(0, "dog"), (1, "cat")]


def test_names_are_texts_whatever_yaml_makes_of_them(folder):
    (folder / "data.yaml").write_text(
        "train: images/train\nval: images/val\nnames: [no, 007, 1.50, null, 'a: b', 猫]\n"
    )
    assert [name for _, name in read_split(folder, "val").classes] == ["no", "007", "1.50", "null", "a: b", "猫"]
    (folder / "data.yaml").write_text("train: images/train\nval: images/val\nnc: 3\n")
    assert [name for _, name in read_split(folder, "val").classes] == ["class_0", "class_1", "class_2"]


def test_the_file_may_have_another_name(folder):
    for name in ("data.yml", "coco8.yaml", "anything.yml"):
        next(folder.glob("*.y*ml")).rename(folder / name)
        (folder / "hyp.yaml").write_text("lr: 0.1\n")
        assert name in check(folder).about
        (folder / "hyp.yaml").unlink()
    shutil.copy(folder / "anything.yml", folder / "other.yaml")
    with pytest.raises(DataError, match=r"anything.yml and other.yaml both describe YOLO data; give the path of one"):
        open_source(folder)
    check(folder / "other.yaml")


def test_the_flat_export_of_label_studio(folder):
    shutil.rmtree(folder / "images/val"), shutil.rmtree(folder / "labels/val")
    (folder / "data.yaml").unlink()
    (folder / "classes.txt").write_text("dog\ncat\n")
    (folder / "notes.json").write_text("{}")
    for kind in ("images", "labels"):
        for path in (folder / kind / "train").iterdir():
            path.rename(folder / kind / path.name)
        (folder / kind / "train").rmdir()
    source = open_source(folder)
    assert source.splits == ("train",) and len(source.read("train")) == 4 and not source.read("train").problems
    with pytest.raises(DataError, match=r"no 'val' split; .* there is train; .* give --val-share 0.2"):
        source.read("val")
    divided = open_source(folder, 0.25)
    assert (len(divided.read("train")), len(divided.read("val"))) == (3, 1)


def test_yolo_1_1_of_cvat(tmp_path):
    root = write_yolo(tmp_path / "set", images="obj_{split}_data", labels="obj_{split}_data")
    (root / "data.yaml").unlink()
    (root / "obj.names").write_text("dog\ncat\n")
    (root / "obj.data").write_text(
        "classes = 2\ntrain = data/train.txt\nvalid = data/valid.txt\nnames = data/obj.names\nbackup = backup/\n"
    )
    for split, name in (("train", "train"), ("val", "valid")):
        rows = sorted(path.name for path in (root / f"obj_{split}_data").glob("*g"))
        (root / f"{name}.txt").write_text("".join(f"data/obj_{split}_data/{row}\n" for row in rows))
    check(root)


def test_missing_and_empty_label_files_are_background_but_not_all(folder):
    (folder / "labels/train/train_0.txt").write_text("")
    (folder / "labels/train/train_1.txt").unlink()
    records = read_split(folder, "train")
    assert records.problems == [] and np.bincount(records.objects.image, minlength=4).tolist() == [0, 0, 2, 0]
    shutil.rmtree(folder / "labels/train")
    (problem,) = read_split(folder, "train").problems
    assert problem.message.startswith("0 of 4 images of train have labels, looked in ")
    assert str(folder / "labels") in problem.message and "put a .txt file there" in problem.message


WRONG = {
    "too-few": ("0 0.5 0.5 0.5", "has 4 numbers; give class cx cy w h"),
    "a-score": ("0 0.5 0.5 0.5 0.5 0.9", "has 6 numbers; .*take the score of a prediction out"),
    "half-a-point": ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", "has 8 numbers"),
    "class-only": ("0", "has 1 numbers"),
    "pixels": ("0 320 240 100 50", "has 320, which is no share .* these are pixels"),
    "beyond": ("0 0.5 0.5 1.2 0.5", "has 1.2, which is no share of the image's side from 0 to 1$"),
    "negative": ("0 -0.5 0.5 0.5 0.5", "has -0.5, which is no share"),
    "negative-width": ("0 0.5 0.5 -0.25 0.5", "has a negative width or height"),
    "nan": ("0 nan 0.5 0.5 0.5", "not finite"),
    "inf": ("0 0.5 0.5 inf 0.5", "not finite"),
    "text": ("0 0.5 0.5 0.5 wide", "is '0 0.5 0.5 0.5 wide'; give numbers"),
    "name": ("dog 0.5 0.5 0.5 0.5", "is 'dog 0.5 .*; give numbers"),
    "float-class": ("0.0 0.5 0.5 0.5 0.5", "has class 0.0; write it as a whole number"),
    "half-class": ("0.5 0.5 0.5 0.5 0.5", "is '0.5 0.5"),
    "negative-class": ("-1 0.5 0.5 0.5 0.5", "has class -1; classes are counted from 0"),
    "vast-class": (f"{10**30} 0.5 0.5 0.5 0.5", "has class 10000"),
    "commas": ("0,0.5,0.5,0.5,0.5", "separate the numbers by blanks"),
    "decimal-commas": ("0 0,5 0,5 0,5 0,5", "separate the numbers by blanks"),
    "polygon-outside": ("0 0.1 0.1 0.2 0.2 3 3", "has 3, which is no share"),
    "polygon-nan": ("0 0.1 0.1 0.2 0.2 nan 0.3", "not finite"),
}


@pytest.mark.parametrize(("row", "message"), WRONG.values(), ids=WRONG)
def test_wrong_rows_are_named_with_their_line(folder, row, message):
    path = folder / "labels/train/train_1.txt"
    path.write_text(f"0 0.5 0.5 0.5 0.5\n\n{row}\n0 0.5 0.5\n")
    records = read_split(folder, "train")
    assert [problem.where for problem in records.problems] == [f"{path}:3", f"{path}:4"]
    with pytest.raises(DataError, match=rf"train_1.txt:3: .*{message}" if "$" not in message else "train_1.txt:3: "):
        FolderDataset(records, Unresized())
    assert FolderDataset(read_split(folder, "val"), Unresized()).counts == [2, 2]


def test_a_class_without_a_name_is_named_with_its_line(folder):
    path = folder / "labels/train/train_2.txt"
    path.write_text("0 0.5 0.5 0.5 0.5\n\n2 0.5 0.5 0.5 0.5\n7 0.5 0.5 0.5 0.5\n")
    for _ in range(2):  # from the cache, too
        problems = read_split(folder, "train").problems
        assert [problem.where for problem in problems] == [f"{path}:3", f"{path}:4"]
        assert problems[1].message.startswith(
            "has class 7, but the last one of data.yaml is 1 ('cat'); add a name there"
        )
    (folder / "data.yaml").write_text(YAML.replace("cat", "cat, a, b, c, d, e, f"))
    assert read_split(folder, "train").problems == []


def test_an_image_that_cannot_be_read_may_be_left_out(folder):
    (folder / "images/train/train_1.jpg").write_text("hello")
    dataset = FolderDataset(read_split(folder, "train"), Unresized())
    with pytest.raises(DataError, match=r"data.yaml: .*train_1.jpg: not an image that can be read"):
        check_files(dataset)
    (said,) = [remark for remark in check_files(dataset, skip_unreadable=True) if "skipped" in remark]
    assert said.startswith("train: 1 of 4 images cannot be read and are skipped; the first: /")
    assert dataset.counts == [2, 2, 0]


def test_turned_pictures_have_their_upright_size(folder):
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.new("RGB", (64, 48)).save(folder / "images/train/train_1.jpg", exif=tags)
    Image.new("RGB", (64, 48)).save(folder / "images/train/train_2.png", exif=tags)
    records = read_split(folder, "train")
    assert records.sizes.tolist() == [[48, 64], [64, 48], [64, 48], [48, 64]]
    assert records.objects.where(records.objects.image == 1).boxes.tolist() == [[6, 8, 12, 16], [27, 16, 6, 32]]
    check_files(FolderDataset(records, Unresized()))


@pytest.mark.parametrize("number", ["{:.6f}", "{!r}", "{:.8f}"])
@pytest.mark.parametrize("name", ["bccd", "coco_tiny"])
def test_boxes_come_back_to_the_bit(real_data, tmp_path, name, number):
    """Whole pixels, or hundredths of them, are what six digits of a share can have meant."""
    original = open_source(real_data(name))
    written = open_source(coco_as_yolo(real_data(name), tmp_path / "yolo", number))
    for split in ("train", "val"):
        a, b = original.read(split), written.read(split)
        objects = a.objects.where(~a.objects.crowd)
        assert b.problems == [] and bases(a) == bases(b) and (a.sizes == b.sizes).all()
        assert (objects.image == b.objects.image).all() and (objects.label == b.objects.label).all()
        assert np.abs(objects.boxes - b.objects.boxes).max() < 1e-12
