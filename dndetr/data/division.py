"""A validation split for data without one: the same images every time, on both sides of every class.

Which images they are depends on the names of the files and on the classes in them alone, not on their order, so it is
the same in every format and on every machine.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from ..files import demand_file, write_json_atomic
from .classes import listed
from .errors import DataError
from .records import Records, Source

_TRIES = 10_000  # images moved to the other side, at most, in search of a division with all classes on both


class Divided:
    """A data set whose train split is divided into train and val.

    share: of the images for val. file: a JSON file with the names of the images on each side, {"train": [...], "val":
    [...]}: it decides where it is there, and is written where it is not. DataError where there is a val split already,
    where an image is on neither side or on both, or for names that are no images.
    """

    def __init__(self, source: Source, share: float | None = None, file: str | Path | None = None):
        if "val" in source.splits:
            flag = "--val-share" if share is not None else "--split-file"
            raise DataError(f"{source.root}: there is a val split already; leave out {flag}")
        self._source, self._share, self._file = source, share, None if file is None else Path(file)
        if self._file is not None and not self._file.exists():
            if share is None:
                raise DataError(f"--split-file {file}: no such file; to have it made give --val-share 0.2 too")
            demand_file(self._file, "give another --split-file")
        self.root, self.splits = source.root, tuple(dict.fromkeys(("train", "val", *source.splits)))
        known = self._file is not None and self._file.exists()
        how = f"divided as in {self._file}" if known else f"{share:.0%} of the images are for validation"
        self.about = f"{source.about}; {how}"

    def read(self, split: str) -> Records:
        """One of the sides, or another split that the data set has."""
        if split not in ("train", "val"):
            return self._source.read(split)
        chosen = self._chosen[split]
        return self._whole if self._whole.problems else self._whole.take(chosen, name=split)

    @cached_property
    def _whole(self) -> Records:
        return self._source.read("train")

    @cached_property
    def _chosen(self) -> dict[str, list[int]]:
        """The images of each side."""
        records = self._whole
        if records.problems:
            return {"train": [], "val": []}
        if self._file is not None and self._file.exists():
            return _as_in(self._file, records)
        val = divide(records, self._share)
        chosen = {"train": np.flatnonzero(~val).tolist(), "val": np.flatnonzero(val).tolist()}
        if self._file is not None:
            names = {side: [records.names[index] for index in indices] for side, indices in chosen.items()}
            write_json_atomic(self._file, names, indent=1)
        return chosen


def divide(records: Records, share: float) -> np.ndarray:
    """Which images [n] bool are for validation.

    Every class that several images have is on both sides, as long as that can be had: two classes may share images
    so that it cannot. Beyond that each side has its share of each class, the rare ones first.
    """
    if len(records) < 2:
        raise DataError(f"{records.file}: one image cannot be divided; add others, or a val split")
    order = np.array(sorted(range(len(records)), key=lambda index: _draw(records.names[index])), np.int64)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    groups = _images_by_class(records, rank)
    side = np.full(len(records), -1)  # 1: val, 0: train
    for images in sorted(groups, key=lambda images: (len(images), rank[images[0]])):
        _assign(side, images, share)
    _assign(side, order, share)
    val = side == 1
    _mend(val, groups)
    _balance(val, groups, order, min(max(1, round(share * len(records))), len(records) - 1))
    return val


def _draw(name: str) -> bytes:
    """A number that a file's name draws, wherever the file is."""
    base = os.path.basename(name)
    return hashlib.blake2b(base.encode("utf-8", "surrogatepass"), digest_size=8).digest() + os.fsencode(name)


def _images_by_class(records: Records, rank: np.ndarray) -> list[np.ndarray]:
    """The images of each class that has any, in the order of the draw."""
    pairs = np.unique(np.stack((records.objects.label, rank[records.objects.image])), axis=1)
    order = np.argsort(rank)
    borders = np.flatnonzero(np.diff(pairs[0])) + 1
    return [order[part] for part in np.split(pairs[1], borders) if len(part)]


