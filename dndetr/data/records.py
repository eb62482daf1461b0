"""What every format yields: the images of a split and their objects, in columns, and what is wrong with them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from .classes import Classes
from .errors import DataError
from .summary import Summary, clip, corners_of, summarise
from .verified import Verified

NOTHING_TO_LEARN = "the train split has no objects, there is nothing to learn from; annotate some"


class Problem(NamedTuple):
    """Something wrong with a split: a kind to count by, a sentence with the entry and the way out, and the file.

    where: the file, with the line if it has one ("labels/a.txt:3"); None for the file that the split is read from.
    """

    kind: str
    message: str
    where: str | None = None


class Objects(NamedTuple):
    """Objects of a split in columns, image by image, each image's in the order of its annotations.

    image [m] int64, the place of its image; label [m] int64, the place of its class; boxes [m, 4] float64 x, y, width,
    height in pixels, as given; crowd [m] bool; areas [m] float64 in square pixels; ids [m] int64.
    """

    image: np.ndarray
    label: np.ndarray
    boxes: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    ids: np.ndarray

    def where(self, chosen: np.ndarray) -> "Objects":
        """Those that an index or a mask chooses."""
        return Objects(*(column[chosen] for column in self))


def make_objects(
    image: Sequence[int],
    label: Sequence[int],
    boxes: Sequence[Sequence[float]],
    crowd: Sequence[bool] | None = None,
    areas: Sequence[float] | None = None,
    ids: Sequence[int] | None = None,
) -> Objects:
    """Objects from their fields in any order of images.

    By default none is a crowd, areas are those of the boxes (also where one is NaN), and ids run from 1 on.
    """
    image = np.asarray(image, np.int64)
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    own = boxes[:, 2] * boxes[:, 3]
    given = own if areas is None else np.asarray(areas, np.float64)
    objects = Objects(
        image,
        np.asarray(label, np.int64),
        boxes,
        np.zeros(len(image), bool) if crowd is None else np.asarray(crowd, bool),
        np.where(np.isnan(given), own, given),
        np.arange(1, len(image) + 1) if ids is None else np.asarray(ids, np.int64),
    )
    return by_image(objects)


def by_image(objects: Objects) -> Objects:
    """Objects in any order of images, image by image."""
    order = image_order(objects.image)
    return objects if order is None else objects.where(order)


def image_order(image: np.ndarray) -> np.ndarray | None:
    """The order in which places of images [m] are ascending, and those of one as they were; None for that they have."""
    return None if (image[1:] >= image[:-1]).all() else np.argsort(image, kind="stable")


@dataclass(frozen=True, eq=False)
class Records:
    """A split of a data set, whatever format it is in.

    root: the data set's folder; file: from which the split is read, named in messages; folder: what the images' file
    ``names`` are relative to. classes: the split's own, (id, name) in label order. ids [n] int64 and sizes [n, 2] int64
    (height, width) of the images; numbered: whether these ids are the annotations' own, which users know. remarks: what
    was left out in reading, in words. verified: of federated annotations, what was looked for. known: the ``summary``
    of exactly these objects, where it was worked out before. With ``problems`` only the images can be relied upon, and
    those with problems of their own are not among them.
    """

    name: str
    root: Path
    file: Path
    folder: Path
    classes: Classes
    names: Sequence[str]
    ids: np.ndarray
    sizes: np.ndarray
    objects: Objects
    numbered: bool = False
    remarks: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    verified: Verified | None = None
    known: Summary | None = None

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def summary(self) -> Summary:
        """What there is to know of all objects before training."""
        return self.known or summarise(self.sizes, self.objects, len(self.classes))

    def path(self, index: int) -> Path:
        """The file of an image."""
        return self.folder / self.names[index]

    def named(self, images: Sequence[int]) -> Iterator[tuple[int, str]]:
        """Images by their numbers, ascending, with their names."""
        if len(images) == len(self):
            return enumerate(self.names)  # quicker than one by one
        return ((index, self.names[index]) for index in images)

    def called(self, index: int) -> str:
        """How a message about an image begins: with its id, where users know that."""
        return f"image {self.ids[index]}: " if self.numbered else ""

    def of(self, problem: Problem) -> str:
        """A problem in one line, with its file."""
        return f"{problem.where or self.file}: {problem.message}"

    def take(self, chosen: Sequence[int], name: str | None = None) -> "Records":
        """The same with some of the images, in ascending order, maybe as a split of another name."""
        chosen = np.asarray(chosen, np.int64)
        place = np.full(len(self), -1)
        place[chosen] = np.arange(len(chosen))
        objects = self.objects.where(place[self.objects.image] >= 0)
        return replace(
            self,
            name=name or self.name,
            names=[self.names[index] for index in chosen.tolist()],
            ids=self.ids[chosen],
            sizes=self.sizes[chosen],
            objects=objects._replace(image=place[objects.image]),
            verified=None if self.verified is None else self.verified.take(chosen),
            known=None,
        )

    def clipped(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Boxes of all objects [m, 4] xyxy pixels, as given and clipped to their images, and which training uses.

        The latter [m] bool: no crowds, and nothing without an area within its image.
        """
        corners = corners_of(self.objects.boxes)
        return corners, *clip(corners, self.sizes[self.objects.image], self.objects.crowd)

    def coco_dict(self) -> dict:
        """The split as a COCO document."""
        objects = self.objects
        numbers = [number for number, _ in self.classes]
        rows = zip(*(column.tolist() for column in objects), strict=True)
        ids = self.ids.tolist()
        stated = [{}] * len(self) if self.verified is None else self.verified.fields(numbers)
        return {
            "images": [
                {"id": number, "file_name": name, "height": height, "width": width} | lists
                for number, name, (height, width), lists in zip(
                    ids, self.names, self.sizes.tolist(), stated, strict=True
                )
            ],
            "annotations": [
                {
                    "id": number,
                    "image_id": ids[image],
                    "category_id": numbers[label],
                    "bbox": box,
                    "area": area,
                    "iscrowd": int(crowd),
                }
                for image, label, box, crowd, area, number in rows
            ],
            "categories": [{"id": number, "name": name} for number, name in self.classes],
        }


