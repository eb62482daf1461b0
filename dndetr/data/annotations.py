"""COCO-format folders and their JSON: where the splits are, and everything that can be wrong with one.

``find_problems`` lists what is wrong with a document; loading a split raises the first of them as a ``DataError``.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dndetr.data.errors import DataError

# Names under which a split may be found, in order of preference.
_NAMES = {
    "train": ("train", "train2017"),
    "val": ("val", "val2017", "valid"),
    "test": ("test", "test2017"),
}


class Split(NamedTuple):
    """A part of a data set: its annotation file and the folder of its images."""

    name: str
    json: Path
    images: Path


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
    """Reads an annotation file whose top level has the three lists images, annotations and categories."""
    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
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
    return document


def find_problems(document: dict) -> Iterator[Problem]:
    """What is wrong with the entries of a document, in file order: ids, sizes, references and boxes.

    Boxes without area, boxes that leave the image and crowd regions are no problem: loading drops or clips them.
    """
    yield from _id_problems("category", document["categories"])
    yield from _id_problems("image", document["images"])
    yield from _id_problems("annotation", document["annotations"])
    for category in document["categories"]:
        if not isinstance(category.get("name"), str):
            yield Problem("category name", f"category {category.get('id')} has no name; give it a text")
    for image in document["images"]:
        if not isinstance(image.get("file_name"), str):
            yield Problem("image file name", f"image {image.get('id')} has no file_name; give the file's name")
        for side in ("width", "height"):
            if not _is_id(image.get(side)) or image[side] <= 0:
                what = f"image {image.get('id')} has {side} {image.get(side)!r}; give the file's {side} in pixels"
                yield Problem("image size", what)
    images = {_key(image.get("id")) for image in document["images"]} - {None}
    categories = {_key(category.get("id")) for category in document["categories"]} - {None}
    for entry in document["annotations"]:
        where = f"annotation {entry.get('id')}"
        if _key(entry.get("image_id")) not in images:
            what = f"has image_id {entry.get('image_id')!r}, which is not in the list; remove it or add that image"
            yield Problem("unknown image", f"{where} {what}")
        if _key(entry.get("category_id")) not in categories:
            what = f"has category_id {entry.get('category_id')!r}, which is not in the list; add that category"
            yield Problem("unknown category", f"{where} {what}")
        if problem := _box_problem(entry.get("bbox")):
            yield Problem("box", f"{where} (image {entry.get('image_id')}) {problem}; correct or remove it")


def missing_files(split: Split, names: list[str]) -> list[str]:
    """Those file names that are not in the split's image folder."""
    present = set(os.listdir(split.images))
    return [name for name in names if name not in present and not (split.images / name).is_file()]


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _key(value: Any) -> int | None:
    """An id to look up; None for all that is not a whole number."""
    return value if _is_id(value) else None


def _id_problems(kind: str, entries: list[dict]) -> Iterator[Problem]:
    seen = set()
    for position, entry in enumerate(entries):
        number = entry.get("id")
        if not _is_id(number) or abs(number) >= 2**63:
            what = f"{kind} number {position} of the list has id {number!r}; give it a whole number of its own"
            yield Problem(f"{kind} id", what)
        elif number in seen:
            yield Problem(f"{kind} id", f"{kind} id {number} is there twice; give each {kind} its own")
        else:
            seen.add(number)


def _box_problem(box: Any) -> str | None:
    if box is None:
        return "has no bbox"
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, int | float) for v in box):
        return f"has bbox {box!r}, not four numbers x, y, width, height"
    if not all(math.isfinite(v) for v in box):
        return f"has bbox {box}, which is not finite"
    if box[2] < 0 or box[3] < 0:
        return f"has bbox {box} of negative size (COCO boxes are x, y, width, height)"
    return None
