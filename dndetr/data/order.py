"""Which images make which batch of an epoch: by (seed, epoch) alone, tall images with tall ones."""

from collections.abc import Sequence

import numpy as np

from .repeat_factors import Repeats


def portraits(sizes: Sequence[tuple[int, int]], canvas: tuple[int, int] | None) -> list[bool]:
    """Whether each image is batched among the tall ones, by (height, width); none is where all have one canvas."""
    return [canvas is None and height > width for height, width in sizes]


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
        self._portrait, self._batch_size, self._training, self._seed = portrait, batch_size, training, seed
        self._rank, self._world, self._repeats = rank, world, repeats
        self._length = len(portrait) if repeats is None else repeats.images

    def __len__(self) -> int:
        if self._training:
            return self._length // self._batch_size // self._world
        return len(self.batches(0))

    def batches(self, epoch: int) -> list[list[int]]:
        """Image numbers of each batch of this process."""
        images = np.arange(self._length) if self._repeats is None else self._repeats.numbers(epoch)
        if self._training:
            # The third number keeps this stream apart from those of the samples, which have their index there.
            images = np.random.default_rng((self._seed, epoch, len(images))).permutation(images)
        batches, waiting = [], ([], [])
        for image in images.tolist():
            group = waiting[self._portrait[image % len(self._portrait)]]
            group.append(image)
            if len(group) == self._batch_size:
                batches.append(group.copy())
                group.clear()
        rest = waiting[0] + waiting[1]
        batches += [rest[at : at + self._batch_size] for at in range(0, len(rest), self._batch_size)]
        if self._training:
            batches = batches[: len(self) * self._world]
        return batches[self._rank :: self._world]
