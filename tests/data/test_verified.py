"""Which classes were looked for: read from COCO's JSON, kept by all that is done to records, and what samples say."""

import json

import numpy as np
import pytest
import torch
from coco_folders import document
from lvis_folders import change, write_lvis
from splits import read_split

from dndetr import convert
from dndetr.data.collate import collate
from dndetr.data.errors import DataError
from dndetr.data.folder_dataset import FolderDataset
from dndetr.data.formats.coco_verified import Stated
from dndetr.data.transforms import FixedTraining, Unresized
from dndetr.data.verified import Verified, make_lists

CLASSES = [(2, "apple"), (4, "bead"), (6, "cup"), (8, "dish")]


@pytest.fixture
def lvis(tmp_path):
    return write_lvis(tmp_path / "lvis", 6)


def read_verified(images, classes):
    """What images state that come in blocks of two."""
    stated = Stated()
    for at in range(0, len(images), 2):
        fields = ("id", "neg_category_ids", "not_exhaustive_category_ids")
        stated.add(tuple(map(image.get, fields)) for image in images[at : at + 2])
    return stated.verified({number: label for label, (number, _) in enumerate(classes)})


def rows(lists):
    return [lists.of(image).tolist() for image in range(len(lists.starts) - 1)]


@pytest.mark.parametrize("given", [[], [[]], [[], []], [[3]], [[1, 2], [], [0], [], [5, 4, 3]]])
def test_lists(given):
    lists = make_lists(given)
    assert rows(lists) == given and lists.labels.dtype == lists.starts.dtype == np.int64
    for chosen in ([], [*range(len(given))], [*range(0, len(given), 2)], [*range(1, len(given))]):
        assert rows(lists.take(np.array(chosen, np.int64))) == [given[image] for image in chosen]


def test_what_documents_state():
    images = [
        {"neg_category_ids": [8, 2], "not_exhaustive_category_ids": []},
        {},
        {"not_exhaustive_category_ids": [4, 6.0]},
        {"neg_category_ids": None, "not_exhaustive_category_ids": None},
        {"neg_category_ids": [], "not_exhaustive_category_ids": []},
        {"neg_category_ids": [99]},  # of a category that is no class, as one that only names others
    ]
    verified = read_verified(images, CLASSES)
    assert verified.stated.tolist() == [True, False, True, False, True, True]
    assert rows(verified.absent) == [[3, 0], [], [], [], [], []]
    assert rows(verified.partial) == [[], [], [1, 2], [], [], []]
    fields = verified.fields([2, 4, 6, 8])
    assert fields[0] == images[0] and fields[1] == fields[3] == {} and fields[4] == images[4]
    assert read_verified(images, []).fields([])[0] == images[4]
    for nothing in ([], [{}, {}], [images[3]]):
        assert read_verified(nothing, CLASSES) is None


@pytest.mark.parametrize(
    ("image", "annotated", "unverified"),
    [
        (0, [], [True, False, True, True]),  # 1 is absent
        (0, [0, 0], [False, False, True, True]),
        (1, [0, 2], [True, False, False, True]),  # 0 is not exhaustive, 1 and 2 are absent
        (2, [3], [False] * 4),  # nothing is stated
        (3, [], [True] * 4),  # that nothing was looked for is stated
    ],
)
def test_what_is_no_negative(image, annotated, unverified):
    stated = np.array([True, True, False, True])
    verified = Verified(stated, make_lists([[1], [1, 2], [], []]), make_lists([[], [0], [], []]))
    found = verified.unverified(image, np.array(annotated, np.int64), 4)
    assert found.tolist() == unverified
    assert verified.take(np.array([image])).unverified(0, np.array(annotated, np.int64), 4).tolist() == unverified


def test_samples_and_batches_of_a_training_set(lvis):
    records = read_split(lvis, "train")
    dataset = FolderDataset(records, FixedTraining(canvas=(24, 32)), federated=True)
    samples = [dataset.sample(index) for index in range(6)]
    found = [sample.unverified.tolist() for sample in samples]
    # Image 0: apples not exhaustive, beads and eggs there, nothing absent; image 1: apples and cups, dishes absent.
    assert found[0] == [True, False, True, True, False]
    assert found[1] == [False, True, False, False, True]
    assert found[5] == [False] * 5
    batch = collate(samples)
    assert batch.targets.unverified.tolist() == found and batch.targets.unverified.dtype == torch.bool
    dataset.leave_out([0, 3])
    assert [dataset.sample(index).unverified.tolist() for index in range(4)] == [found[n] for n in (1, 2, 4, 5)]
    plain = FolderDataset(records, Unresized())
    assert plain.sample(0).unverified is None and collate([plain.sample(0)]).targets.unverified is None


def test_an_object_that_training_leaves_out_was_annotated_all_the_same(lvis):
    change(lvis, lambda document: document["annotations"][1].update(bbox=[500, 5, 3, 3]))  # outside of its image
    dataset = FolderDataset(read_split(lvis, "train"), Unresized(), federated=True)
    assert dataset.labels(0) == [0, 4] and not dataset.sample(0).unverified[1]


def test_data_annotated_in_full_have_no_use_for_the_option(make_document, make_folder):
    records = read_split(make_folder(make_document()), "train")
    assert records.verified is None
    with pytest.raises(DataError, match=r"instances_train.json: --loss.federated: no image has neg_category_ids or "):
        FolderDataset(records, Unresized(), federated=True)


def test_parts_of_a_split_keep_it(lvis):
    records = read_split(lvis, "train")
    part = records.take([1, 4, 5])
    assert part.verified.stated.tolist() == [True, True, False]
    given, kept = records.coco_dict()["images"], part.coco_dict()["images"]
    assert kept == [given[index] for index in (1, 4, 5)] and "neg_category_ids" not in kept[2]


def test_converting_keeps_it_or_says_that_it_does_not(lvis, tmp_path, capsys):
    original = json.loads((lvis / "annotations" / "lvis_v1_train.json").read_text())["images"]
    assert convert.main([str(lvis), str(tmp_path / "coco"), "--format", "coco"]) == 0
    written = document(tmp_path / "coco")["images"]
    for field in ("id", "neg_category_ids", "not_exhaustive_category_ids"):
        assert [image.get(field) for image in written] == [image.get(field) for image in original]
    again = read_split(tmp_path / "coco", "train")
    assert again.coco_dict() == document(tmp_path / "coco")
    capsys.readouterr()
    assert convert.main([str(lvis), str(tmp_path / "yolo"), "--format", "yolo"]) == 0
    assert capsys.readouterr().out.count("which classes were looked for left out, since YOLO has no place for it") == 2
