"""Few shapes for many sizes of images: what is chosen, what it covers and costs, and that batches keep to it."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
from short_runs import write_pictures

from dndetr.config import Config, DenoisingConfig, ImagesConfig
from dndetr.data import batch_shapes
from dndetr.data.batch_shapes import MOST_SHAPES, BatchShape, BatchShapes, choose_shapes
from dndetr.data.coco import CocoDataset
from dndetr.data.collate import canvas_bucket, target_bucket
from dndetr.data.loader import build_loader
from dndetr.data.order import Order, portraits
from dndetr.data.training import TrainingData
from dndetr.data.transforms import OfficialTraining
from dndetr.presets import preset_named

IMAGES = 118_287


def coco_like(images: int = IMAGES, seed: int = 0) -> CocoDataset:
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
    boxes = np.concatenate((corners, corners + spans), axis=1) * np.repeat(sizes[:, [1, 0, 1, 0]], counts, axis=0)
    ends = counts.cumsum()[:-1]
    dataset = object.__new__(CocoDataset)
    dataset.transform, dataset.seed = OfficialTraining(), 42
    dataset.sizes, dataset.ids = [tuple(size) for size in sizes.tolist()], range(images)
    dataset._boxes, dataset._labels = np.split(boxes, ends), np.split(np.zeros(counts.sum(), np.int64), ends)
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
