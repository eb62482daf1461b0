"""What the check of image files sees, what it remembers, and what it may cost."""

import os
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from splits import read_split

from dndetr.data.errors import DataError
from dndetr.data.folder_dataset import FolderDataset
from dndetr.data.image import KEPT, TURNED, UNDECIDED
from dndetr.data.records import make_objects
from dndetr.data.review import image_files
from dndetr.data.review.image_files import MISSING, SIZE, UNREADABLE, check_files, file_problems, turn_remarks
from dndetr.data.source import open_source
from dndetr.data.training import TrainingData
from dndetr.data.transforms import Unresized
from dndetr.presets import small


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dndetr" / "checked"


@pytest.fixture
def split(make_document, make_folder):
    """A split with the images 0.png and 1.png of 60x40 pixels, ids 11 and 12."""
    return read_split(make_folder(make_document(images=((40, 60),) * 2)), "train")


def problems(split, names, decode=False, **sizes):
    found = file_problems(listing(split, names, **sizes), decode)
    return [(problem.index, problem.kind) for problem in found]


def listing(split, names, height=40, width=60):
    """The split with other images, with ids from 11 on."""
    ids, sizes = 11 + np.arange(len(names)), np.array([(height, width)] * len(names))
    return replace(split, names=list(names), ids=ids, sizes=sizes, objects=make_objects([], [], []))


def opened(monkeypatch):
    """Names of the files that are looked into from now on."""
    names, examine = [], image_files._examine

    def examining(path):
        names.append(os.path.basename(path))
        return examine(path)

    monkeypatch.setattr(image_files, "_examine", examining)
    return names


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.jpg", {}),
        ("a.jpg", {"progressive": True}),
        ("a.jpg", {"comment": b"\xff\xd9" * 4000}),
        ("a.jpg", {"exif": b"Exif\0\0" + b"\xff\xd9" * 30000}),
        ("a.png", {}),
        ("a.webp", {}),
        ("a.bmp", {}),
        ("a.gif", {}),
        ("a.tif", {}),
    ],
    ids=["jpeg", "progressive", "long-comment", "long-metadata", "png", "webp", "bmp", "gif", "tiff"],
)
def test_sizes_and_ends_of_every_kind_of_file(split, name, options):
    path = split.folder / name
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path, **options)
    assert problems(split, [name]) == problems(split, [name], decode=True) == []
    assert problems(split, [name], width=61) == problems(split, [name], decode=True, width=61) == [(0, SIZE)]
    assert problems(split, [name], width=40, height=60) == [(0, SIZE)]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert problems(split, [name], decode=True) == [(0, UNREADABLE)]
    if name not in ("a.bmp", "a.gif", "a.tif"):  # these are only known to be cut off when they are decoded
        assert problems(split, [name]) == [(0, UNREADABLE)]
        path.write_bytes(whole + b"written on by a camera" * 10)
        assert problems(split, [name]) == []


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "LA", "P", "I;16", "1"])
def test_every_mode_passes(split, mode):
    picture = Image.new(mode, (60, 40))
    name = "a.jpg" if mode == "CMYK" else "a.png"
    picture.save(split.folder / name)
    assert problems(split, [name]) == problems(split, [name], decode=True) == []


def test_turned_images_may_state_either_size(split):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(split.folder / "turned.jpg", exif=exif)
    assert problems(split, ["turned.jpg"]) == problems(split, ["turned.jpg"], width=40, height=60) == []
    assert problems(split, ["turned.jpg"], width=40, height=61) == [(0, SIZE)]


