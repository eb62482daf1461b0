"""Where the parts of a Pascal VOC folder may be, and which images and splits it has then."""

import shutil

import pytest
from PIL import Image
from splits import read_split
from voc_files import DOG, SPLITS, object_xml, put, put_list, write_voc

from dndetr.data.errors import DataError
from dndetr.data.folder_dataset import FolderDataset
from dndetr.data.natural_order import natural_key
from dndetr.data.source import open_source
from dndetr.data.transforms import Unresized


@pytest.fixture
def home(tmp_path):
    return write_voc(tmp_path / "set", SPLITS)


@pytest.mark.parametrize(
    ("place", "about"),
    [
        (".", "ImageSets/Main"),
        ("VOC2012", "VOC2012/ImageSets/Main"),
        ("VOCdevkit/VOC2007", "VOCdevkit/VOC2007/ImageSets/Main"),
    ],
)
def test_a_folder_above_may_be_given(tmp_path, place, about):
    write_voc(tmp_path / place, SPLITS)
    source = open_source(tmp_path)
    assert (source.root, source.about, source.splits) == (tmp_path, f"Pascal VOC, {about}", ("train", "val"))
    assert len(source.read("train")) == 2


@pytest.mark.parametrize("place", [".", "Roboflow.v1"])
def test_xml_files_may_lie_beside_their_images_in_a_folder_per_split(home, tmp_path, place):
    beside = tmp_path / "beside" / place
    for folder, stems in (("train", "ab"), ("valid", "c")):
        (beside / folder).mkdir(parents=True)
        for file in (f"{part}/{stem}" for stem in stems for part in ("JPEGImages", "Annotations")):
            shutil.copy(next(home.glob(f"{file}.*")), beside / folder)
    (beside / "train/b.jpg").rename(beside / "train/other.jpg")
    put(home, "b", object_xml(*DOG), file_name="other.jpg")
    shutil.copy(home / "Annotations/b.xml", beside / "train")
    source = open_source(tmp_path / "beside")
    assert (source.about, source.splits) == ("Pascal VOC, XML files beside the images", ("train", "val"))
    assert source.read("train").names == ["train/a.jpg", "train/other.jpg"]
    assert source.read("val").names == ["valid/c.jpg"]
    assert source.read("val").classes == source.read("train").classes == [(1, "cat"), (2, "dog")]
    assert len(FolderDataset(source.read("train"), Unresized())) == 2
    shutil.rmtree(beside / "valid")
    with pytest.raises(DataError, match=r"no 'val' split; looked for .*valid.*; there is .*train; to set a fifth"):
        open_source(tmp_path / "beside").read("val")


def test_xml_files_may_lie_beside_their_images_in_one_folder(home, tmp_path):
    flat = shutil.copytree(home / "JPEGImages", tmp_path / "flat")
    shutil.copytree(home / "Annotations", flat, dirs_exist_ok=True)
    source = open_source(flat)
    assert source.splits == ("train",) and source.read("train").names == ["a.jpg", "b.jpg", "c.jpg"]


def test_xml_files_of_other_kinds_are_no_data_set(tmp_path):
    (tmp_path / "pom.xml").write_text("<project/>")
    Image.new("RGB", (4, 4)).save(tmp_path / "logo.png")
    with pytest.raises(DataError, match="no annotations here"):
        open_source(tmp_path)


def test_of_several_below_one_is_to_be_given(tmp_path):
    for name in ("VOC2007", "VOC2012"):
        write_voc(tmp_path / name, SPLITS)
    with pytest.raises(DataError, match="several Pascal VOC folders, VOC2007, VOC2012; give one of them"):
        open_source(tmp_path)


