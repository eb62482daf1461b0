"""Repeat-factor sampling: factors by hand, an exact and constant epoch, augmentation of its own for each occurrence."""

import numpy as np
import pytest
import torch
from coco_folders import write_set
from splits import read_split

from dndetr.data.folder_dataset import FolderDataset
from dndetr.data.loader import build_loader
from dndetr.data.order import Order
from dndetr.data.repeat_factors import Repeated, Repeats, repeat_factors
from dndetr.data.transforms import FixedTraining, OfficialTraining


@pytest.fixture
def folder(tmp_path):
    """Eight images: class 3 in all but the last, class 7 in images 0 and 1 (and three times in 1), class 9 in 5."""
    box = [5, 5, 20, 20]
    objects = [(image, 3, box, {}) for image in range(7)] + [(image, 7, box, {}) for image in (0, 1, 1, 1)]
    objects += [(5, 9, box, {}), (2, 11, box, {"iscrowd": 1}), (3, 11, [500, 5, 3, 3], {})]
    classes = ((3, "cat"), (7, "dog"), (9, "owl"), (11, "bat"))
    return write_set(tmp_path / "set", [f"{n}.png" for n in range(8)], objects, classes)


def test_factors_by_hand(folder):
    records = read_split(folder, "train")
    # Shares: cat 7/8, dog 2/8, owl 1/8; bats are a crowd and a box outside, which training does not have.
    found = repeat_factors(records, 0.5)
    assert found.tolist() == pytest.approx([2**0.5, 2**0.5, 1, 1, 1, 2, 1, 1], abs=1e-15)
    assert repeat_factors(records, 0.001).tolist() == [1] * 8  # LVIS': all are frequent here
    every = repeat_factors(records, 1)
    assert every[:2].tolist() == [2, 2] and every[5] == 8**0.5 and every[7] == 1 and every[3] == (8 / 7) ** 0.5


def drawn(factors, epochs, seed=3):
    repeats = Repeats(np.array(factors, np.float64), seed)
    numbers = [repeats.numbers(epoch) for epoch in range(epochs)]
    times = np.array([np.bincount(each % len(factors), minlength=len(factors)) for each in numbers])
    return repeats, numbers, times


def test_every_epoch_has_as_many_images_and_each_its_floor_or_ceiling():
    factors = [1, 1.25, 3.9, 2, 1.35, 1.5]  # whose sum is 11
    repeats, numbers, times = drawn(factors, 8000)
    assert repeats.images == 11 and (times.sum(1) == 11).all()
    assert (times.min(0) == np.floor(factors)).all() and (times.max(0) == np.ceil(factors)).all()
    # Of 8000 draws of chances up to 1/2 the mean is within four deviations, 0.0224.
    assert np.abs(times.mean(0) - factors).max() < 0.0224
    # An epoch's order of its own: images do not come together that did in another one.
    assert len({tuple(row) for row in times.tolist()}) > 5
    for each, row in zip(numbers[:50], times.tolist(), strict=False):
        wanted = [image + 6 * occurrence for image, count in enumerate(row) for occurrence in range(count)]
        assert each.tolist() == wanted


@pytest.mark.parametrize(
    ("factors", "images", "expected"),
    [
        ([1, 1, 1.3], 3, [1, 1, 1]),
        ([1, 1.4, 1.3], 4, [1, 1.5385, 1.4615]),  # .4 and .3 moved to a sum of 1: what is left of them by 3/13
        ([1.5, 1.7, 1.2], 4, [1.3571, 1.5, 1.1429]),  # 1.4 to 1: by 1/1.4
        ([1], 1, [1]),
        ([2.25], 2, [2]),
        ([2.75], 3, [3]),
    ],
)
def test_a_sum_that_is_no_whole_number_is_rounded(factors, images, expected):
    repeats, _, times = drawn(factors, 4000)
    assert repeats.images == images and (times.sum(1) == images).all()
    assert (times >= np.floor(factors)).all() and (times <= np.ceil(factors)).all()
    assert np.abs(times.mean(0) - expected).max() < 0.032


