"""Batches in an order that depends on (seed, epoch) alone, from any step of an epoch on, with or without workers."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from ..batch import Batch
from .batch_shapes import BatchShapes
from .collate import TARGET_BUCKETS, canvas_bucket, collate
from .errors import DataError
from .order import Order, portraits
from .records import Records
from .repeat_factors import Repeats
from .sample import Sample
from .workers import Workers, demand_room

_LOOKED_AT = 200  # batches whose size is worked out before training


class Dataset(Protocol):
    """What the loader, the trainer and the evaluation ask of a data set."""

    classes: list[tuple[int, str]]
    """(category id, name) in label order."""
    sizes: Sequence[tuple[int, int]]
    """(height, width) of the originals."""
    counts: Sequence[int]
    """Number of objects of each image, or an upper bound."""
    canvas: tuple[int, int] | None
    """(height, width) of all samples, where they have one size."""

    def __len__(self) -> int: ...

    def sample(self, index: int, epoch: int = 0) -> Sample:
        """Image ``index`` as epoch ``epoch`` sees it, the same whenever and wherever it is asked for."""

    def extent(self, index: int, epoch: int = 0) -> tuple[int, int, int]:
        """Height, width and number of objects of that sample; asked only where there is no common canvas."""

    @property
    def records(self) -> Records:
        """Ground truth: the images and all objects, as they were annotated."""


class Loader:
    """Batches of a data set, epoch by epoch; made by ``build_loader``."""

    def __init__(self, dataset: Dataset, order: Order, workers: int, multiple: int, slots: int | None, exact: bool):
        self._order = order
        self._reader = _Reader(dataset, multiple, slots, exact)
        self._workers = Workers(self._reader, workers) if workers else None

    def __len__(self) -> int:
        return len(self._order)

    def take(self, shapes: BatchShapes) -> None:
        """Batches take these shapes; to be said before the first epoch."""
        self._reader.shapes = shapes

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Batches of one epoch from number ``start`` on; the images of those before it are not read."""
        keys = _Keys(epoch, self._order.batches(epoch)[start:])
        yield from map(self._reader.__getitem__, keys) if self._workers is None else self._workers.read(keys)


def build_loader(
    dataset: Dataset,
    batch_size: int,
    training: bool,
    seed: int = 0,
    workers: int = 0,
    multiple: int = 64,
    slots: int | None = None,
    exact: bool = False,
    rank: int = 0,
    world: int = 1,
    held: int = 1,
    neighbours: int = 1,
    repeats: Repeats | None = None,
) -> Loader:
    """A loader of shuffled whole batches (training), or of everything once in a fixed order.

    Images without a common size are batched landscape with landscape and portrait with portrait, so that canvases are
    few. multiple, slots, exact: as of ``collate``. rank, world: this process reads every ``world``-th batch; in
    training all processes get equally many. Nothing depends on the number of workers; they need shared memory, also
    for the batches that are ``held`` at once, and ``neighbours`` processes share that of a machine. repeats: which
    numbers of the data set an epoch has, by default each once. ValueError where memory has no room.
    """
    order = Order(portraits(dataset.sizes, dataset.canvas), batch_size, training, seed, rank, world, repeats)
    if training and len(order) == 0:
        wanted = f" on each of {world} processes" if world > 1 else ""
        raise DataError(
            f"{len(dataset)} training images are too few for a batch of {batch_size}{wanted}; "
            f"use --batch-size {max(1, len(dataset) // world)} or less"
        )
    most = slots or TARGET_BUCKETS[-1]
    # Evaluation scores against the annotations, not against what a batch has room for.
    counts = np.asarray(dataset.counts)
    if training and (overfull := int((counts > most).sum())):
        warnings.warn(
            f"{overfull} images hold more than {most} objects (up to {counts.max()}); "
            f"of those, only the {most} largest are kept",
            stacklevel=2,
        )
    if workers and len(order):  # of few validation images there may be none for this process
        demand_room(workers, largest_batch(dataset, order, multiple), len(order), held, neighbours)
    return Loader(dataset, order, workers, multiple, slots, exact)


def largest_batch(dataset: Dataset, order: Order, multiple: int) -> int:
    """Bytes of the images of the largest batch in the first epoch; in a long one some hundred batches are looked at."""
    batches = order.batches(0)
    some = batches[:: -(-len(batches) // _LOOKED_AT)]

    def pixels(batch: list[int]) -> int:
        sizes = [dataset.canvas or dataset.extent(image)[:2] for image in batch]
        height, width = dataset.canvas or canvas_bucket(sizes, multiple)
        return len(batch) * height * width

    return max(map(pixels, some)) * 3  # a byte for each colour


class _Keys(Sequence):
    """(epoch, image numbers) of each batch, made when it is asked for."""

    def __init__(self, epoch: int, batches: Sequence[list[int]]):
        self._epoch, self._batches = epoch, batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> tuple[int, list[int]]:
        return self._epoch, self._batches[index]


class _Reader:
    """Reads and collates the batch of a key; runs in the workers, where there are some."""

    def __init__(self, dataset: Dataset, multiple: int, slots: int | None, exact: bool):
        self._dataset, self._multiple, self._slots, self._exact = dataset, multiple, slots, exact
        self.shapes: BatchShapes | None = None

    def __getitem__(self, key: tuple[int, list[int]]) -> Batch:
        epoch, images = key
        samples = [self._dataset.sample(image, epoch) for image in images]
        if self.shapes is None:
            return collate(samples, self._multiple, self._dataset.canvas, self._slots, self._exact)
        extents = [(*sample.size, len(sample.labels)) for sample in samples]
        height, width, slots = self.shapes.shape_for(extents, self._multiple)
        return collate(samples, canvas=(height, width), slots=slots)
