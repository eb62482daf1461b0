"""COCO-format folders: where their splits are, and what their documents become.

Layouts: ``annotations/instances_<split>.json`` with ``<split>/``, ``images/<split>/`` or ``images/``;
``<split>/_annotations.coco.json`` beside its images, as Roboflow writes it; ``instances_default.json``, as CVAT
writes it, and ``result.json``, as Label Studio does, of sets that nobody has divided; LVIS and Objects365 as published.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np

from ..classes import Classes, listed
from ..errors import DataError
from ..records import Objects, Problem, Records, make_objects
from ..split_names import NAMES, names_of, no_split
from .coco_document import find_problems, read_document, sound_images
from .coco_verified import read_verified, verified_problems
from .published_sets import find_images, is_published, published_files

# Of a set that nobody has divided: the file, and who writes it.
_UNDIVIDED = {
    "annotations/instances_default.json": "CVAT",
    "result.json": "Label Studio",
    "_annotations.coco.json": "Roboflow",
}


class _Split(NamedTuple):
    """An annotation file and the folder of its images."""

    file: Path
    folder: Path


def find(path: Path) -> "CocoSource | None":
    """The COCO-format data set in a folder, if there is one."""
    return CocoSource(path) if path.is_dir() and any(_documents(path)) else None


class CocoSource:
    """A COCO-format folder."""

    def __init__(self, root: Path):
        self.root = root
        self._undivided = next((name for name in _UNDIVIDED if (root / name).is_file()), None)
        if any(path.is_file() for _, path in _annotation_files(root, "train")):
            self._undivided = None
        self.splits = tuple(split for split in NAMES if self._is_there(split))
        writer = f" of {_UNDIVIDED[self._undivided]}" if self._undivided else ""
        self.about = f"COCO{writer}, {self._relative(next(_documents(root)))}"

    def read(self, split: str) -> Records:
        """A split of that name, of which ``val`` may also be called val2017 or valid, and the like."""
        file, folder = self._find(split)
        document = read_document(file)
        problems, remarks = [], []
        if self._undivided == "result.json":
            problems += _label_studio_names(document, self.root)
        find_images(document, folder, (split, f"images/{split}", "images", "") if is_published(file) else ("",))
        problems += find_problems(document)
        problems += verified_problems(document)
        if problems:
            images, classes, objects, verified = sound_images(document), [], make_objects([], [], []), None
        else:
            images = document["images"]
            classes = sorted((category["id"], category["name"]) for category in document["categories"])
            if roots := _unused_roots(document):
                classes = [entry for entry in classes if entry not in roots]
                names = listed([name for _, name in roots])
                remarks.append(f"category {names} left out: it names the others and has no objects")
            objects, verified = _objects(document, classes), read_verified(document, classes)
        return Records(
            name=split,
            root=self.root,
            file=file,
            folder=folder,
            classes=classes,
            names=[image["file_name"] for image in images],
            ids=np.array([image["id"] for image in images], np.int64),
            sizes=np.array([(image["height"], image["width"]) for image in images], np.int64).reshape(-1, 2),
            objects=objects,
            verified=verified,
            numbered=True,
            remarks=remarks,
            problems=problems,
        )

    def _find(self, split: str) -> _Split:
        if self._undivided and split == "train":
            file = self.root / self._undivided
            images = self.root / "images"
            folder = next((place for place in (images / "default", images) if place.is_dir()), self.root)
            return _Split(file, self.root if self._undivided == "result.json" else folder)
        for name, path in _annotation_files(self.root, split):
            if path.is_file():
                return _Split(path, self.root if is_published(path) else self._image_folder(path, name))
        # A line with all of them would say less.
        tried = [self._relative(path) for name in names_of(split) for path in _places(self.root, name)[:2]]
        raise no_split(self.root, split, tried, sorted(map(self._relative, _documents(self.root))))

    def _image_folder(self, file: Path, name: str) -> Path:
        own, images = self.root / name, self.root / "images"
        folder = next((place for place in (own, images / name, images) if place.is_dir()), None)
        if folder is None:
            raise DataError(f"{file}: its image folder {own} is missing; put the images of {name!r} there")
        return folder

    def _is_there(self, split: str) -> bool:
        if self._undivided:
            return split == "train"
        return any(path.is_file() for _, path in _annotation_files(self.root, split))

    def _relative(self, path: Path) -> str:
        return str(path.relative_to(self.root))


def _annotation_files(root: Path, split: str) -> list[tuple[str, Path]]:
    """Where the annotations of a split may be, each with the name that the split has there.

    COCO's own come first: who has LVIS has its images in the folders of COCO.
    """
    names = names_of(split)
    return [(name, path) for name in names for path in _places(root, name)] + published_files(root, names)


def _places(root: Path, name: str) -> tuple[Path, ...]:
    """Where the annotations of a split of that name may be."""
    return (
        root / "annotations" / f"instances_{name}.json",
        root / name / "_annotations.coco.json",
        root / "annotations" / f"{name}.json",
        root / f"{name}.json",
    )


def _documents(root: Path) -> Iterator[Path]:
    """The files in a folder that look like COCO annotations."""
    yield from sorted(root.glob("annotations/*.json"))
    yield from sorted(root.glob("*/*.coco.json"))
    names = [*_UNDIVIDED, *(f"{name}.json" for split in NAMES for name in names_of(split))]
    yield from (root / name for name in names if "/" not in name and (root / name).is_file())
    yield from sorted(filter(is_published, root.glob("*.json")))


def _unused_roots(document: dict) -> Classes:
    """Categories that only name a group of others, and that no object has, as Roboflow writes one: (id, name)."""
    used = {entry["category_id"] for entry in document["annotations"]}
    groups = {
        category["supercategory"]
        for category in document["categories"]
        if isinstance(category.get("supercategory"), str) and category["supercategory"] != category["name"]
    }
    return [
        (category["id"], category["name"])
        for category in document["categories"]
        if category["name"] in groups
        and category.get("supercategory") in (None, "", "none")
        and category["id"] not in used
    ]


def _objects(document: dict, classes: Classes) -> Objects:
    entries = document["annotations"]
    label_of = {number: label for label, (number, _) in enumerate(classes)}
    position = {image["id"]: index for index, image in enumerate(document["images"])}
    return make_objects(
        [position[entry["image_id"]] for entry in entries],
        [label_of[entry["category_id"]] for entry in entries],
        [entry["bbox"] for entry in entries],
        [bool(entry.get("iscrowd")) for entry in entries],
        [np.nan if entry.get("area") is None else entry["area"] for entry in entries],
        [entry["id"] for entry in entries],
    )


def _label_studio_names(document: dict, root: Path) -> Iterator[Problem]:
    """Makes the images' ``file_name`` relative to the data set, from whatever Label Studio has put there.

    It may be a path of the machine that annotated, with the slashes of Windows, or the address of its own server.
    What is wrong: two images of one file, of which the export overwrote the other.
    """
    images = defaultdict(list)
    for image in document["images"]:
        name = image.get("file_name")
        if not isinstance(name, str) or not name:
            continue
        path = PurePosixPath(unquote(name).rpartition("?d=")[2].replace("\\", "/"))
        within = not path.is_absolute() and ".." not in path.parts
        candidates = [str(path)] if within else []
        candidates += [f"images/{path.name}", path.name]
        image["file_name"] = next((place for place in candidates if (root / place).is_file()), candidates[-2])
        images[image["file_name"]].append(image.get("id"))
    for name, numbers in images.items():
        if len(numbers) > 1:
            what = (
                f"are both {name}, since files of one name overwrote each other; export again with names of their own"
            )
            yield Problem("image file name", f"images {' and '.join(map(str, numbers[:2]))} {what}")
