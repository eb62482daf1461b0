"""Large splits: all images are looked at once, and then a sample, until a folder or the annotations change."""

import os
import shutil

import numpy as np
import pytest
from coco_folders import write_set
from splits import read_split

from dndetr.data import file_names, known_folders
from dndetr.data.errors import DataError
from dndetr.data.file_names import missing_files
from dndetr.data.folder_dataset import FolderDataset
from dndetr.data.review import image_files
from dndetr.data.review.image_files import check_files
from dndetr.data.transforms import Unresized

NAMES = [f"{place}.png" for place in range(30)] + [f"deep/er/{place}.png" for place in range(10)]


@pytest.fixture(autouse=True)
def large(tmp_path, monkeypatch):
    """A split of 40 images is a large one, and a sample is of 5."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for module in (file_names, known_folders, image_files):
        monkeypatch.setattr(module, "LARGE", 40)
    monkeypatch.setattr(known_folders, "_SAMPLE", 5)
    monkeypatch.setattr(image_files, "_DECODED_PIXELS", 0)
    monkeypatch.setattr(image_files, "_CHUNK", 4)
    monkeypatch.setattr(image_files, "_TOGETHER", 12)


@pytest.fixture
def root(tmp_path):
    return write_set(tmp_path / "set", NAMES, [(0, 3, [1, 2, 3, 4], {})])


@pytest.fixture
def looked_at(monkeypatch):
    """Files that were opened since it was called last."""
    found, examine = [], image_files._examine

    def examining(path):
        found.append(os.path.basename(path))
        return examine(path)

    def since():
        names = found.copy()
        found.clear()
        return names

    monkeypatch.setattr(image_files, "_examine", examining)
    return since


def check(root):
    return check_files(FolderDataset(read_split(root, "train"), Unresized()))


def test_later_starts_look_at_a_sample(root, looked_at):
    check(root)
    assert len(looked_at()) == 40
    seen = set()
    for _ in range(20):
        check(root)
        names = looked_at()
        assert len(names) == 5
        seen |= {*names}
    assert len(seen) > 5  # another one each time


@pytest.mark.parametrize("change", ["added", "renamed", "removed-folder", "annotations", "deep"])
def test_a_change_has_all_looked_at(root, looked_at, change):
    check(root)
    looked_at()
    if change == "added":
        (root / "train" / "new.png").touch()
    elif change == "deep":
        shutil.copy(root / "train" / "0.png", root / "train" / "deep" / "er" / "new.png")
    elif change == "renamed":
        (root / "train" / "0.png").rename(root / "train" / "x.png")
        (root / "train" / "x.png").rename(root / "train" / "0.png")
    elif change == "annotations":
        os.utime(root / "annotations" / "instances_train.json")
    else:
        shutil.rmtree(root / "train" / "deep")
        with pytest.raises(DataError, match=r"deep/er/0.png is missing.* \(and 9 more"):
            check(root)
        return
    check(root)
    assert len(looked_at()) == 40
    check(root)
    assert len(looked_at()) == 5


def test_a_file_that_is_gone_is_told(root):
    for _ in range(2):
        check(root)
    (root / "train" / "7.png").unlink()
    for _ in range(2):  # what was wrong is not remembered as looked at
        with pytest.raises(DataError, match=r"image 951: .*/7.png is missing"):
            check(root)


def test_what_is_wrong_is_what_is_wrong_with_small_splits(root, monkeypatch):
    (root / "train" / "3.png").write_text("no image")
    (root / "train" / "5.png").write_bytes((root / "train" / "5.png").read_bytes()[:-30])
    (root / "train" / "9.png").unlink()
    os.mkfifo(root / "train" / "9.png")
    records = read_split(root, "train")
    shutil.rmtree(root / "train" / "deep")
    many = image_files._problems_of_many(records)
    assert many == image_files.file_problems(records) and len(many) == 13
    (root / "train" / "9.png").unlink()
    listed = missing_files(records)
    monkeypatch.setattr(file_names, "LARGE", 41)
    assert listed == missing_files(records) and len(listed) == 11


def test_smaller_splits_are_looked_at_as_ever(root, looked_at, monkeypatch):
    for module in (file_names, known_folders, image_files):
        monkeypatch.setattr(module, "LARGE", 41)
    check(root)
    check(root)
    assert len(looked_at()) == 40  # those that were good are remembered one by one
    assert not [*(root.parent / "cache" / "dndetr" / "checked").glob("*.json")]


def test_a_cache_that_cannot_be_written_costs_only_time(root, looked_at, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        check(root)
        assert len(looked_at()) == 40


def test_what_is_remembered_may_be_spoilt(root, looked_at):
    check(root)
    for path in (root.parent / "cache" / "dndetr" / "checked").glob("*.json"):
        path.write_text("[1]")
    looked_at()
    check(root)
    assert len(looked_at()) == 40


def test_images_by_their_numbers(root):
    records = read_split(root, "train")
    assert list(records.named(range(40))) == list(enumerate(NAMES))
    assert list(records.named([3, 39])) == [(3, "3.png"), (39, "deep/er/9.png")]
    assert np.array_equal(records.ids[[0, 1]], [1000, 993])
