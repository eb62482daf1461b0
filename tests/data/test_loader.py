"""The order of batches: by seed and epoch, from any step on, whatever reads them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from short_runs import write_pictures
from splits import read_split

from dndetr.data.errors import DataError
from dndetr.data.folder_dataset import FolderDataset
from dndetr.data.loader import build_loader
from dndetr.data.shapes import ShapesDataset
from dndetr.data.training import TrainingData
from dndetr.data.transforms import FixedTraining, Unresized
from dndetr.presets import PRESETS


class Recorder(ShapesDataset):
    """Shapes that note which of them were asked for."""

    def __init__(self, length: int):
        super().__init__("train", length)
        self.asked = []

    def sample(self, index: int, epoch: int = 0):
        self.asked.append((epoch, index))
        return super().sample(index, epoch)


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


def test_training_shuffles_by_seed_and_epoch_and_drops_the_rest():
    dataset = Recorder(11)
    loader = build_loader(dataset, 4, training=True, seed=1)
    assert len(loader) == 2
    orders = {epoch: torch.cat([batch.ids for batch in loader.epoch(epoch)]).tolist() for epoch in (0, 1)}
    assert all(len(set(order)) == 8 for order in orders.values())
    assert orders[0] != orders[1]
    assert orders[0] == torch.cat([batch.ids for batch in loader.epoch(0)]).tolist()
    assert orders[0] != torch.cat([b.ids for b in build_loader(dataset, 4, training=True, seed=2).epoch(0)]).tolist()
    seen = {i for epoch in range(8) for batch in loader.epoch(epoch) for i in batch.ids.tolist()}
    assert seen == set(range(11))


def test_evaluation_reads_everything_once_in_order():
    loader = build_loader(ShapesDataset("val", 11), 4, training=False)
    batches = list(loader.epoch())
    assert len(loader) == len(batches) == 3
    assert [batch.ids.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]


def test_starting_late_gives_the_rest_and_reads_nothing_else():
    dataset = Recorder(12)
    loader = build_loader(dataset, 3, training=True, seed=5)
    whole = list(loader.epoch(2))
    dataset.asked.clear()
    rest = list(loader.epoch(2, start=3))
    assert len(rest) == 1 and same(rest[0], whole[3])
    assert dataset.asked == [(2, i) for i in whole[3].ids.tolist()]


def test_workers_change_nothing(make_document, make_folder):
    root = make_folder(make_document(images=((40, 60),) * 7))
    dataset = FolderDataset(read_split(root, "train"), FixedTraining(canvas=(24, 32)), seed=3)
    alone, helped = (build_loader(dataset, 2, training=True, seed=3, workers=workers) for workers in (0, 2))
    for epoch, start in ((0, 0), (1, 1)):
        pairs = list(zip(alone.epoch(epoch, start), helped.epoch(epoch, start), strict=True))
        assert len(pairs) == 3 - start
        assert all(same(*pair) for pair in pairs)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_one_plain_error(make_document, make_folder, workers):
    root = make_folder(make_document())
    (root / "train" / "0.png").write_text("hello")
    loader = build_loader(FolderDataset(read_split(root, "train"), Unresized()), 2, training=False, workers=workers)
    with pytest.raises(DataError, match=r"^[^\n]*0\.png: not an image[^\n]*$"):
        list(loader.epoch())


def test_landscape_and_portrait_are_kept_apart_as_far_as_they_go(make_document, make_folder):
    sizes = [(40, 60) if i % 3 else (60, 40) for i in range(20)]  # 7 portraits, 13 landscapes
    root = make_folder(make_document(images=sizes))
    dataset = FolderDataset(read_split(root, "train"), Unresized())
    for training in (True, False):
        batches = list(build_loader(dataset, 4, training=training).epoch())
        assert len(batches) == 5
        assert sorted(i for batch in batches for i in batch.ids.tolist()) == list(range(11, 31))
        mixed = [batch for batch in batches if len({bool(h > w) for h, w in batch.original_sizes.tolist()}) > 1]
        assert len(mixed) == 1


def test_processes_share_an_epoch():
    dataset = Recorder(22)
    loaders = [build_loader(dataset, 4, training=True, rank=rank, world=2) for rank in range(2)]
    parts = [[i for batch in loader.epoch(3) for i in batch.ids.tolist()] for loader in loaders]
    assert [len(loader) for loader in loaders] == [2, 2]
    assert len(set(parts[0] + parts[1])) == 16
    loaders = [build_loader(ShapesDataset("val", 9), 4, training=False, rank=rank, world=2) for rank in range(2)]
    assert sorted(i for loader in loaders for batch in loader.epoch() for i in batch.ids.tolist()) == list(range(9))


def test_too_few_images_say_which_flag_to_change():
    with pytest.raises(DataError, match="3 training images are too few for a batch of 4; use --batch-size 3 or less"):
        build_loader(ShapesDataset("train", 3), 4, training=True)


def test_images_with_too_many_objects_are_counted(make_document, make_folder):
    boxes = [(float(x), 1.0, 2.0, 2.0) for x in np.arange(9)]
    dataset = FolderDataset(read_split(make_folder(make_document(boxes=boxes)), "train"), Unresized())
    with pytest.warns(UserWarning, match=r"2 images hold more than 8 objects \(up to 9\)"):
        loader = build_loader(dataset, 2, training=True, slots=8)
    assert next(loader.epoch()).targets.counts.tolist() == [8, 8]


def test_a_crowd_is_cut_in_training_but_never_in_the_ground_truth(tmp_path):
    pictures = write_pictures(tmp_path / "pictures")
    for split in ("train", "val"):
        path = pictures / "annotations" / f"instances_{split}.json"
        document = json.loads(path.read_text())
        like = document["annotations"][0]
        document["annotations"] += [like | {"id": 1000 + n, "bbox": [1, 1, 2 + n / 100, 3]} for n in range(600)]
        path.write_text(json.dumps(document))
    with pytest.warns(UserWarning, match=r"1 images hold more than 512 objects \(up to 603\)"):
        data = TrainingData(replace(PRESETS["small"](), data=str(pictures), batch_size=8, init="weights.pth"))
    (batch,) = data.training(0)
    assert batch.targets.counts.max() == 512
    assert len(data.ground_truth["annotations"]) == 600 + 3 * 6
