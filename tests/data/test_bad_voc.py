"""Every way in which a Pascal VOC folder can be broken, through the commands: one plain line, nothing left behind."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from broken_sets import FLAGS, assert_check_lists, assert_training_stops, cut
from PIL import Image
from voc_files import write_voc

from dndetr.data.errors import DataError
from dndetr.data.formats.voc_xml import read_annotation
from dndetr.data.training import TrainingData
from dndetr.presets import preset_named

DOG, CAT = ("dog", (11, 6, 30, 15)), ("cat", (31, 20, 41, 32))
TRAIN = {"img1": [DOG, CAT], "img2": [CAT], "img3": [DOG], "img10": []}


@pytest.fixture(scope="module")
def good_set(tmp_path_factory):
    """Four training and two validation images, a list per class beside theirs."""
    root = write_voc(tmp_path_factory.mktemp("good") / "set", {"train": TRAIN, "val": {"v1": [DOG, CAT], "v2": [DOG]}})
    (root / "ImageSets/Main/dog_train.txt").write_text("img1  1\nimg2 -1\nimg3  1\nimg10  0\n")
    return root


def change(old: str, new: str, name="Annotations/img1.xml"):
    """Replaces a text of a file where it stands first."""

    def apply(root):
        text = (root / name).read_text()
        assert old in text
        (root / name).write_bytes(text.replace(old, new, 1).encode("utf-8", "surrogateescape"))

    return apply


def become(content: bytes, name="Annotations/img1.xml"):
    return lambda root: (root / name).write_bytes(content)


def rows(text: str, split="train"):
    return become(text.encode(), f"ImageSets/Main/{split}.txt")


def gone(name: str):
    return lambda root: shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()


def pipe(name: str):
    """Whoever opens it waits for another program."""

    def apply(root):
        (root / name).unlink()
        os.mkfifo(root / name)

    return apply


def folder(name: str):
    def apply(root):
        (root / name).unlink()
        (root / name).mkdir()

    return apply


def several(*steps):
    def apply(root):
        for step in steps:
            step(root)

    return apply


def no_objects(root):
    for path in (root / "Annotations").iterdir():
        path.write_text("<annotation/>")


def shares(root):
    for path in (root / "Annotations").iterdir():
        text = path.read_text()
        for value in ("11", "31", "6<", "20<", "41", "30", "15", "32"):
            text = text.replace(f">{value}", ">0.5" + value[len(value.rstrip("<")) :])
        path.write_text(text)


def second_image(root):
    Image.new("RGB", (64, 48)).save(root / "JPEGImages/img1.png")
    change("<filename>img1.jpg", "<filename>x.jpg")(root)


def billion_laughs(root):
    entities = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 12))
    text = f'<!DOCTYPE a [<!ENTITY a0 "haha">{entities}]><annotation><filename>&a11;</filename></annotation>'
    (root / "Annotations/img1.xml").write_text(text)


IMG1, LIST = "Annotations/img1.xml", "ImageSets/Main/train.txt"
NAME = "<name>dog</name>"
BROKEN = {
    "cut-off": (cut(IMG1, 0.6), "img1.xml:", "not valid XML"),
    "empty": (become(b""), "img1.xml:1: ", "not valid XML (no element found"),
    "text": (become(b"dog 1 2 3 4"), "img1.xml:1: ", "not valid XML"),
    "wrong-tag": (change("</bndbox>", "</box>"), "img1.xml:18: ", "mismatched tag"),
    "undecodable": (change("dog", "d\udcffg"), "img1.xml:11: ", "in UTF-8?"),
    "encoding": (
        become(b'<?xml version="1.0" encoding="gbk"?><annotation/>'),
        "img1.xml: ",
        "save it in UTF-8",
    ),
    "odd-encoding": (become(b'<?xml version="1.0" encoding="x"?><annotation/>'), "img1.xml: ", "unknown encoding"),
    "entity": (become(b"<annotation>&x;</annotation>"), "img1.xml:1: ", "undefined entity"),
    "billion-laughs": (billion_laughs, "img1.xml:1: ", "not valid XML"),
    "root": (become(b"<annotations><object/></annotations>"), "img1.xml: ", "begins with <annotations>"),
    "xml-pipe": (pipe(IMG1), "img1.xml: ", "is no file"),
    "xml-folder": (folder(IMG1), "train.txt:1: ", "Annotations/img1.xml; add it"),
    "no-name": (change(NAME, ""), "img1.xml:10: object 1 has no name", ""),
    "empty-name": (change(NAME, "<name> </name>"), "img1.xml:10: object 1 has no name", "that of its class"),
    "name-of-two-lines": (change("dog", "a&#10;b"), "img1.xml:11: ", r"object 1 ('a\nb') has control characters"),
    "no-box": (several(*[change("bndbox>", "x>")] * 2), "img1.xml:10: ", "no <bndbox>"),
    "no-xmin": (change("<xmin>11</xmin>", ""), "img1.xml:13: ", "object 1 ('dog') has no xmin"),
    "empty-xmin": (change("11</xmin>", "</xmin>"), "img1.xml:13: ", "has xmin '', which is no number"),
    "word": (change("11</xmin>", "left</xmin>"), "img1.xml:13: ", "has xmin 'left', which is no number"),
    "underscore": (change("11</xmin>", "1_1</xmin>"), "img1.xml:13: ", "has xmin '1_1', which is no number"),
    "other-digits": (change("11</xmin>", "\u0661</xmin>"), "img1.xml:13: ", "which is no number"),
    "comma": (change("11</xmin>", "11,5</xmin>"), "img1.xml:13: ", "has xmin '11,5', which is no number"),
    "nan": (change("11</xmin>", "nan</xmin>"), "img1.xml:13: ", "has xmin 'nan', which is not finite"),
    "inf": (change("30</xmax>", "inf</xmax>"), "img1.xml:13: ", "has xmax 'inf', which is not finite"),
    "far": (change("30</xmax>", "1e12</xmax>"), "img1.xml:13: ", "beyond any image"),
    "long-number": (change("30</xmax>", f"{'9' * 5000}</xmax>"), "img1.xml:13: ", "99..., which is not finite"),
    "swapped-x": (change("11</xmin>", "31</xmin>"), "img1.xml:13: ", "object 1 ('dog') has xmax below xmin"),
    "swapped-y": (change("6</ymin>", "16</ymin>", "Annotations/v1.xml"), "v1.xml:13: ", "has ymax below ymin"),
    "second-object": (change("31</xmin>", "x</xmin>"), "img1.xml:23: ", "object 2 ('cat') has xmin 'x'"),
    "rotated": (
        several(change("<bndbox>", "<robndbox>"), change("</bndbox>", "</robndbox>")),
        "img1.xml:13: ",
        "rotated box, which is not read",
    ),
    "two-boxes": (
        change("</bndbox>", "</bndbox><bndbox><xmin>1</xmin></bndbox>"),
        "img1.xml:",
        "has two <bndbox>; leave one of them",
    ),
    "corner-twice": (change("</xmax>", "</xmax><xmax>60</xmax>"), "img1.xml:", "has two <xmax>; leave one of them"),
    "half-a-point": (
        several(
            change("<bndbox>", "<polygon><x1>1</x1><y1>2</y1><x2>9</x2></polygon><none>"),
            change("</bndbox>", "</none>"),
        ),
        "img1.xml:",
        "has a polygon of points that lack an x or a y",
    ),
    "empty-polygon": (
        several(change("<bndbox>", "<polygon>"), change("</bndbox>", "</polygon>")),
        "img1.xml:13: ",
        "a polygon without points",
    ),
    "difficult": (
        change("<pose>Left</pose>", "<difficult>yes</difficult>"),
        "img1.xml:12: ",
        "difficult 'yes'; give 0",
    ),
    "shares": (shares, "train.txt: ", "within [0, 1]"),
    "width-word": (change(">64<", ">wide<"), "img1.xml:5: ", "<size> has width 'wide'"),
    "half-a-pixel": (change(">64<", ">64.5<"), "img1.xml:5: ", "whole pixels"),
    "negative-height": (change(">48<", ">-48<"), "img1.xml:6: ", "<size> has height '-48'"),
    "huge-width": (change(">64<", ">1000000<"), "img1.xml:5: ", "at most 100,000"),
    "too-many-pixels": (
        several(change(">64<", ">90000<"), change(">48<", ">90000<")),
        "img1.xml:4: ",
        "the image is 90000x90000 pixels",
    ),
    "other-size": (
        change(">64<", ">65<"),
        "train.txt: ",
        "img1.jpg: the file is 64x48 pixels, its annotation says 65x48",
    ),
    "missing-image": (gone("JPEGImages/img2.jpg"), "train.txt: ", "JPEGImages/img2.jpg is missing; put it there"),
    "other-case": (
        lambda r: (r / "JPEGImages/img2.jpg").rename(r / "JPEGImages/IMG2.jpg"),
        "img2.jpg is missing, but there is 'IMG2.jpg'; rename the file or remove",
        "",
    ),
    "beside": (
        lambda r: (r / "JPEGImages/img2.jpg").rename(r / "img2.jpg"),
        "img2.jpg is missing, but there is ",
        "/set/img2.jpg; move it there",
    ),
    "copied-annotations": (  # the other image is there, and has annotations of its own
        several(gone("JPEGImages/img2.jpg"), change("img2.jpg", "img1.jpg", "Annotations/img2.xml")),
        "train.txt: ",
        "JPEGImages/img2.jpg is missing",
    ),
    "one-image-twice": (
        several(
            lambda r: (r / "JPEGImages/img1.jpg").rename(r / "JPEGImages/x.jpg"),
            gone("JPEGImages/img2.jpg"),
            change("img1.jpg", "x.jpg"),
            change("img2.jpg", "x.jpg", "Annotations/img2.xml"),
        ),
        "img2.xml: ",
        "<filename> is 'x.jpg', as that of img1.xml",
    ),
    "two-images": (second_image, "img1.xml: ", "img1.jpg and img1.png are both there for it"),
    "image-pipe": (pipe("JPEGImages/img1.jpg"), "JPEGImages/img1.jpg: is no file", ""),
    "image-pipe-without-size": (
        several(pipe("JPEGImages/img1.jpg"), change("<width>64</width>", "")),
        "JPEGImages/img1.jpg: is no file",
        "",
    ),
    "unreadable-without-size": (
        several(become(b"hi", "JPEGImages/img1.jpg"), change("<width>64</width>", "")),
        "train.txt: ",
        "img1.jpg: not an image",
    ),
    "cut-off-image": (cut("JPEGImages/v1.jpg", 0.5), "val.txt: ", "v1.jpg: the file is cut off"),
    "not-annotated": (gone(IMG1), "train.txt:1: image 'img1' has no file ", "Annotations/img1.xml; add it"),
    "val-not-annotated": (gone("Annotations/v2.xml"), "val.txt:2: image 'v2' has no file ", "Annotations/v2.xml"),
    "image-twice": (rows("img1\nimg2\n\nimg1.jpg\n"), "train.txt:4: ", "'img1.jpg' is there already, in line 1"),
    "second-column": (rows("img1 1\nimg2 -1\n"), "train.txt:1: ", "image 'img1 1' has no file"),
    "parent": (rows("img1\n../../etc/passwd\n"), "train.txt:2: ", "leads out of the folder"),
    "absolute": (rows("/etc/passwd\n"), "train.txt:1: ", "'/etc/passwd' leads out"),
    "zero-byte": (rows("img1\0\n"), "train.txt:1: ", r"'img1\x00' has control characters; correct the line"),
    "empty-list": (rows("\n\n"), "train.txt: ", "the list is empty"),
    "list-of-odd-text": (rows("img1\nimg\x1b2\n"), "train.txt:2: ", r"'img\x1b2' has control characters"),
    "empty-val-list": (rows("", "val"), "val.txt: ", "or remove the file and give --val-share 0.2"),
    "image-of-two-lines": (
        several(
            lambda root: (root / "JPEGImages/img1.jpg").rename(root / "JPEGImages/a\nb.jpg"),
            lambda root: (root / IMG1).rename(root / "Annotations/a\nb.xml"),
            gone("ImageSets"),
        ),
        r"Annotations: 'a\nb.jpg' has control characters",
        "rename the file",
    ),
    "list-in-utf-16": (become("img1\n".encode("utf-16"), LIST), "train.txt:1: ", "save the list in UTF-8"),
    "list-pipe": (pipe(LIST), "train.txt: ", "is no file"),
    "list-folder": (folder(LIST), "train.txt: ", "is no file"),
    "no-train": (
        gone(LIST),
        "no 'train' split; looked for ImageSets/Main/train.txt",
        "there is ImageSets/Main/val.txt",
    ),
    "no-val": (gone("ImageSets/Main/val.txt"), "no 'val' split", "--val-share 0.2"),
    "no-images": (gone("JPEGImages"), "JPEGImages: no such folder", "put the images there"),
    "no-annotations": (gone("Annotations"), "Annotations: no such folder", "put the XML files there"),
    "no-objects": (no_objects, "the train split has no objects", "annotate"),
    "unknown-class": (become(b"dog\n", "classes.txt"), "img1.xml:21: ", "('cat') is not in the list of classes"),
    "class-twice": (become(b"dog\ncat\ndog\n", "classes.txt"), "classes.txt:3: ", "is there already, in line 1"),
    "no-classes": (become(b"\n", "classes.txt"), "classes.txt: ", "the list of classes is empty"),
    "class-that-cannot-be-shown": (become(b"dog\nc\x07t\n", "labels.txt"), "labels.txt:2: ", r"class 'c\x07t'"),
    "classes-in-latin-1": (become(b"dog\nch\xe4t\n", "labelmap.txt"), "labelmap.txt:2: ", "UTF-8"),
    "classes-pipe": (
        several(become(b"", "classes.txt"), pipe("classes.txt")),
        "classes.txt: ",
        "is no file",
    ),
}

# Each costs a process; what the others say is told in the same way.
THROUGH_COMMANDS = dict(list(BROKEN.items())[::3])


def test_the_untouched_set_passes(broken, command):
    data, folder = broken
    before = sorted(data.rglob("*"))
    status, out, error = command(folder, "dndetr.train", *FLAGS, "--data", str(data))
    assert (status, error) == (0, "") and "4 training and 2 validation images" in out
    assert (folder / "runs/small-1/best.pt").is_file() and sorted(data.rglob("*")) == before


@pytest.mark.parametrize(("breakage", "where", "what"), BROKEN.values(), ids=BROKEN)
def test_broken_sets_are_refused_in_one_line(broken, monkeypatch, breakage, where, what):
    data, folder = broken
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    breakage(data)
    with pytest.raises(DataError) as refused:
        TrainingData(replace(preset_named("small"), data=str(data)))
    message = str(refused.value)
    assert str(data) in message and where in message and what in message and "\n" not in message


@pytest.mark.parametrize(("breakage", "where", "what"), THROUGH_COMMANDS.values(), ids=THROUGH_COMMANDS)
def test_broken_sets_stop_training(broken, command, breakage, where, what):
    data, folder = broken
    breakage(data)
    assert_training_stops(command, data, folder, where, what)


@pytest.mark.parametrize(("breakage", "where", "what"), THROUGH_COMMANDS.values(), ids=THROUGH_COMMANDS)
def test_the_check_lists_what_stops_training(broken, command, breakage, where, what):
    data, folder = broken
    breakage(data)
    assert_check_lists(command, data, folder, where, what)


def test_images_that_cannot_be_read_may_be_skipped(broken, monkeypatch):
    data, folder = broken
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    several(become(b"hi", "JPEGImages/img1.jpg"), change("<width>64</width>", ""))(data)
    config = preset_named("small")
    skipping = replace(config, data=str(data), batch_size=2, images=replace(config.images, skip_unreadable=True))
    (warning,) = [text for text in TrainingData(skipping).warnings if "skipped" in text]
    assert warning.startswith("train: 1 of 4 images cannot be read and are skipped; the first: ")


def test_no_bytes_are_too_strange(good_set, tmp_path):
    """Whatever stands in a file of annotations, reading it ends, with annotations or with a problem."""
    content = (good_set / "Annotations/img1.xml").read_bytes()
    rng = np.random.default_rng(0)
    found = set()
    for number in range(500):
        changed = bytearray(content)
        for place in rng.integers(0, len(content), 1 + number % 3):
            changed[place : place + rng.integers(1, 6)] = rng.bytes(rng.integers(0, 3))
        path = tmp_path / "a.xml"
        path.write_bytes(changed)
        annotation = read_annotation(path)
        found |= {problem.kind for problem in annotation.problems}
        assert len(annotation.names) == len(annotation.corners) == len(annotation.difficult)
        assert np.isfinite(np.array(annotation.corners)).all()
    assert found >= {"XML", "box"}
