"""Every way in which a YOLO data set can be broken, through the train command and the check."""

import os
import shutil
from pathlib import Path

import pytest
from broken_sets import assert_check_lists, assert_training_stops, cut, train
from yolo_sets import YAML, write_yolo


def yaml(text: str, name: str = "data.yaml"):
    return lambda root: (root / name).write_text(text)


def change(old: str, new: str):
    return yaml(YAML.replace(old, new))


def rows(text: str | bytes, name: str = "labels/train/train_1.txt"):
    def apply(root: Path):
        (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return apply


def listed(text: str):
    def apply(root: Path):
        (root / "train.txt").write_text(text)
        (root / "data.yaml").write_text(YAML.replace("images/train", "train.txt"))

    return apply


def pipe(name: str):
    """Whoever opens it waits for another program."""

    def apply(root: Path):
        (root / name).unlink()
        os.mkfifo(root / name)

    return apply


def both(*breakages):
    def apply(root: Path):
        for breakage in breakages:
            breakage(root)

    return apply


LABELS = "labels/train/train_1.txt"
GOOD = "0 0.5 0.5 0.5 0.5\n"
BROKEN = {
    "not-yaml": (yaml("train: [images/train\nnames: {"), "data.yaml:", "not valid YAML"),
    "tabs": (change("val:", "\tval:"), "data.yaml:2: not valid YAML", ""),
    "a-list": (yaml("- images/train\n"), "data.yaml: the top level must be keys", "train, val and names"),
    "empty-file": (yaml(""), "data.yaml: the top level must be keys", ""),
    "undecodable": (rows(b"train: \xff\xfe\nnames: [a]\n", "data.yaml"), "data.yaml: not valid YAML", ""),
    "no-splits": (yaml("names: [dog, cat]\n"), "data.yaml: names no train, val or test", "images/train"),
    "no-val": (change("val: images/val\n", ""), "data.yaml: no 'val' split", "--val-share 0.2"),
    "no-train": (change("train: images/train\n", ""), "data.yaml: no 'train' split", "there is val"),
    "no-names": (change("names: [dog, cat]\n", ""), "data.yaml: there is no list 'names'", "names of the classes"),
    "names-a-text": (change("[dog, cat]", "classes.txt"), "data.yaml:3: names is 'classes.txt'", "a list of names"),
    "names-with-a-gap": (change("[dog, cat]", "{0: dog, 2: cat}"), "data.yaml:3: names has no class 1", "without gaps"),
    "names-by-text": (change("[dog, cat]", "{dog: 0, cat: 1}"), "data.yaml:3: names has key 'dog'", "number"),
    "names-nested": (change("[dog, cat]", "[[dog], cat]"), "data.yaml:3: names must be a text", ""),
    "name-of-two-lines": (change("[dog, cat]", '[dog, "c\\nt"]'), r"data.yaml:3: names has 'c\nt'", "control"),
    "empty-name": (change("[dog, cat]", "[dog, '']"), "data.yaml:3: names has an empty entry", ""),
    "another-count": (yaml(YAML + "nc: 3\n"), "data.yaml:4: nc is 3, but there are 2 names", "correct one of them"),
    "count-a-text": (yaml(YAML + "nc: two\n"), "data.yaml:4: nc must be the number of classes", ""),
    "key-twice": (yaml(YAML + "train: images/val\n"), "data.yaml:4: 'train' is there twice", "leave one"),
    "val-and-valid": (yaml(YAML + "valid: images/val\n"), "data.yaml:4: val and valid are both there", "leave one"),
    "no-such-folder": (change("images/train", "pics/train"), "data.yaml:1: train is 'pics/train'", "there is no"),
    "no-such-val": (change("images/val", "../val"), "data.yaml:2: val is '../val'", "and give --val-share"),
    "long-path": (change("images/train", "x" * 5000), "data.yaml:1: train is 'xxx", "there is no"),
    "names-with-00": (change("[dog, cat]", "{0: dog, 00: cat}"), "data.yaml:3: names has key '00'", "number"),
    "no-such-list": (change("images/val", "val.txt"), "data.yaml:2: val is 'val.txt'", "correct it, or path"),
    "split-a-mapping": (change("images/train", "{a: b}"), "data.yaml:1: train must be a text", "list of texts"),
    "keypoints-a-text": (yaml(YAML + "kpt_shape: many\n"), "data.yaml:4: kpt_shape must be two numbers", ""),
    "no-images": (
        lambda r: shutil.rmtree(r / "images/val") or (r / "images/val").mkdir(),
        "val has no images",
        "or take the line out and give --val-share 0.2",
    ),
    "labels-missing": (lambda r: shutil.rmtree(r / "labels"), "0 of 4 images of train have labels", "put a .txt"),
    "val-labels-missing": (lambda r: shutil.rmtree(r / "labels/val"), "0 of 2 images of val have labels", "labels/val"),
    "no-objects": (both(*(rows("", f"labels/train/train_{i}.txt") for i in range(3))), "has no objects", ""),
    "too-few-numbers": (rows(GOOD + "0 0.5 0.5 0.5\n"), f"{LABELS}:2: has 4 numbers", "give class cx cy w h"),
    "a-score": (rows("0 0.5 0.5 0.5 0.5 0.9\n"), f"{LABELS}:1: has 6 numbers", "take the score of a prediction out"),
    "pixels": (rows("0 32 24 16 16\n"), f"{LABELS}:1: has 32, which is no share", "divide them by the image's width"),
    "corners": (rows(GOOD + GOOD + "0 0.5 0.5 -0.1 0.2\n"), f"{LABELS}:3: has a negative width or height", ""),
    "nan": (rows("0 nan 0.5 0.5 0.5\n"), f"{LABELS}:1: has a number that is not finite", "correct or remove it"),
    "text": (rows("\n\n0 0.5 half 0.5 0.5\n"), f"{LABELS}:3: is '0 0.5 half 0.5 0.5'", "give numbers"),
    "class-by-name": (rows("dog 0.5 0.5 0.5 0.5\n"), f"{LABELS}:1: is 'dog 0.5", "give numbers"),
    "class-with-a-point": (rows("0.0 0.5 0.5 0.5 0.5\n"), f"{LABELS}:1: has class 0.0", "as a whole number"),
    "class-from-1": (rows(GOOD + "2 0.5 0.5 0.5 0.5\n"), f"{LABELS}:2: has class 2", "the last one of data.yaml is 1"),
    "negative-class": (rows("-1 0.5 0.5 0.5 0.5\n"), f"{LABELS}:1: has class -1", "counted from 0"),
    "underscore": (rows("0_1 0.5 0.5 0.5 0.5\n"), f"{LABELS}:1: is '0_1 0.5", "give numbers"),
    "other-digits": (rows("\u0661 0.5 0.5 0.5 0.5\n"), f"{LABELS}:1: is '\u0661 0.5", "give numbers"),
    "line-ends-of-old": (rows("0 0.5 0.5 0.5 0.5\r\r0 0.5\r"), f"{LABELS}:3: has 2 numbers", ""),
    "upper-case-ending": (lambda r: (r / LABELS).rename(r / LABELS.replace("txt", "TXT")), "_1.TXT: ", "rename it"),
    "image-of-two-lines": (
        lambda r: (r / "images/train/train_1.jpg").rename(r / "images/train/a\n\x1bb.jpg"),
        r"images/train/a\n\x1bb.jpg' has control characters",
        "rename the file",
    ),
    "image-of-no-text": (
        lambda r: os.rename(r / "images/train/train_1.jpg", os.fsencode(r / "images/train") + b"/\xff.jpg"),
        r"images/train/\udcff.jpg' has control characters",
        "rename the file",
    ),
    "list-of-odd-text": (listed("\x1b[31mx.jpg\n"), r"train.txt:1: '\x1b[31mx.jpg' is missing", "remove the row"),
    "commas": (rows("0,0.5,0.5,0.5,0.5\n"), f"{LABELS}:1: is '0,0.5", "separate the numbers by blanks"),
    "binary": (rows(GOOD.encode() + b"\x89PNG\xff\xd8"), f"{LABELS}:2: is no text", "write it anew"),
    "labels-a-folder": (lambda r: (r / LABELS).unlink() or (r / LABELS).mkdir(), f"{LABELS}:1: cannot be read", ""),
    "labels-a-pipe": (pipe(LABELS), f"{LABELS}:1: cannot be read", "it is no file"),
    "labels-a-dead-link": (
        lambda r: (r / LABELS).unlink() or (r / LABELS).symlink_to("/nowhere/a.txt"),
        f"{LABELS}:1: cannot be read",
        "a link that leads nowhere",
    ),
    "list-names-nothing": (listed("images/train/train_0.png\nimages/train/x.png\n"), "train.txt:2: ", "is missing"),
    "list-names-a-text": (listed("labels/train/train_0.txt\n"), "train.txt:1: ", "is no image, by its name"),
    "list-twice": (listed("images/train/train_0.png\n" * 2), "train.txt:2: ", "is there twice"),
    "list-empty": (listed("\n"), "data.yaml:1: train has no images", ""),
    "list-binary": (both(listed(""), rows(b"\xff\xfe\x00", "train.txt")), "train.txt: is no text", "a list of them"),
    "image-cut-off": (cut("images/train/train_1.jpg", 0.5), "train_1.jpg: the file is cut off", "replace it"),
    "image-a-text": (rows("hi", "images/train/train_1.jpg"), "train_1.jpg: not an image", "replace it"),
    "image-a-pipe": (pipe("images/train/train_1.jpg"), "train_1.jpg", ""),
    "link-to-nothing": (
        lambda r: (r / "images/train/x.png").symlink_to("nowhere.png"),
        "images/train/x.png",
        "",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def good_set(tmp_path_factory):
    return write_yolo(tmp_path_factory.mktemp("good") / "set")


def test_the_untouched_set_passes(good_set, tmp_path):
    before = sorted(path for path in good_set.rglob("*"))
    done = train(tmp_path, good_set)
    assert done.returncode == 0, done.stderr
    assert "train: 1 image without objects\n" in done.stdout
    assert sorted(path for path in good_set.rglob("*")) == before


@pytest.mark.parametrize(("breakage", "where", "what"), BROKEN.values(), ids=BROKEN)
def test_broken_sets_stop_training(broken, command, breakage, where, what):
    data, folder = broken
    breakage(data)
    assert_training_stops(command, data, folder, where, what)


@pytest.mark.parametrize(("breakage", "where", "what"), BROKEN.values(), ids=BROKEN)
def test_the_check_lists_what_stops_training(broken, command, breakage, where, what):
    data, folder = broken
    breakage(data)
    assert_check_lists(command, data, folder, where, what)
