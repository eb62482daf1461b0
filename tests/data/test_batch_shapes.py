"""Few shapes for many sizes of images: what is chosen, what it covers and costs, and that batches keep to it."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from short_runs import write_pictures
from splits import read_split

from dndetr.config import Config, DenoisingConfig, ImagesConfig
from dndetr.data import batch_shapes
from dndetr.data.batch_shapes import MOST_SHAPES, BatchShape, BatchShapes, choose_shapes
from dndetr.data.collate import canvas_bucket, target_bucket
from dndetr.data.folder_dataset import FolderDataset
from dndetr.data.order import Order, portraits
from dndetr.data.records import Records, make_objects
from dndetr.data.training import TrainingData
from dndetr.data.transforms import FixedTraining, OfficialTraining
from dndetr.presets import preset_named

IMAGES = 118_287


def coco_like(images: int = IMAGES, seed: int = 0) -> FolderDataset:
    """A split without files, its sizes and numbers of objects spread as those of COCO's training images."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(4, images, p=(0.21, 0.08, 0.61, 0.10))
    common = rng.choice((360, 424, 425, 426, 427, 428, 480, 500), images)
    short = np.where(rng.random(images) < 0.55, common, rng.integers(300, 501, images))
    long_side_640 = np.stack((short, np.full(images, 640)), axis=1)
    tall = rng.random(images) < 0.27
    long_side_640[tall] = long_side_640[tall, ::-1]
    smaller = np.stack((rng.integers(200, 601, images), rng.integers(200, 501, images)), axis=1)
    sizes = np.choose(kind[:, None], (np.array((480, 640)), np.array((640, 480)), long_side_640, smaller))
    counts = np.minimum(np.round(rng.lognormal(1.5, 0.95, images)), 90).astype(int)
    counts[rng.random(images) < 0.01] = 0

    spans = rng.random((counts.sum(), 2)) ** 2
    corners = rng.random((counts.sum(), 2)) * (1 - spans)
    image = np.repeat(np.arange(images), counts)
    boxes = np.concatenate((corners, spans), axis=1) * sizes[image][:, [1, 0, 1, 0]]
    objects = make_objects(image, np.zeros(len(image)), boxes)
    classes, nowhere = [(1, "a")], Path("nowhere")
    dataset = object.__new__(FolderDataset)
    dataset.transform, dataset.seed, dataset.classes = OfficialTraining(), 42, classes
    names = [""] * images
    dataset._take(Records("train", nowhere, nowhere, nowhere, classes, names, np.arange(images), sizes, objects))
    return dataset


@pytest.fixture(scope="module")
def coco():
    return coco_like()


def official(batch_size: int, **changed) -> Config:
    return replace(preset_named("dn-deformable-detr-r50"), batch_size=batch_size, **changed)


