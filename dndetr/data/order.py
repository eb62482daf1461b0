"""Which images make which batch of an epoch: by (seed, epoch) alone, tall images with tall ones."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .repeat_factors import Repeats


def portraits(sizes: Sequence[tuple[int, int]], canvas: tuple[int, int] | None) -> np.ndarray:
    """Whether each image is batched among the tall ones [n] bool, by (height, width); none is on a common canvas."""
    if canvas is not None:
        return np.zeros(len(sizes), bool)
    height, width = np.asarray(sizes).reshape(-1, 2).T
    return height > width


class Batches(Sequence):
    """Batches of an epoch, each a list of image numbers that is made when it is asked for."""

    def __init__(self, images: np.ndarray, batch_size: int, which: range):
        self._images, self._batch_size, self._which = images, batch_size, which

    def __len__(self) -> int:
        return len(self._which)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Batches(self._images, self._batch_size, self._which[index])
        first = self._which[index] * self._batch_size
        return self._images[first : first + self._batch_size].tolist()


class Order:
    """Shuffled whole batches (training), or everything once in a fixed order, shared by ``world`` processes.

    portrait: for each image whether it belongs with the tall ones. repeats: images come as these say, by their numbers.
    """

    def __init__(
        self,
        portrait: Sequence[bool],
        batch_size: int,
        training: bool,
        seed: int,
        rank: int = 0,
        world: int = 1,
        repeats: Repeats | None = None,
    ):
        self._portrait = np.asarray(portrait, bool)
        self._batch_size, self._training, self._seed = batch_size, training, seed
        self._rank, self._world, self._repeats = rank, world, repeats
        self._length = len(portrait) if repeats is None else repeats.images

    def __len__(self) -> int:
        return len(range(self._rank, self._count(self._length), self._world))

    def batches(self, epoch: int) -> Batches:
        """Image numbers of each batch of this process."""
        images = np.arange(self._length) if self._repeats is None else self._repeats.numbers(epoch)
        if self._training:
            # The third number keeps this stream apart from those of the samples, which have their index there.
            images = np.random.default_rng((self._seed, epoch, len(images))).permutation(images)
        which = range(self._rank, self._count(len(images)), self._world)
        tall = self._portrait[images % len(self._portrait)]
        return Batches(_batched(images, tall, self._batch_size), self._batch_size, which)

    def _count(self, images: int) -> int:
        """Batches that all processes read, of so many images."""
        if self._training:
            return images // self._batch_size // self._world * self._world
        return -(-images // self._batch_size)


def _batched(images: np.ndarray, tall: np.ndarray, batch_size: int) -> np.ndarray:
    """Images [n] in the order of their batches: those of one kind, as each gets full, then what is left of both."""
    kinds = [np.flatnonzero(tall == kind) for kind in (False, True)]
    whole = [kind[: len(kind) // batch_size * batch_size].reshape(-1, batch_size) for kind in kinds]
    rest = [kind[full.size :] for kind, full in zip(kinds, whole, strict=True)]
    full = np.concatenate(whole)
    full = full[np.argsort(full[:, -1])]  # a batch is full with the last of its images
    return images[np.concatenate((full.reshape(-1), *rest))]