def test_files_that_are_turned_kept_and_undecided_are_counted_and_remembered(split, monkeypatch):
    tags, names = Image.Exif(), []
    for name, orientation, size in [("a.jpg", 6, (40, 60)), ("b.png", 8, (60, 40)), ("c.tif", 5, (60, 40)),
                                    ("d.jpg", 3, (60, 40)), ("e.png", 1, (60, 40))]:  # fmt: skip
        tags[0x0112] = orientation
        Image.new("RGB", size).save(split.folder / name, exif=tags)
        names.append(name)
    listed = listing(split, names)
    for _ in range(2):
        turns = Counter()
        assert file_problems(listed, decode=True, turns=turns) == []
        assert turns == {TURNED: 1, KEPT: 2, UNDECIDED: 1}
        assert [remark.split(" EXIF")[0] for remark in turn_remarks(turns)] == [
            "1 image turned upright by",
            "2 images kept as stored against",
            "1 image turned upright by",
        ]
        names = opened(monkeypatch)
    assert names == []


def test_fingerprints_are_those_of_the_pixels_and_remembered(split, monkeypatch):
    tags = Image.Exif()
    tags[0x0112] = 3
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    picture.save(split.folder / "a.png")
    picture.save(split.folder / "b.png", compress_level=1, dpi=(72, 72))
    picture.save(split.folder / "c.bmp")
    picture.transpose(Image.Transpose.ROTATE_180).save(split.folder / "d.png", exif=tags)
    picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(split.folder / "e.png")
    (split.folder / "f.png").write_text("hello")
    listed = listing(split, ["a.png", "b.png", "c.bmp", "d.png", "e.png", "f.png"])
    names = opened(monkeypatch)
    for expected in (listed.names, ["f.png"]):
        pixels = {}
        file_problems(listed, decode=True, fingerprints=pixels)
        assert list(pixels) == [0, 1, 2, 3, 4]
        assert len(set(pixels.values())) == 2 and pixels[0] == pixels[1] == pixels[2] == pixels[3]
        assert names == expected
        names.clear()
    file_problems(listed, fingerprints=(undecoded := {}))
    assert undecoded == {}


def test_problems_come_in_order_and_name_image_and_file(split):
    (split.folder / "text.png").write_text("hello")
    found = file_problems(listing(split, ("none.png", "0.png", "text.png")))
    assert [(problem.index, problem.kind) for problem in found] == [(0, MISSING), (2, UNREADABLE)]
    assert found[0].message.startswith(f"image 11: {split.folder}/none.png is missing;")
    assert found[1].message.startswith(f"image 13: {split.folder}/text.png: not an image")


def test_good_files_are_not_opened_again_until_they_change(split, monkeypatch, cache):
    names = opened(monkeypatch)
    for expected in (["0.png", "1.png"], []):
        assert problems(split, ["0.png", "1.png"]) == []
        assert names == expected
        names.clear()
    path = split.folder / "1.png"
    before = path.stat()
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_size == before.st_size
    for _ in range(2):  # what is wrong is not remembered
        assert problems(split, ["0.png", "1.png"]) == [(1, UNREADABLE)]
        assert names == ["1.png"]
        names.clear()
    assert problems(split, ["0.png"], width=61) == [(0, SIZE)]
    assert all(cache in path.parents for path in cache.rglob("*"))
    assert sorted(path.name for path in split.folder.iterdir()) == ["0.png", "1.png"]


def test_both_sides_of_a_divided_set_are_remembered(split, monkeypatch):
    names = opened(monkeypatch)
    for expected in (["0.png", "1.png"], []):
        source = open_source(split.root, val_share=0.5)
        for side in ("train", "val"):
            assert file_problems(source.read(side), decode=True) == []
        assert sorted(names) == expected
        names.clear()


def test_decoding_counts_for_less_but_not_the_other_way(split, monkeypatch):
    problems(split, ["0.png"])
    names = opened(monkeypatch)
    problems(split, ["0.png", "1.png"], decode=True)
    assert names == ["0.png", "1.png"]
    problems(split, ["0.png", "1.png"])
    assert names == ["0.png", "1.png"]