def choose(dataset, config: Config) -> BatchShapes:
    return choose_shapes(dataset, config, config.epochs * (len(dataset) // config.batch_size))


def an_epoch(shapes: BatchShapes, dataset, batch_size: int, epoch: int, share: float = 1.0) -> tuple[float, float]:
    """Shares of an epoch's steps that replay, and of pixels added, found by going through (a share of) its batches."""
    batches = Order(portraits(dataset.sizes, None), batch_size, training=True, seed=42).batches(epoch)
    steps, batches = len(batches), batches[: round(share * len(batches))]
    visits: dict[BatchShape, int] = {}
    pixels = taken = 0
    for images in batches:
        extents = [dataset.extent(image, epoch) for image in images]
        height, width = canvas_bucket([extent[:2] for extent in extents], 64)
        shape = shapes.shape_for(extents, 64)
        assert shape.height >= height and shape.width >= width and shape.slots >= max(n for *_, n in extents)
        pixels, taken = pixels + height * width, taken + shape.height * shape.width
        visits[shape] = visits.get(shape, 0) + 1
    replays = sum(visits.get(shape, 0) * steps / len(batches) - 1 for shape in shapes.shapes if shape in visits)
    return replays / steps, taken / pixels - 1


def test_the_data_is_like_coco(coco):
    counts = np.array(coco.counts)
    assert 6.5 < counts.mean() < 8 and counts.max() == 90
    assert 0.2 < np.mean([size == (480, 640) for size in coco.sizes]) < 0.25


@pytest.mark.parametrize(("batch_size", "share"), [(2, 0.05), (16, 0.1)])
def test_nearly_all_steps_on_coco_replay(coco, batch_size, share):
    started = time.process_time()
    shapes = choose(coco, official(batch_size))
    assert time.process_time() - started < 2
    assert len(shapes.shapes) <= MOST_SHAPES
    replayed, pixels_added = an_epoch(shapes, coco, batch_size, epoch=1, share=share)
    assert replayed >= 0.97 and pixels_added <= 0.05
    assert shapes.replayed == pytest.approx(replayed, abs=0.01)
    assert shapes.pixels_added == pytest.approx(pixels_added, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [2, 16])
def test_nearly_all_steps_of_a_whole_epoch_replay(coco, batch_size):
    shapes = choose(coco, official(batch_size))
    replayed, pixels_added = an_epoch(shapes, coco, batch_size, epoch=0)
    print(f"batches of {batch_size}: {shapes}; found {replayed:.2%}, {pixels_added:.2%}")
    assert replayed >= 0.97 and pixels_added <= 0.05


@pytest.fixture
def pictures(tmp_path):
    return str(write_pictures(tmp_path / "pictures"))


def from_pictures(folder: str, **changed) -> Config:
    """The official recipe at a size for tests."""
    images = ImagesConfig(sizes=(48, 96, 128), max_size=160)
    return replace(official(2, data=folder, images=images, workers=0, epochs=40, init="weights.pth"), **changed)


def shape_of(batch) -> BatchShape:
    return BatchShape(*batch.canvas, batch.targets.labels.shape[1])


def test_extents_are_those_of_the_samples(pictures):
    dataset = FolderDataset(read_split(pictures, "train"), OfficialTraining(sides=(48, 96, 128), longest=160), seed=3)
    for epoch in range(3):
        for index in range(len(dataset)):
            sample = dataset.sample(index, epoch)
            assert dataset.extent(index, epoch) == (*sample.size, len(sample.labels))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_makes_exactly_the_shapes_that_were_foreseen(pictures, workers):
    config = from_pictures(pictures, workers=workers)
    data, plain = TrainingData(config), TrainingData(config)
    shapes = data.choose_shapes(steps=160)
    assert 1 < len(shapes.shapes) < len({shape_of(batch) for epoch in range(40) for batch in plain.training(epoch)})
    dataset = plain._train_images
    order = Order(portraits(dataset.sizes, None), 2, training=True, seed=config.seed)
    for epoch in range(3):
        batches = zip(data.training(epoch), plain.training(epoch), order.batches(epoch), strict=True)
        for batch, before, images in batches:
            extents = [dataset.extent(image, epoch) for image in images]
            assert shape_of(batch) == shapes.shape_for(extents, 64) and shape_of(batch) in shapes.shapes
            assert batch.sizes.tolist() == before.sizes.tolist() == [[h, w] for h, w, _ in extents]
            height, width = before.canvas
            assert batch.pixels[:, :height, :width].equal(before.pixels)
            assert batch.pixels.sum() == before.pixels.sum()
    # Evaluation is not captured.
    assert [shape_of(batch) for batch in data.validation()] == [shape_of(batch) for batch in plain.validation()]


def test_the_choice_is_the_same_in_every_process_and_in_a_resumed_run(pictures):
    config = from_pictures(pictures)
    chosen = [TrainingData(config, rank, world).choose_shapes(160) for rank, world in ((0, 1), (0, 1), (0, 2), (1, 2))]
    assert all(shapes == chosen[0] for shapes in chosen)
    assert choose(coco_like(4000), official(2)) == choose(coco_like(4000), official(2))


def test_nothing_is_chosen_for_one_canvas_for_steps_of_several_batches_and_for_exact_room(pictures):
    fixed = from_pictures(pictures, images=ImagesConfig(recipe="fixed", canvas=(64, 96)))
    exact = from_pictures(pictures, denoising=DenoisingConfig(slots="batch"))
    for config in (fixed, from_pictures(pictures, accumulate=2), exact, preset_named("tiny")):
        data = TrainingData(config)
        assert data.choose_shapes(100) is None and data._train._reader.shapes is None
    batches = list(TrainingData(exact).training(0))
    assert [max(1, int(batch.targets.counts.max())) for batch in batches] == [shape_of(b).slots for b in batches]


def test_a_batch_takes_the_cheapest_shape_that_holds_it_or_its_own():
    chosen = BatchShapes((BatchShape(128, 192, 8), BatchShape(192, 192, 16), BatchShape(128, 256, 256)), 100, 0.0, 1.0)
    assert chosen.shape_for([(100, 150, 3), (128, 190, 8)], 64) == (128, 192, 8)
    assert chosen.shape_for([(100, 150, 3), (129, 190, 8)], 64) == (192, 192, 16)
    assert chosen.shape_for([(120, 180, 9)], 64) == (192, 192, 16)
    # None that is large enough; one that is far too large; one on which there is room for fewer denoising groups.
    assert chosen.shape_for([(193, 10, 3)], 64) == (256, 64, 8)
    assert chosen.shape_for([(64, 64, 3)], 64) == (64, 64, 8)
    assert chosen.shape_for([(128, 256, 17)], 64) == (128, 256, 32)
    assert chosen.shape_for([(128, 256, 200)], 64) == (128, 256, 256)


def test_no_batch_loses_denoising_groups_or_outgrows_the_largest(coco):
    config = official(2, denoising=DenoisingConfig(max_queries=100))  # all 5 groups with up to 20 slots
    shapes = choose(coco, config)
    assert shapes.full == 20 and max(shape.slots for shape in shapes.shapes) >= 64
    rng = np.random.default_rng(0)
    for objects in (3, 12, 25, 60):
        found = {shapes.shape_for([(*size, objects)], 64).slots for size in rng.integers(500, 900, (50, 2)).tolist()}
        assert found <= ({8, 16} if objects <= 16 else {target_bucket(objects)})
    own = [canvas_bucket(extents[:, :2], 64) for extents in batch_shapes._draw_batches(coco, 2, 42)]
    assert max(shape.height * shape.width for shape in shapes.shapes) <= max(height * width for height, width in own)


@pytest.mark.parametrize("batch_size", [2, 16])
def test_where_the_room_decides_the_number_of_groups_it_stays(coco, batch_size):
    config = replace(preset_named("dino-r50"), batch_size=batch_size)
    shapes = choose(coco, config)
    print(f"batches of {batch_size}: {shapes}")
    assert shapes.replayed >= 0.97 and shapes.pixels_added <= 0.1
    rng = np.random.default_rng(0)
    for objects in (3, 12, 25, 60):
        found = {shapes.shape_for([(*size, objects)], 64).slots for size in rng.integers(500, 900, (50, 2)).tolist()}
        assert found == {target_bucket(objects)}


def test_few_sizes_stay_as_they_are_and_short_runs_take_fewer_shapes(coco):
    dataset = coco_like(300)
    dataset.transform = FixedTraining((480, 640))  # of one size, and so of a few buckets
    assert choose(dataset, official(2)).pixels_added == 0
    counts = [len(choose_shapes(coco, official(2), steps).shapes) for steps in (2000, 10_000, 200_000)]
    assert counts == sorted(set(counts)) and counts[-1] == MOST_SHAPES
    assert choose_shapes(coco, official(2), 200).pixels_added <= 0.1


@pytest.mark.parametrize(("images", "batch_size"), [(2, 2), (40, 40), (5000, 1), (5000, 600)])
def test_any_size_of_data_and_batch(images, batch_size):
    shapes = choose(coco_like(images), official(batch_size))
    assert 1 <= len(shapes.shapes) <= MOST_SHAPES and 0 <= shapes.replayed < 1
    assert f"{shapes}".startswith("1 shape of" if len(shapes.shapes) == 1 else f"{len(shapes.shapes)} shapes of")


def test_more_kinds_of_shapes_than_can_be_merged(monkeypatch):
    dataset = coco_like(4000)
    fine = choose(dataset, official(2))
    monkeypatch.setattr(batch_shapes, "_UNMERGED", 300)
    coarse = choose(dataset, official(2))
    assert coarse.replayed > 0.97 and fine.pixels_added < coarse.pixels_added < 0.1


def test_neighbours_of_too_many_kinds_stay_within_the_limits():
    draw = np.random.default_rng(0)
    own = np.stack((*(64 * draw.integers(1, 60, (2, 20000))), np.full(20000, 8)), axis=1)
    own = own[own[:, 0] * own[:, 1] <= 3_000_000]
    largest = int((own[:, 0] * own[:, 1]).max())
    shapes, counts, pixels = batch_shapes._counted(own, 64, largest)
    areas = shapes[:, 0] * shapes[:, 1]
    assert len(np.unique(own, axis=0)) > 1024 >= len(shapes) and areas.max() <= largest
    assert (pixels <= counts * areas).all() and (pixels < counts * areas).any()
    merged, weights = batch_shapes._merge(shapes, counts, pixels, largest, 5, 100, 1.0)
    areas = merged[:, 0] * merged[:, 1]
    # More than a tenth was added by the neighbours already: nothing is merged any more.
    assert areas.max() <= largest and weights @ areas <= max(1.1 * pixels.sum(), counts @ (shapes[:, 0] * shapes[:, 1]))