class Source(Protocol):
    """A data set as a format finds it; modules of ``formats`` have a function ``find`` that makes one, or None."""

    root: Path
    """The folder that was given, or that of the file that was given."""
    about: str
    """What lies there, in a few words: format and layout."""
    splits: tuple[str, ...]
    """Which of train, val and test it has; a set that nobody has divided is all train."""

    def read(self, split: str) -> Records:
        """A split by one of these names, or any other that the data set has.

        DataError where there is none, or where it cannot be looked into at all; all else is in ``problems``.
        """


def pairs(sizes: np.ndarray) -> list[tuple[int, int]]:
    """The rows of an array [n, 2] as tuples of Python's integers."""
    return list(zip(*sizes.T.tolist(), strict=True))


def raise_problems(problems: Sequence[Problem], records: Records) -> None:
    """A DataError with the first of the problems, if there are any, and the way to see the others."""
    if problems:
        others = f" (and {len(problems) - 1} more: python -m dndetr.check_data {records.root})"
        raise DataError(records.of(problems[0]) + (others if len(problems) > 1 else ""))


def class_problems(own: Classes, classes: Classes) -> Iterator[Problem]:
    """What keeps a split with its own (id, name) pairs from being evaluated with the classes of training."""
    names = dict(classes)
    for number, name in own:
        if number not in names:
            what = f"category {number} ({name!r}) is not among the classes of training; add it there"
            yield Problem("classes", what)
        elif names[number] != name:
            what = f"category {number} is {name!r} here and {names[number]!r} in training; "
            yield Problem("classes", what + "give both files the same categories")
