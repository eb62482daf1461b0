"""Which images of a data set are for validation: a share of them, and of every class.

It depends on the names of the files and on the classes in them alone, not on their order or on that of the classes, so
it is the same in every format and on every machine.
"""

import hashlib
import os
from collections import Counter

import numpy as np

from .errors import DataError
from .records import Records

_MOVES = 500  # images moved to the other side, at most, in search of a division with all classes on both
_LOOKED_AT = 50  # images of a class, at most, among which the one to move is chosen


def divide(records: Records, share: float) -> np.ndarray:
    """Which images [n] bool are for validation.

    Every class that several images have is on both sides, as long as that can be had: two classes may share images so
    that it cannot. Beyond that each side has its share of each class, the rare ones first. Images of one file stay
    together, and crowd regions do not count. DataError where there is one image alone.
    """
    rank = {name: place for place, name in enumerate(sorted(set(records.names), key=_draw))}
    if len(rank) < 2:
        raise DataError(f"{records.file}: one image cannot be divided; add others, or a val split")
    drawn = np.array([rank[name] for name in records.names])
    single = records.objects.where(~records.objects.crowd)
    sides = _Sides(len(rank), drawn[single.image], single.label)
    sides.assign(share)
    sides.mend()
    sides.balance(_for_val(share, len(rank)))
    return sides.val[drawn]


def _draw(name: str) -> tuple[bytes, str]:
    """What a file's name draws, wherever the file is."""
    return hashlib.blake2b(os.path.basename(name).encode("utf-8", "surrogatepass"), digest_size=8).digest(), name


def _for_val(share: float, count: int) -> int:
    """How many of so many images are for validation: one at least, where one is left."""
    return round(share * count) if count < 2 else min(max(1, round(share * count)), count - 1)


class _Sides:
    """Images 0 to n - 1, in the order of the draw, and their classes, the rarest first, on two sides.

    ``val`` [n] bool says on which side an image is, ``on`` [2, K] how many images of a class are on each: 1 is val.
    """

    def __init__(self, count: int, image: np.ndarray, label: np.ndarray):
        label, image = np.divmod(np.unique(label * count + image), count)
        groups = [group for group in np.split(image, np.flatnonzero(np.diff(label)) + 1) if len(group)]
        groups.sort(key=lambda group: (len(group), group.tolist()))
        self._images_of, self._sizes = groups, np.array([len(group) for group in groups], np.int64)
        self._several = self._sizes > 1
        image = np.concatenate([*groups, np.empty(0, np.int64)])
        self._classes = np.repeat(np.arange(len(groups)), self._sizes)[np.argsort(image, kind="stable")]
        self._starts = np.concatenate(([0], np.bincount(image, minlength=count).cumsum()))
        self.val = np.zeros(count, bool)
        self._count()

    def assign(self, share: float) -> None:
        """Give every class, and then all images, their share, as far as those that have a side already let it."""
        open_ = np.ones(len(self.val), bool)
        for images in [*self._images_of, np.arange(len(self.val))]:
            lacking = max(0, _for_val(share, len(images)) - int(self.val[images].sum()))
            self.val[images[open_[images]][:lacking]] = True
            open_[images] = False
        self._count()

    def mend(self) -> None:
        """Move images to the other side until every class of several images is on both, or nothing helps."""
        fewest, best = len(self._several) + 1, self.val
        moves: Counter[int] = Counter()
        for number in range(_MOVES):
            lost = np.flatnonzero(self._several & (self.on == 0).any(axis=0))
            if len(lost) < fewest:
                fewest, best = len(lost), self.val.copy()
            if not len(lost):
                break
            # By turns, since the rarest may be one that cannot be mended.
            images = self._images_of[lost[number % len(lost)]][:_LOOKED_AT].tolist()
            # What was moved often is left alone, or the same few images would go to and fro.
            chosen = min(images, key=lambda image: self._harm(image) + moves[image])
            moves[chosen] += 1
            self._move(chosen)
        self.val = best
        self._count()

    def balance(self, wanted: int) -> None:
        """Move images, in the order of the draw, until so many are for validation or a class would be lost on a side.

        Those with a class of their own, which is better learned than asked for, are the last to go there.
        """
        surplus = int(self.val.sum()) - wanted
        images = np.flatnonzero(self.val == (surplus > 0)).tolist()
        if surplus < 0:
            images.sort(key=lambda image: not self._several[self._classes_of(image)].all())
        for image in images:
            if not surplus:
                break
            if not self._last(image):
                self._move(image)
                surplus -= 1 if surplus > 0 else -1

    def _classes_of(self, image: int) -> np.ndarray:
        return self._classes[self._starts[image] : self._starts[image + 1]]

    def _count(self) -> None:
        on_val = np.array([self.val[images].sum() for images in self._images_of], np.int64)
        self.on = np.stack((self._sizes - on_val, on_val))

    def _move(self, image: int) -> None:
        side, classes = int(self.val[image]), self._classes_of(image)
        self.on[side, classes] -= 1
        self.on[1 - side, classes] += 1
        self.val[image] = not side

    def _last(self, image: int) -> int:
        """How many classes of several images would be lost on a side without this image there."""
        classes = self._classes_of(image)
        return int((self._several[classes] & (self.on[int(self.val[image]), classes] == 1)).sum())

    def _harm(self, image: int) -> int:
        """How many more classes would be lost on a side if this image were moved."""
        classes = self._classes_of(image)
        won = self._several[classes] & (self.on[1 - int(self.val[image]), classes] == 0)
        return self._last(image) - int(won.sum())
