"""Batches in an order that depends on (seed, epoch) alone, from any step of an epoch on, with or without workers."""

import warnings
from collections.abc import Iterator
from typing import Protocol

import numpy as np
from torch.utils.data import DataLoader

from ..batch import Batch
from .collate import TARGET_BUCKETS, collate
from .errors import DataError
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

    def __init__(self, dataset: Dataset, order: "_Order", workers: int, multiple: int, slots: int | None):
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
    order = _Order(dataset, batch_size, training, seed, rank, world)
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


class _Order:
    """Which images make which batch."""

    def __init__(self, dataset: Dataset, batch_size: int, training: bool, seed: int, rank: int, world: int):
        self._count, self._batch_size, self._training, self._seed = len(dataset), batch_size, training, seed
        self._rank, self._world = rank, world
        self._portrait = [dataset.canvas is None and height > width for height, width in dataset.sizes]

    def __len__(self) -> int:
        if self._training:
            return self._count // self._batch_size // self._world
        return len(self.batches(0))

    def batches(self, epoch: int) -> list[list[int]]:
        """Image numbers of each batch of this process."""
        images = np.arange(self._count)
        if self._training:
            # The third number keeps this stream apart from those of the samples, which have their index there.
            images = np.random.default_rng((self._seed, epoch, self._count)).permutation(images)
        batches, waiting = [], ([], [])
        for image in images.tolist():
            group = waiting[self._portrait[image]]
            group.append(image)
            if len(group) == self._batch_size:
                batches.append(group.copy())
                group.clear()
        rest = waiting[0] + waiting[1]
        batches += [rest[at : at + self._batch_size] for at in range(0, len(rest), self._batch_size)]
        if self._training:
            batches = batches[: self._count // self._batch_size // self._world * self._world]
        return batches[self._rank :: self._world]


class _Reader:
    """Reads and collates the batch of a key; runs in the workers, where there are some."""

    def __init__(self, dataset: Dataset, multiple: int, slots: int | None):
        self._dataset, self._multiple, self._slots = dataset, multiple, slots

    def __getitem__(self, key: tuple[int, list[int]]) -> Batch | DataError:
        epoch, images = key
        try:
            samples = [self._dataset.sample(image, epoch) for image in images]
        except DataError as error:
            return error  # raised across processes it would arrive wrapped in a worker's traceback
        return collate(samples, self._multiple, self._dataset.canvas, self._slots)


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
