"""What was read of YOLO's labels is remembered: only files that change, or are wrong, are read again."""

import os
import shutil

import pytest
from PIL import Image
from splits import read_split
from yolo_sets import write_yolo

from dndetr.data.formats import labels_cache, yolo_labels


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dndetr"


@pytest.fixture
def folder(tmp_path):
    return write_yolo(tmp_path / "set")


def test_files_are_read_once_until_they_change(folder, monkeypatch, cache):
    read, read_labels = [], yolo_labels._read_labels
    monkeypatch.setattr(
        yolo_labels,
        "_read_labels",
        lambda label, shape: read.append(os.path.basename(label)) or read_labels(label, shape),
    )
    first = read_split(folder, "train")
    assert len(read) == 4
    for change, expected in (
        (lambda: None, []),
        (lambda: (folder / "labels/train/train_1.txt").write_text("1 0.5 0.5 0.5 0.5\n"), ["train_1.txt"]),
        (lambda: (folder / "labels/train/train_3.txt").write_text("0 0.5 0.5 0.5 0.5\n"), ["train_3.txt"]),
        (lambda: Image.new("RGB", (32, 16)).save(folder / "images/train/train_2.png"), ["train_2.txt"]),
        (lambda: (folder / "images/train/train_0.png").rename(folder / "images/train/z.png"), ["z.txt"]),
        (lambda: None, []),
    ):
        change()
        read.clear()
        records = read_split(folder, "train")
        assert read == expected
        fresh = read_from_nothing(folder, monkeypatch)
        assert records.names == fresh.names and (records.sizes == fresh.sizes).all()
        assert all((a == b).all() for a, b in zip(records.objects, fresh.objects, strict=True))
    assert len(first) == 4 and sorted(path.name for path in folder.iterdir()) == ["data.yaml", "images", "labels"]
    assert list(cache.rglob("*.npz"))


def test_what_is_wrong_is_read_again_and_nothing_else(folder, monkeypatch):
    (folder / "labels/train/train_0.txt").write_text("0 0.5 0.5\n")
    (folder / "images/train/train_1.jpg").write_text("hello")
    before, read, upright_size = read_split(folder, "train"), [], yolo_labels.upright_size

    def counted(path):
        read.append(os.path.basename(path))
        return upright_size(path)

    monkeypatch.setattr(yolo_labels, "upright_size", counted)
    again = read_split(folder, "train")
    assert read == ["train_0.png", "train_1.jpg"] and again.problems == before.problems
    assert all((a == b).all() for a, b in zip(before.objects, again.objects, strict=True))
    assert len(again.objects.label) == 2


def test_a_link_that_breaks_is_noticed_though_the_image_is_remembered(folder):
    label = folder / "labels/train/train_3.txt"
    assert read_split(folder, "train").problems == []  # train_3 has no labels
    label.symlink_to(folder / "gone.txt")
    (problem,) = read_split(folder, "train").problems
    assert problem.where == f"{label}:1" and "leads nowhere" in problem.message


def read_from_nothing(folder, monkeypatch):
    with monkeypatch.context() as context:
        context.setenv("XDG_CACHE_HOME", str(folder.parent / "nothing"))
        shutil.rmtree(folder.parent / "nothing", ignore_errors=True)
        context.setattr(labels_cache.LabelsCache, "keep", lambda *_: None)
        return read_split(folder, "train")


@pytest.mark.parametrize("spoil", ["garbage", "cut", "in-the-way"])
def test_a_cache_that_cannot_be_used_only_costs_time(folder, cache, spoil):
    before = read_split(folder, "train")
    if spoil == "in-the-way":
        shutil.rmtree(cache)
        cache.write_text("in the way")
    else:
        for path in cache.rglob("*.npz"):
            path.write_bytes(b"x" * 99 if spoil == "garbage" else path.read_bytes()[:-200])
    assert (read_split(folder, "train").objects.boxes == before.objects.boxes).all()
