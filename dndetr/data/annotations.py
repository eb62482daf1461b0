"""COCO-format folders and their JSON: where the splits are, and everything that can be wrong with one.

``find_problems`` lists what is wrong with a document; ``raise_problems`` makes one ``DataError`` of that.
"""

import json
import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .errors import DataError
from .units import are_shares

# Names under which a split may be found, in order of preference.
_NAMES = {
    "train": ("train", "train2017"),
    "val": ("val", "val2017", "valid"),
    "test": ("test", "test2017"),
}


_LONGEST_SIDE = 100_000  # pixels
_MOST_PIXELS = 178_956_970  # beyond it Pillow refuses to decode, since such a file may be a decompression bomb
_FARTHEST = 1e9  # pixels
_LARGEST_AREA = _LONGEST_SIDE**2  # square pixels; COCO's evaluation passes over objects that claim more

# Numbers that some tools write as 3.0.
_WHOLE = {
    "images": ("id", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "iscrowd"),
    "categories": ("id",),
}
_TEXT = "is a text; write the number without quotation marks"

NOTHING_TO_LEARN = "the train split has no objects, there is nothing to learn from; annotate some"

Classes = list[tuple[int, str]]


class Split(NamedTuple):
    """A part of a data set: its annotation file and the folder of its images."""

    name: str
    json: Path
    images: Path

    @property
    def root(self) -> Path:
        """The folder of the data set."""
        return self.json.parent.parent


class Problem(NamedTuple):
    """Something wrong with an annotation file: a kind to count by, and a sentence with the entry and the way out."""

    kind: str
    message: str


def find_split(root: str | Path, split: str) -> Split:
    """Finds ``annotations/instances_<split>.json`` with ``<split>/``, or ``<split>/_annotations.coco.json``.

    split: train, val or test, which also find train2017, val2017, valid and the like, or any exact name.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give the folder of a COCO-format data set")
    tried = []
    for name in _NAMES.get(split, (split,)):
        for path in (root / "annotations" / f"instances_{name}.json", root / name / "_annotations.coco.json"):
            if not path.is_file():
                tried.append(str(path.relative_to(root)))
            elif not (root / name).is_dir():
                raise DataError(f"{path}: its image folder {root / name} is missing; put the images of {name!r} there")
            else:
                return Split(split, path, root / name)
    present = (*root.glob("annotations/*.json"), *root.glob("*/*.coco.json"))
    found = sorted(str(path.relative_to(root)) for path in present)
    if not found:
        raise DataError(
            f"{root}: no annotations here; a COCO-format folder holds {tried[0]} with {split}/, or {tried[1]} "
            "(python -m dndetr.shapes DIR writes an example)"
        )
    raise DataError(f"{root}: no {split!r} split; looked for {', '.join(tried)}; there is {', '.join(found)}")


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
        elif not _is_plain(name):
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


def classes_of(document: dict) -> Classes:
    """Its categories by id."""
    return sorted((category["id"], category["name"]) for category in document["categories"])


def sound_images(document: dict) -> list[dict]:
    """Those of its images whose own fields can be used, whatever is wrong with the others."""
    return [image for image in document["images"] if not any(_image_problems(image))]


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


def raise_problems(problems: Sequence[Problem], split: Split) -> None:
    """A DataError with the first of the problems, if there are any, and the way to see the others."""
    if problems:
        others = f" (and {len(problems) - 1} more: python -m dndetr.check_data {split.root})"
        raise DataError(f"{split.json}: {problems[0].message}" + (others if len(problems) > 1 else ""))


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


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


def _is_plain(text: str) -> bool:
    """Whether a name can be written to a terminal, a file and a picture without doing anything to them."""
    return not any(unicodedata.category(character) in ("Cc", "Cs") for character in text)


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
        if not _is_id(number) or abs(number) >= 2**63:
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
    elif not _is_plain(name):
        yield Problem("image file name", f"{where} has file_name {name!r}; rename that file")
    elif os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir:
        what = f"has file_name {name!r}, which leads out of the image folder; name a file inside it"
        yield Problem("image file name", f"{where} {what}")
    for what, side in zip(("height", "width"), sides, strict=True):
        if not _is_id(side) or not 0 < side <= _LONGEST_SIDE:
            expected = f"; give the file's {what} in whole pixels, at most {_LONGEST_SIDE:,}"
            expected = f", which {_TEXT}" if _is_text_number(side) else expected
            yield Problem("image size", f"{where} has {what} {_short(side)}{expected}")
            return
    if sides[0] * sides[1] > _MOST_PIXELS:
        what = f"is {sides[1]}x{sides[0]} pixels, more than the {_MOST_PIXELS:,} that are read; cut it into tiles"
        yield Problem("image size", f"{where} {what}")


def _box_problem(box: Any) -> str | None:
    if box is None:
        return "has no bbox"
    if isinstance(box, list) and len(box) == 4 and any(map(_is_text_number, box)):
        return f"has bbox {_short(box)}, not four numbers but texts: write them without quotation marks"
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return f"has bbox {_short(box)}, not four numbers x, y, width, height"
    if not all(-_FARTHEST < v < _FARTHEST for v in box):
        return f"has bbox {_short(box)}, which is not finite, or beyond any image"
    if box[2] < 0 or box[3] < 0:
        return f"has bbox {box} of negative size (COCO boxes are x, y, width, height)"
    return None