def test_many_images_add_up_too():
    factors = 1 + np.random.default_rng(0).exponential(0.4, 5000)
    repeats, _, times = drawn(factors, 40)
    assert repeats.images == round(factors.sum()) and (times.sum(1) == repeats.images).all()
    assert (times >= np.floor(factors)).all() and (times <= np.ceil(factors)).all()


def test_it_depends_on_seed_and_epoch_alone():
    factors = np.linspace(1, 2, 21)
    one, other = Repeats(factors, 3), Repeats(factors, 3)
    other.numbers(7)
    assert (one.numbers(2) == other.numbers(2)).all()
    assert (one.numbers(2) != one.numbers(3)).any() and (one.numbers(2) != Repeats(factors, 4).numbers(2)).any()


def test_without_repeats_the_order_is_that_of_ever():
    portrait = [n % 3 == 0 for n in range(23)]
    plain, ones = (Order(portrait, 4, True, 5, repeats=repeats) for repeats in (None, Repeats(np.ones(23), 5)))
    assert [*plain.batches(2)] == [*ones.batches(2)] and len(plain) == len(ones) == 5


def test_the_order_is_shared_and_keeps_tall_images_together():
    factors = np.linspace(1, 3, 30)
    portrait = [n % 3 == 0 for n in range(30)]
    repeats = Repeats(factors, 1)
    whole = Order(portrait, 4, True, 1, repeats=repeats)
    assert len(whole) == repeats.images // 4 == 15
    shares = [Order(portrait, 4, True, 1, rank, 2, repeats) for rank in range(2)]
    assert [len(share) for share in shares] == [7, 7]
    for epoch in (0, 1):
        batches = [*whole.batches(epoch)]
        assert len(batches) == 15 and all(len(batch) == 4 for batch in batches)
        assert [shares[n % 2].batches(epoch)[n // 2] for n in range(14)] == batches[:14]
        mixed = [batch for batch in batches if len({portrait[number % 30] for number in batch}) > 1]
        assert len(mixed) <= 1
        numbers = [number for batch in batches for number in batch]
        assert len(set(numbers)) == len(numbers) == 60 and set(numbers) <= set(repeats.numbers(epoch).tolist())
    assert whole.batches(0) != whole.batches(1)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


@pytest.mark.parametrize("transform", [FixedTraining(canvas=(32, 32)), OfficialTraining((48, 64), 96)])
def test_each_occurrence_is_augmented_otherwise_and_the_first_as_ever(folder, transform):
    dataset = FolderDataset(read_split(folder, "train"), transform, seed=3)
    repeated = Repeated(dataset)
    first = dataset.sample(2, 1)
    views = [repeated.sample(2 + 8 * occurrence, 1) for occurrence in range(6)]
    assert (views[0].pixels == first.pixels).all() and torch.equal(views[0].boxes_xyxy, first.boxes_xyxy)
    assert all(view.image_id == first.image_id for view in views)
    assert len({view.pixels.tobytes() for view in views}) > 3  # a few draws of sizes and flips may agree
    again = repeated.sample(2 + 8 * 3, 1)
    assert (again.pixels == views[3].pixels).all()
    for occurrence, view in enumerate(views):
        assert repeated.extent(2 + 8 * occurrence, 1) == (*view.size, len(view.labels))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_begins_anywhere_with_workers_or_without(folder, workers):
    dataset = FolderDataset(read_split(folder, "train"), FixedTraining(canvas=(32, 32)), seed=3)
    repeats = Repeats(repeat_factors(dataset.records, 0.5), 3)
    assert repeats.images == 10  # 9.83
    options = {"training": True, "seed": 3, "repeats": repeats}
    alone = build_loader(Repeated(dataset), 2, **options)
    whole = [*alone.epoch(1)]
    assert len(alone) == len(whole) == 5
    ids = torch.cat([batch.ids for batch in whole]).tolist()
    assert set(ids) == set(dataset.ids) and ids.count(dataset.ids[5]) == 2
    rest = [*build_loader(Repeated(dataset), 2, workers=workers, **options).epoch(1, start=2)]
    assert len(rest) == 3 and all(same(*pair) for pair in zip(rest, whole[2:], strict=True))