def test_what_lies_deeper_is_not_looked_for(tmp_path):
    write_voc(tmp_path / "one/two/three", SPLITS)
    with pytest.raises(DataError, match="no annotations here"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("lists", "splits"),
    [
        ({"train": "a\n", "val": "c\n", "trainval": "a\nc\n", "test": "b\n"}, {"train": "a", "val": "c", "test": "b"}),
        ({"train": "a\n", "valid": "c\n"}, {"train": "a", "val": "c"}),
        ({"training": "a\n", "validation": "c\n"}, {"train": "a", "val": "c"}),
        ({"train": "a\n", "training": "b\n", "val": "c\n", "val2017": "b\n"}, {"train": "a", "val": "c"}),
        ({"trainval": "a\nc\n", "test": "b\n"}, {"train": "ac", "test": "b"}),
        ({"default": "b\nc\na\n"}, {"train": "bca"}),
        ({"trainval": "a\nc\n", "val": "c\n"}, {"val": "c"}),  # training on all would be training on what is tested
        ({"train": "a\n", "dog_train": "a  1\nb -1\n", "dog_val": "c 0\n", "val": "b\n"}, {"train": "a", "val": "b"}),
        ({"train": "a\n", "val": "b\n", "test": "000001\n"}, {"train": "a", "val": "b"}),  # of a competition
        ({"train": "a\n", "val": "b\n", "test": ""}, {"train": "a", "val": "b"}),
        ({}, {"train": "abc"}),
    ],
    ids=lambda value: " ".join(value) or "none",
)
@pytest.mark.parametrize("folder", ["ImageSets/Main", "ImageSets"])
def test_splits_are_found(tmp_path, folder, lists, splits):
    home = write_voc(tmp_path, SPLITS, lists="")
    for name, text in lists.items():
        put_list(home, name, text, folder)
    source = open_source(home)
    assert source.splits == tuple(splits)
    for split, images in splits.items():
        records = source.read(split)
        assert records.names == [f"{name}.jpg" for name in images] and records.problems == []


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfb\r\n\r\na.jpg\r\n",
        b'"b"\n a \n\n',
        b"b.JPG\na",
        b"b\ra\r",
    ],
    ids=["windows", "quoted", "endings", "old-mac"],
)
def test_lists_are_read_as_tools_write_them(home, content):
    put_list(home, "train", content)
    assert read_split(home, "train").names == ["b.jpg", "a.jpg"]


def test_a_set_without_lists_is_in_natural_order_and_can_be_divided(tmp_path):
    names = [f"img{number}" for number in (1, 2, 9, 10, 11, 100)]
    home = write_voc(tmp_path, {"train": {name: [DOG] for name in reversed(names)}}, lists="")
    source = open_source(home)
    assert (source.about, source.splits) == ("Pascal VOC, Annotations", ("train",))
    assert source.read("train").names == [f"{name}.jpg" for name in names]
    with pytest.raises(DataError, match=r"no 'val' split; .*val.txt.*; there is Annotations.*--val-share 0.2"):
        source.read("val")
    divided = open_source(home, val_share=0.5)
    assert {*divided.read("train").names, *divided.read("val").names} == {f"{name}.jpg" for name in names}
    assert len(divided.read("val")) == 3


def test_natural_order():
    names = ["b", "a10", "a2", "a", "2", "10", "a02", "a2b", "1a"]
    assert sorted(names, key=natural_key) == ["1a", "2", "10", "a", "a02", "a2", "a2b", "a10", "b"]
    names = ["a/b10.jpg", "a-1", "a 1", "a1-2", "a1", "a0", "a" + "9" * 40, "a1" + "0" * 40, "a00"]
    numbers_as_such = ["a0", "a00", "a1", "a1-2", "a" + "9" * 40, "a1" + "0" * 40, "a 1", "a-1", "a/b10.jpg"]
    assert sorted(names, key=natural_key) == numbers_as_such


def test_what_no_list_has_is_left_out_and_said_once(home):
    put_list(home, "train", "a\n")
    put(home, "b", object_xml("wolf", (1, 1, 5, 5)))
    assert read_split(home, "train").classes == [(1, "cat"), (2, "dog")]
    assert read_split(home, "train").remarks == ["1 annotated image in no list of ImageSets left out"]
    assert read_split(home, "val").remarks == []


