"""COCO's JSON: what is read of a document, and everything that can be wrong with one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..limits import FARTHEST, LONGEST_SIDE, is_plain, leads_out, too_many_pixels
from ..records import Problem
from ..units import are_shares

_LARGEST_AREA = LONGEST_SIDE**2  # square pixels; COCO's evaluation passes over objects that claim more

# Numbers that some tools write as 3.0.
_WHOLE = {
    "images": ("id", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "iscrowd"),
    "categories": ("id",),
}
_TEXT = "is a text; write the number without quotation marks"


def read_document(path: Path) -> dict:
    """Reads an annotation file whose top level has the three lists images, annotations and categories.

    Ids and sizes that are whole but written as 3.0 come as integers.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:  # some tools begin with a byte order mark
            document = json.load(file)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); is the file complete?") from error
    if not isinstance(document, dict):
        raise DataError(f"{path}: the top level must be an object with images, annotations and categories")
    for key in ("images", "annotations", "categories"):
        if not isinstance(document.get(key), list):
            raise DataError(f"{path}: there is no list {key!r}; is this a COCO annotation file of boxes?")
        if not all(isinstance(entry, dict) for entry in document[key]):
            raise DataError(f"{path}: every entry of {key!r} must be an object")
    if not document["images"]:
        raise DataError(f"{path}: the list of images is empty")
    if not document["categories"]:
        raise DataError(f"{path}: the list of categories is empty; add the classes")
    for key, fields in _WHOLE.items():
        for entry in document[key]:
            for field in fields:
                value = entry.get(field)
                if isinstance(value, float) and value.is_integer():
                    entry[field] = int(value)
    return document


def find_problems(document: dict) -> Iterator[Problem]:
    """What is wrong with the entries of a document, in file order: ids, sizes, references and boxes.

    Boxes without area, boxes that leave the image and crowd regions are no problem: loading drops or clips them.
    """
    yield from _id_problems("category", document["categories"])
    yield from _id_problems("image", document["images"])
    yield from _id_problems("annotation", document["annotations"])
    for category in document["categories"]:
        name, where = category.get("name"), f"category {category.get('id')}"
        if not isinstance(name, str):
            yield Problem("category name", f"{where} {_no_text('name', name)}; give it a text")
        elif not is_plain(name):
            yield Problem("category name", f"{where} has name {name!r}; take its control characters out")
    for image in document["images"]:
        yield from _image_problems(image)
    images = {_key(image.get("id")) for image in document["images"]} - {None}
    categories = {_key(category.get("id")) for category in document["categories"]} - {None}
    boxes = []
    for entry in document["annotations"]:
        where = f"annotation {entry.get('id')}"
        image, category = entry.get("image_id"), entry.get("category_id")
        if _key(image) not in images:
            what = _TEXT if _is_text_number(image) else "is not in the list; remove it or add that image"
            yield Problem("unknown image", f"{where} has image_id {_short(image)}, which {what}")
        if _key(category) not in categories:
            what = _TEXT if _is_text_number(category) else "is not in the list; add that category"
            yield Problem("unknown category", f"{where} has category_id {_short(category)}, which {what}")
        if problem := _box_problem(entry.get("bbox")):
            yield Problem("box", f"{where} (image {image}) {problem}; correct or remove it")
        else:
            boxes.append(entry["bbox"])
        area, crowd = entry.get("area"), entry.get("iscrowd")
        if area is not None and not (_is_number(area) and 0 <= area <= _LARGEST_AREA):
            what = f", which {_TEXT}" if _is_text_number(area) else "; give it in square pixels or leave it out"
            yield Problem("area", f"{where} has area {_short(area)}{what}")
        if crowd not in (None, 0, 1):
            what = f", which {_TEXT}" if _is_text_number(crowd) else "; give 0 or 1"
            yield Problem("iscrowd", f"{where} has iscrowd {_short(crowd)}{what}")
    if are_shares(boxes):
        what = "all lie within [0, 1] and seem to be shares of the image's sides"
        yield Problem("units", f"the boxes {what}; give x, y, width, height in pixels, from the top left corner")


def sound_images(document: dict) -> list[dict]:
    """Those of its images whose own fields can be used, whatever is wrong with the others; an unusable id is -1."""
    images = [image for image in document["images"] if not any(_image_problems(image))]
    return [image if _is_number_of_its_own(image.get("id")) else image | {"id": -1} for image in images]


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number_of_its_own(value: Any) -> bool:
    return _is_id(value) and abs(value) < 2**63


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_text_number(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        float(value)
    except ValueError:
        return False
    return True


def _no_text(field: str, value: Any) -> str:
    return f"has no {field}" if value in (None, "") else f"has {field} {_short(value)}, which is no text"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _key(value: Any) -> int | None:
    """An id to look up; None for all that is not a whole number."""
    return value if _is_id(value) else None


def _id_problems(kind: str, entries: list[dict]) -> Iterator[Problem]:
    seen = set()
    for position, entry in enumerate(entries):
        number = entry.get("id")
        if not _is_number_of_its_own(number):
            what = f", which {_TEXT}" if _is_text_number(number) else "; give it a whole number of its own"
            yield Problem(f"{kind} id", f"{kind} number {position} of the list has id {_short(number)}{what}")
        elif number in seen:
            yield Problem(f"{kind} id", f"{kind} id {number} is there twice; give each {kind} its own")
        else:
            seen.add(number)


def _image_problems(image: dict) -> Iterator[Problem]:
    where = f"image {image.get('id')}"
    name, sides = image.get("file_name"), [image.get("height"), image.get("width")]
    if not isinstance(name, str) or not name or "\0" in name:
        yield Problem("image file name", f"{where} {_no_text('file_name', name)}; give the file's name")
    elif not is_plain(name):
        yield Problem("image file name", f"{where} has file_name {name!r}; rename that file")
    elif leads_out(name):
        what = f"has file_name {name!r}, which leads out of the image folder; name a file inside it"
        yield Problem("image file name", f"{where} {what}")
    for what, side in zip(("height", "width"), sides, strict=True):
        if not _is_id(side) or not 0 < side <= LONGEST_SIDE:
            expected = f"; give the file's {what} in whole pixels, at most {LONGEST_SIDE:,}"
            expected = f", which {_TEXT}" if _is_text_number(side) else expected
            yield Problem("image size", f"{where} has {what} {_short(side)}{expected}")
            return
    if what := too_many_pixels(*sides):
        yield Problem("image size", f"{where} {what}")


def _box_problem(box: Any) -> str | None:
    if box is None:
        return "has no bbox"
    if isinstance(box, list) and len(box) == 4 and any(map(_is_text_number, box)):
        return f"has bbox {_short(box)}, not four numbers but texts: write them without quotation marks"
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return f"has bbox {_short(box)}, not four numbers x, y, width, height"
    if not all(-FARTHEST < v < FARTHEST for v in box):
        return f"has bbox {_short(box)}, which is not finite, or beyond any image"
    if box[2] < 0 or box[3] < 0:
        return f"has bbox {box} of negative size (COCO boxes are x, y, width, height)"
    return None
