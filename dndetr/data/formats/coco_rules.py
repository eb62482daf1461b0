"""What can be wrong with one entry of COCO's JSON, whatever the others are."""

from collections.abc import Container, Iterator
from typing import Any

from ..limits import FARTHEST, LONGEST_SIDE, is_plain, leads_out, too_many_pixels
from ..records import Problem

LARGEST_AREA = LONGEST_SIDE**2
"""Square pixels; COCO's evaluation passes over objects that claim more."""
_TEXT = "is a text; write the number without quotation marks"


def is_id(value: Any) -> bool:
    """Whether a value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number_of_its_own(value: Any) -> bool:
    """Whether a value can be an id: a whole number of 64 bits, but for the lowest."""
    return is_id(value) and abs(value) < 2**63


def id_problem(kind: str, position: int, number: Any) -> Problem:
    """That of an entry, by its place in the list, whose id can be none."""
    what = f", which {_TEXT}" if _is_text_number(number) else "; give it a whole number of its own"
    return Problem(f"{kind} id", f"{kind} number {position} of the list has id {_short(number)}{what}")


def repeated_id(kind: str, number: int) -> Problem:
    """That of an entry whose id another one before it has."""
    return Problem(f"{kind} id", f"{kind} id {number} is there twice; give each {kind} its own")


def category_problems(category: dict) -> Iterator[Problem]:
    """What is wrong with a category but for its id."""
    name, where = category.get("name"), f"category {category.get('id')}"
    if not isinstance(name, str):
        yield Problem("category name", f"{where} {_no_text('name', name)}; give it a text")
    elif not is_plain(name):
        yield Problem("category name", f"{where} has name {name!r}; take its control characters out")


def image_problems(image: dict) -> Iterator[Problem]:
    """What is wrong with an image but for its id."""
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
        if not is_id(side) or not 0 < side <= LONGEST_SIDE:
            expected = f"; give the file's {what} in whole pixels, at most {LONGEST_SIDE:,}"
            expected = f", which {_TEXT}" if _is_text_number(side) else expected
            yield Problem("image size", f"{where} has {what} {_short(side)}{expected}")
            return
    if what := too_many_pixels(*sides):
        yield Problem("image size", f"{where} {what}")


def annotation_problems(entry: dict, images: Container, categories: Container) -> Iterator[Problem]:
    """What is wrong with an annotation but for its id; images, categories: all ids that there are.

    A box without area, one that leaves the image and a crowd region are no problem: loading drops or clips them.
    """
    where = f"annotation {entry.get('id')}"
    image, category = entry.get("image_id"), entry.get("category_id")
    if not is_id(image) or image not in images:
        what = _TEXT if _is_text_number(image) else "is not in the list; remove it or add that image"
        yield Problem("unknown image", f"{where} has image_id {_short(image)}, which {what}")
    if not is_id(category) or category not in categories:
        what = _TEXT if _is_text_number(category) else "is not in the list; add that category"
        yield Problem("unknown category", f"{where} has category_id {_short(category)}, which {what}")
    if problem := box_problem(entry.get("bbox")):
        yield Problem("box", f"{where} (image {image}) {problem}; correct or remove it")
    area, crowd = entry.get("area"), entry.get("iscrowd")
    if area is not None and not (_is_number(area) and 0 <= area <= LARGEST_AREA):
        what = f", which {_TEXT}" if _is_text_number(area) else "; give it in square pixels or leave it out"
        yield Problem("area", f"{where} has area {_short(area)}{what}")
    if crowd not in (None, 0, 1):
        what = f", which {_TEXT}" if _is_text_number(crowd) else "; give 0 or 1"
        yield Problem("iscrowd", f"{where} has iscrowd {_short(crowd)}{what}")


def box_problem(box: Any) -> str | None:
    """What is wrong with a bbox, after "annotation 5 (image 3)"."""
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