def _assign(side: np.ndarray, images: np.ndarray, share: float) -> None:
    """Give those images that have no side yet one, so that of all of them the share is for validation."""
    free = images[side[images] < 0]
    wanted = round(share * len(images))
    if len(images) > 1:
        wanted = min(max(1, wanted), len(images) - 1)
    count = min(max(0, wanted - int((side[images] == 1).sum())), len(free))
    side[free[:count]], side[free[count:]] = 1, 0


def _mend(val: np.ndarray, groups: Sequence[np.ndarray]) -> None:
    """Move images to the other side until every class of several images is on both, or nothing helps."""
    several = [images for images in groups if len(images) > 1]
    of_image: dict[int, list[int]] = {}
    for number, images in enumerate(several):
        # Only what has few images can be on one side, and only its images will be moved.
        for index in images.tolist():
            of_image.setdefault(index, []).append(number)
    on_val = np.array([int(val[images].sum()) for images in several])
    total = np.array([len(images) for images in several])
    fewest, best = None, val.copy()
    visits: dict[int, int] = {}
    for _ in range(_TRIES):
        lacking = np.flatnonzero((on_val == 0) | (on_val == total))
        if fewest is None or len(lacking) < fewest:
            fewest, best = len(lacking), val.copy()
        if not len(lacking):
            break

        def harm(index: int) -> tuple[int, int]:
            step = -1 if val[index] else 1
            after = on_val[of_image[index]] + step
            return int(((after == 0) | (after == total[of_image[index]])).sum()), visits.get(index, 0)

        index = min(several[lacking[0]].tolist(), key=harm)
        visits[index] = visits.get(index, 0) + 1
        on_val[of_image[index]] += -1 if val[index] else 1
        val[index] = not val[index]
    val[:] = best


def _balance(val: np.ndarray, groups: Sequence[np.ndarray], order: np.ndarray, wanted: int) -> None:
    """Move images of common classes until so many are for validation, as far as no class is lost on a side."""
    counts = np.zeros((2, len(groups)), np.int64)
    of_image: dict[int, list[int]] = {}
    for number, images in enumerate(groups):
        counts[1, number] = val[images].sum()
        counts[0, number] = len(images) - counts[1, number]
        for index in images.tolist():
            of_image.setdefault(index, []).append(number)
    surplus = int(val.sum()) - wanted
    source = int(surplus > 0)
    for index in order.tolist():
        if not surplus:
            return
        classes = of_image.get(index, [])
        if val[index] == source and (counts[source, classes] > 1).all():
            counts[source, classes] -= 1
            counts[1 - source, classes] += 1
            val[index] = not source
            surplus += -1 if source else 1


def _as_in(file: Path, records: Records) -> dict[str, list[int]]:
    """The images of each side as a file has them."""
    sides = _read(file)
    place = {name: index for index, name in enumerate(records.names)}
    if strange := [name for names in sides.values() for name in names if name not in place]:
        what = f"is no image of {records.file}" if len(strange) == 1 else f"are no images of {records.file}"
        raise DataError(f"{file}: {listed(strange, 3)} {what}; take it out, or remove the file to divide anew")
    both = set(sides["train"]) & set(sides["val"])
    left = set(place) - set(sides["train"]) - set(sides["val"])
    for names, where in ((both, "on both sides"), (left, "on neither side")):
        if names:
            raise DataError(
                f"{file}: {listed(sorted(names), 3)}: {where}; put it on one, or remove the file to divide anew"
            )
    return {side: sorted(place[name] for name in names) for side, names in sides.items()}


def _read(file: Path) -> dict[str, list[str]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not valid JSON ({error}); remove the file to divide anew") from error
    sound = isinstance(content, dict) and set(content) == {"train", "val"} and all(map(_are_names, content.values()))
    if not sound:
        what = 'give {"train": [names of image files], "val": [...]}, each with one name or more'
        raise DataError(f"{file}: not a division into train and val; {what}, or remove the file to divide anew")
    return content


def _are_names(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)
