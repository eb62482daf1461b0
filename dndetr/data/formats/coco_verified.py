"""LVIS' two lists of categories in the images of a COCO document: what is read of them, and what can be wrong."""

import reprlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ..records import Problem
from ..verified import ABSENT, PARTIAL, Verified, make_lists


class Stated:
    """What the images of a document state, as they come: few have anything, so only these are kept."""

    def __init__(self):
        self._count = 0
        self._rows: dict[int, tuple[Any, Any, Any]] = {}

    def add(self, images: Iterable[tuple[Any, Any, Any]]) -> None:
        """More images: the id, ``neg_category_ids`` and ``not_exhaustive_category_ids`` of each."""
        for place, row in enumerate(images, start=self._count):
            self._count += 1
            if row[1] is not None or row[2] is not None:
                self._rows[place] = row

    def problems(self, known: Collection) -> Iterator[Problem]:
        """What is wrong with these lists, at most one problem for each; known: ids of all categories."""
        for number, *lists in self._rows.values():
            for field, given in zip((ABSENT, PARTIAL), lists, strict=True):
                if what := _problem(given, known):
                    yield Problem(field, f"image {number} has {field} {what}")

    def verified(self, label_of: Mapping[int, int]) -> Verified | None:
        """What the images of a sound document state; None where none of them has either list.

        label_of: of the ids of categories; one that was left out of the classes is passed over.
        """
        if not self._rows:
            return None
        absent, partial = (
            make_lists([self._labels(place, column, label_of) for place in range(self._count)]) for column in (1, 2)
        )
        return Verified(np.isin(np.arange(self._count), [*self._rows]), absent, partial)

    def _labels(self, place: int, column: int, label_of: Mapping[int, int]) -> list[int]:
        given = self._rows[place][column] if place in self._rows else None
        return [label_of[number] for number in given or () if number in label_of]


def _problem(numbers: Any, known: Collection) -> str | None:
    if numbers is None:
        return None
    if not isinstance(numbers, list):
        return f"{reprlib.repr(numbers)}, which is no list; give a list of category ids"
    strange = [number for number in numbers if not is_number(number) or number not in known]
    if not strange:
        return None
    return f"with {reprlib.repr(strange[0])}, which is not in the list of categories; remove it or add that category"


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)
