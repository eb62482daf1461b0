"""Repeat-factor sampling (LVIS, arXiv 1908.03195): images of rare classes come more often in an epoch.

    r(c) = max(1, sqrt(t / f(c))), f(c) the share of images with class c;    r(image) = max of r(c) over its classes

An epoch has the same number of images every time, the sum of r rounded, so steps can be counted ahead. Each image comes
floor(r) or ceil(r) times: the whole part always, the rest as systematic sampling draws it, in an order of each epoch's
own. Its expectation is r, but for what rounding the sum moves, less than half an image of all of them together.
"""

from collections.abc import Iterator

import numpy as np

from .folder_dataset import FolderDataset
from .records import Records
from .sample import Sample
from .summary import clip, corners_of

_BLOCK = 1 << 15  # images looked at together


def repeat_factors(records: Records, threshold: float) -> np.ndarray:
    """r of each image [n] float64, at least 1; of the objects that training uses. threshold: t, a share of images."""
    classes = len(records.classes)
    image, label = np.divmod(np.concatenate([*_pairs(records, classes)]), classes)
    images_with = np.bincount(label, minlength=classes)
    factors = np.ones(len(records))
    np.maximum.at(factors, image, np.sqrt(threshold * len(records) / images_with[label]))
    return factors


def _pairs(records: Records, classes: int) -> Iterator[np.ndarray]:
    """image * classes + label of all images and the classes of their used objects, each once, some images at a time."""
    starts, objects = records.summary.starts, records.objects
    yield np.empty(0, np.int64)
    for first in range(0, len(records), _BLOCK):
        own = slice(*starts[[first, min(first + _BLOCK, len(records))]].tolist())
        image = objects.image[own]
        _, used = clip(corners_of(objects.boxes[own]), records.sizes[image], objects.crowd[own])
        yield np.unique(image[used] * classes + objects.label[own][used])


class Repeats:
    """How often each of n images comes in an epoch, by (seed, epoch) alone.

    factors [n] at least 1. A number stands for an image and an occurrence: image + n * occurrence.
    """

    def __init__(self, factors: np.ndarray, seed: int):
        whole = np.floor(factors)
        self._whole, self._seed = whole.astype(np.int64), seed
        self.images = round(float(factors.sum()))
        """In an epoch."""
        self._more = self.images - int(whole.sum())
        self._chances = _with_sum(factors - whole, self._more)

    def __str__(self) -> str:
        images, often = len(self._whole), int((self._whole + self._chances > 1).sum())
        if not often:
            return f"{self.images:,} images in an epoch, since no class is that rare"
        most = int((self._whole + (self._chances > 0)).max())
        return f"{self.images:,} images in an epoch, since {often:,} of {images:,} come up to {most} times"

    def numbers(self, epoch: int) -> np.ndarray:
        """The numbers of an epoch's images [images] int64, ascending within each image."""
        count = len(self._whole)
        # A stream apart from that of the order, which has three numbers, and from those of samples, below n.
        rng = np.random.default_rng((self._seed, epoch, count, 1))
        turn, start = rng.permutation(count), rng.random()
        reached = np.minimum(np.floor(np.cumsum(self._chances[turn]) + start), self._more)
        reached[-1] = self._more  # whatever the sum's rounding
        times = self._whole.copy()
        times[turn] += np.diff(reached, prepend=0).astype(np.int64)
        image = np.repeat(np.arange(count), times)
        occurrence = np.arange(len(image)) - np.repeat(np.cumsum(times) - times, times)
        return image + count * occurrence


def _with_sum(chances: np.ndarray, total: int) -> np.ndarray:
    """Chances [n] in [0, 1) moved alike, towards 0 or 1, until their sum is ``total``, the whole number next to it."""
    given = chances.sum()
    if total <= given:
        return chances * (total / max(given, 1))
    rest = np.where(chances > 0, 1 - chances, 0)
    return chances + rest * ((total - given) / rest.sum())


class Repeated:
    """A data set whose images are asked for by the numbers of ``Repeats``; its lengths are those of the images."""

    def __init__(self, dataset: FolderDataset):
        self._dataset = dataset
        self.classes, self.sizes, self.canvas = dataset.classes, dataset.sizes, dataset.canvas
        self.counts, self.class_counts, self.records = dataset.counts, dataset.class_counts, dataset.records

    def __len__(self) -> int:
        return len(self._dataset)

    def sample(self, number: int, epoch: int = 0) -> Sample:
        """An image as an epoch sees it at one of its occurrences."""
        occurrence, index = divmod(number, len(self))
        return self._dataset.sample(index, epoch, occurrence)

    def extent(self, number: int, epoch: int = 0) -> tuple[int, int, int]:
        """Height, width and number of objects of that sample."""
        occurrence, index = divmod(number, len(self))
        return self._dataset.extent(index, epoch, occurrence)
