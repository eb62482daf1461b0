"""Batches in an order that depends on (seed, epoch) alone, from any step of an epoch on, with or without workers."""

import warnings
from collections.abc import Iterator
from typing import Protocol

from torch.utils.data import DataLoader

from ..batch import Batch
from .batch_shapes import BatchShapes
from .collate import TARGET_BUCKETS, collate
from .errors import DataError
from .order import Order, portraits
from .sample import Sample


class Dataset(Protocol):
    """What the loader, the trainer and the evaluation ask of a data set."""

    classes: list[tuple[int, str]]
    """(category id, name) in label order."""
    sizes: list[tuple[int, int]]
    """(height, width) of the originals."""
    counts: list[int]
    """Number of objects of each image, or an upper bound."""
    canvas: tuple[int, int] | None
    """(height, width) of all samples, where they have one size."""

    def __len__(self) -> int: ...

    def sample(self, index: int, epoch: int = 0) -> Sample:
        """Image ``index`` as epoch ``epoch`` sees it, the same whenever and wherever it is asked for."""

    def coco_dict(self) -> dict:
        """Ground truth in COCO's format."""


class Loader:
    """Batches of a data set, epoch by epoch; made by ``build_loader``."""

    def __init__(self, dataset: Dataset, order: Order, workers: int, multiple: int, slots: int | None):
        self._order = order
        self._reader = _Reader(dataset, multiple, slots)
        self._plan = _Plan()
        self._processes = None
        if workers:
            self._processes = DataLoader(
                self._reader,
                batch_size=None,
                sampler=self._plan,
                num_workers=workers,
                collate_fn=_unchanged,
                persistent_workers=True,
            )

    def __len__(self) -> int:
        return len(self._order)

    def take(self, shapes: BatchShapes) -> None:
        """Batches take these shapes; to be said before the first epoch."""
        self._reader.shapes = shapes

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Batches of one epoch from number ``start`` on; the images of those before it are not read."""
        self._plan.keys = [(epoch, batch) for batch in self._order.batches(epoch)[start:]]
        for result in map(self._reader.__getitem__, self._plan.keys) if self._processes is None else self._processes:
            if isinstance(result, DataError):
                # A new one: a frame that holds the error it raises is a cycle, which would keep the workers alive.
                raise DataError(*result.args)
            yield result


def build_loader(
    dataset: Dataset,
    batch_size: int,
    training: bool,
    seed: int = 0,
    workers: int = 0,
    multiple: int = 64,
    slots: int | None = None,
    rank: int = 0,
    world: int = 1,
) -> Loader:
    """A loader of shuffled whole batches (training), or of everything once in a fixed order.

    Images without a common size are batched landscape with landscape and portrait with portrait, so that canvases are
    few. multiple, slots: as in ``collate``. rank, world: this process reads every ``world``-th batch; in training all
    processes get equally many. Nothing depends on the number of workers.
    """
    order = Order(portraits(dataset.sizes, dataset.canvas), batch_size, training, seed, rank, world)
    if training and len(order) == 0:
        wanted = f" on each of {world} processes" if world > 1 else ""
        raise DataError(
            f"{len(dataset)} training images are too few for a batch of {batch_size}{wanted}; "
            f"use --batch-size {max(1, len(dataset) // world)} or less"
        )
    most = slots or TARGET_BUCKETS[-1]
    # Evaluation scores against the annotations, not against what a batch has room for.
    if training and (overfull := sum(count > most for count in dataset.counts)):
        warnings.warn(
            f"{overfull} images hold more than {most} objects (up to {max(dataset.counts)}); "
            f"of those, only the {most} largest are kept",
            stacklevel=2,
        )
    return Loader(dataset, order, workers, multiple, slots)


class _Reader:
    """Reads and collates the batch of a key; runs in the workers, where there are some."""

    def __init__(self, dataset: Dataset, multiple: int, slots: int | None):
        self._dataset, self._multiple, self._slots = dataset, multiple, slots
        self.shapes: BatchShapes | None = None

    def __getitem__(self, key: tuple[int, list[int]]) -> Batch | DataError:
        epoch, images = key
        try:
            samples = [self._dataset.sample(image, epoch) for image in images]
        except DataError as error:
            return error  # raised across processes it would arrive wrapped in a worker's traceback
        if self.shapes is None:
            return collate(samples, self._multiple, self._dataset.canvas, self._slots)
        extents = [(*sample.image.shape[1:], len(sample.labels)) for sample in samples]
        height, width, slots = self.shapes.shape_for(extents, self._multiple)
        return collate(samples, canvas=(height, width), slots=slots)


class _Plan:
    """The keys that the workers are handed next."""

    def __init__(self):
        self.keys: list[tuple[int, list[int]]] = []

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


def _unchanged(batch: Batch) -> Batch:
    return batch