@pytest.mark.parametrize("spoil", ["file-in-the-way", "garbage", "no-home"])
def test_a_cache_that_cannot_be_used_only_costs_time(split, monkeypatch, cache, spoil):
    if spoil == "file-in-the-way":
        cache.parent.parent.write_text("in the way")
    elif spoil == "no-home":
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        monkeypatch.setattr(image_files.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    else:
        problems(split, ["0.png"])
        for path in cache.iterdir():
            path.write_bytes(b"garbage" * 5)
    names = opened(monkeypatch)
    assert problems(split, ["0.png", "none.png"]) == [(1, MISSING)]
    assert names == ["0.png"]


def test_unreadable_images_leave_data_and_ground_truth(split, make_folder, make_document):
    (split.folder / "0.png").write_text("hello")
    dataset = FolderDataset(read_split(split.root, "train"), Unresized())
    with pytest.raises(DataError, match=r"instances_train.json: image 11: .*0.png: not an image"):
        check_files(dataset)
    (said,) = check_files(dataset, skip_unreadable=True)
    assert said.startswith("train: 1 of 2 images cannot be read and are skipped; the first: image 11: ")
    assert (len(dataset), dataset.ids, dataset.counts, dataset.class_counts) == (1, [12], [1], [0, 1])
    truth = dataset.records.coco_dict()
    assert [image["id"] for image in truth["images"]] == [entry["image_id"] for entry in truth["annotations"]] == [12]
    assert dataset[0].image_id == 12
    (split.folder / "1.png").write_text("hello")
    with pytest.raises(DataError, match="not one image can be read"):
        check_files(FolderDataset(read_split(split.root, "train"), Unresized()), skip_unreadable=True)


def test_skipping_excuses_no_other_mistake(split, make_folder, make_document):
    content = make_document(images=((40, 60),) * 2)
    content["images"][0]["width"] = 61
    (split.folder / "1.png").write_text("hello")
    shutil.copy(split.folder / "0.png", split.folder / "keep")
    make_folder(content)
    shutil.move(split.folder / "keep", split.folder / "0.png")
    with pytest.raises(DataError, match=r"image 11: .*the file is 60x40 pixels"):
        check_files(FolderDataset(read_split(split.root, "train"), Unresized()), skip_unreadable=True)


def test_an_image_that_breaks_later_is_named_with_its_id(split):
    dataset = FolderDataset(read_split(split.root, "train"), Unresized())
    check_files(dataset)
    (split.folder / "1.png").write_text("hello")
    with pytest.raises(DataError, match=r"^image 12: .*train/1.png: not an image"):
        dataset.sample(1)


def test_remarks_count_what_is_not_used(make_document, make_folder):
    boxes = ((-5, -5, 20, 20), (5, 5, 0, 0), (70, 5, 5, 5), (1, 1, 59.5, 2), (1, 1, 2, 2))
    content = make_document(images=((40, 60),), boxes=boxes)
    content["annotations"][-1]["iscrowd"] = 1
    content["images"].append({"id": 99, "file_name": "empty.png", "height": 8, "width": 8})
    assert FolderDataset(read_split(make_folder(content), "train"), Unresized()).remarks == [
        "1 crowd region left out of training",
        "1 box without area left out",
        "1 box outside the image left out",
        "1 box clipped to the image",
        "1 image without objects",
    ]


@pytest.mark.parametrize(
    ("flags", "reasons"),
    [
        ({}, ["frozen norm", "2 images are few"]),
        ({"norm": "batch"}, ["2 images are few"]),
        ({"init": "weights.pt"}, []),
        ({"resume": "run"}, []),
    ],
    ids=["frozen", "batch-norm", "init", "resume"],
)
def test_training_from_scratch_on_little_data_is_warned_of(split, make_folder, make_document, flags, reasons):
    make_folder(make_document(images=((40, 60),)), "val")
    config = small()
    backbone = replace(config.model.backbone, norm=flags.pop("norm", "frozen"))
    model = replace(config.model, backbone=backbone)
    data = TrainingData(replace(config, data=str(split.root), batch_size=1, model=model, **flags))
    assert len(data.warnings) == bool(reasons)
    assert all(reason in data.warnings[0] and "--init FILE" in data.warnings[0] for reason in reasons)
