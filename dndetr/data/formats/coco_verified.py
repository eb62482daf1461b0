"""LVIS' two lists of categories in the images of a COCO document: what is read of them, and what can be wrong."""

import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..classes import Classes
from ..records import Problem
from ..verified import ABSENT, PARTIAL, Verified, make_lists


def read_verified(document: dict, classes: Classes) -> Verified | None:
    """What the images of a sound document state; None where none of them has either list.

    A category that was left out of the classes is passed over.
    """
    images = document["images"]
    stated = [any(image.get(field) is not None for field in (ABSENT, PARTIAL)) for image in images]
    if not any(stated):
        return None
    label_of = {number: label for label, (number, _) in enumerate(classes)}
    absent, partial = (
        make_lists([[label_of[x] for x in image.get(field) or () if x in label_of] for image in images])
        for field in (ABSENT, PARTIAL)
    )
    return Verified(np.array(stated), absent, partial)


def verified_problems(document: dict) -> Iterator[Problem]:
    """What is wrong with these lists, at most one problem for each."""
    known = {number for category in document["categories"] if _is_number(number := category.get("id"))}
    for image in document["images"]:
        for field in (ABSENT, PARTIAL):
            if what := _problem(image, field, known):
                yield Problem(field, f"image {image.get('id')} has {field} {what}")


def _problem(image: Mapping, field: str, known: set) -> str | None:
    numbers = image.get(field)
    if numbers is None:
        return None
    if not isinstance(numbers, list):
        return f"{reprlib.repr(numbers)}, which is no list; give a list of category ids"
    strange = [number for number in numbers if not _is_number(number) or number not in known]
    if not strange:
        return None
    return f"with {reprlib.repr(strange[0])}, which is not in the list of categories; remove it or add that category"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