def test_links_to_folders_are_followed_but_not_in_circles(home, tmp_path):
    for folder, ending in (("JPEGImages", "jpg"), ("Annotations", "xml")):
        (tmp_path / folder).mkdir()
        (home / folder / f"a.{ending}").rename(tmp_path / folder / f"a.{ending}")
        (home / folder / "day").symlink_to(tmp_path / folder)
        (tmp_path / folder / "up").symlink_to(home / folder)
    put_list(home, "train", "day/a\nb\n")
    assert read_split(home, "train").names == ["day/a.jpg", "b.jpg"]


def test_a_folder_per_split_may_be_a_link(tmp_path):
    home = tmp_path / "beside"
    for split in SPLITS:
        write_voc(tmp_path / split, {split: SPLITS[split]}, lists="")
        for part in ("JPEGImages", "Annotations"):
            for path in (tmp_path / split / part).iterdir():
                path.rename(tmp_path / split / path.name)
            (tmp_path / split / part).rmdir()
        home.mkdir(exist_ok=True)
        (home / split).symlink_to(tmp_path / split)
    assert open_source(home).splits == ("train", "val")
    assert read_split(home, "train").names == ["train/a.jpg", "train/b.jpg"]


@pytest.mark.parametrize("lists", ["ImageSets/Main", ""])
def test_endings_may_be_in_upper_case(tmp_path, lists):
    home = write_voc(tmp_path, SPLITS, lists=lists)
    before = read_split(home, "train")
    (home / "Annotations/a.xml").rename(home / "Annotations/a.XML")
    (home / "JPEGImages/b.jpg").rename(home / "JPEGImages/b.JPG")
    records = read_split(home, "train")
    assert records.problems == [] and [name.lower() for name in records.names] == before.names
    assert records.objects.boxes.tolist() == before.objects.boxes.tolist()


def test_subfolders(home):
    for folder, ending in (("JPEGImages", "jpg"), ("Annotations", "xml")):
        (home / folder / "day").mkdir()
        (home / folder / f"a.{ending}").rename(home / folder / "day" / f"a.{ending}")
    put_list(home, "train", "day/a\nb\n")
    assert read_split(home, "train").names == ["day/a.jpg", "b.jpg"]


@pytest.mark.parametrize(
    ("on_disk", "written", "found"),
    [
        (["a.png"], "a.jpg", "a.png"),
        (["a.jpg"], "b.jpg", "a.jpg"),  # copied from another file's annotations
        (["a.JPEG"], "a", "a.JPEG"),
        (["photo.png"], "photo.png", "photo.png"),
        (["photo.png"], "C:\\my photos\\photo.png", "photo.png"),
        (["a.png", "a.jpg"], "a.png", "a.png"),
    ],
)
def test_the_image_of_an_annotation_is_found(home, on_disk, written, found):
    (home / "JPEGImages/a.jpg").unlink()
    for name in on_disk:
        Image.new("RGB", (64, 48)).save(home / "JPEGImages" / name)
    put(home, "a", object_xml(*DOG), file_name=written)
    records = read_split(home, "train")
    assert records.names == ["b.jpg", found] and FolderDataset(records, Unresized())[1].pixels.shape == (48, 64, 3)


def test_images_may_be_called_images(home):
    (home / "JPEGImages").rename(home / "images")
    (home / "Annotations").rename(home / "annotations")
    shutil.rmtree(home / "ImageSets")
    records = FolderDataset(read_split(home, "train"), Unresized()).records
    assert records.names == ["a.jpg", "b.jpg", "c.jpg"]


def test_files_that_systems_hide_are_passed_over(home):
    shutil.rmtree(home / "ImageSets")
    (home / "Annotations/._a.xml").write_bytes(b"\0\1")
    assert len(read_split(home, "train")) == 3 and read_split(home, "train").problems == []
