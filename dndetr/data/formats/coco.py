"""COCO-format folders: where their splits are, and what their documents become.

Layouts: ``annotations/instances_<split>.json`` with ``<split>/``, ``images/<split>/`` or ``images/``;
``<split>/_annotations.coco.json`` beside its images, as Roboflow writes it; ``instances_default.json``, as CVAT
writes it, and ``result.json``, as Label Studio does, of sets that nobody has divided; LVIS and Objects365 as published.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np

from ..classes import listed
from ..errors import DataError
from ..index import SMALLEST, Read, indexed
from ..records import Problem, Records, by_image, make_objects
from ..split_names import NAMES, names_of, no_split
from .coco_blocks import Document
from .coco_document import Gathered
from .published_sets import PublishedNames, is_published, published_files

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
        sizes, objects = np.empty((0, 2), np.int64), make_objects([], [], [])
        empty = Records(split, self.root, file, folder, [], [], np.empty(0, np.int64), sizes, objects, numbered=True)
        if self._undivided == "result.json":
            # Which files it means depends on what lies there, so that no index could tell.
            names = _LabelStudioNames(self.root)
            records = _filled(empty, Gathered(Document(file), rename=names), names.problems)
            return replace(records, objects=by_image(records.objects))
        inner = (split, f"images/{split}", "images", "") if is_published(file) else ("",)

        def read(spools: Path | None) -> Read:
            names = PublishedNames(folder, inner)
            records = _filled(empty, Gathered(Document(file), spools, locate=names))
            return Read(records, names.layout() if names.used else None)

        if file.stat().st_size >= SMALLEST:
            return indexed(empty, read, lambda: PublishedNames(folder, inner).layout())
        records = read(None).records
        return replace(records, objects=by_image(records.objects))

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


def _filled(records: Records, gathered: Gathered, others: Callable[[], Iterable[Problem]] = tuple) -> Records:
    """A split with what its document has, objects as they are in it; others: problems that go before the document's."""
    problems = [*others(), *gathered.problems]
    images = {"names": gathered.names, "ids": gathered.ids, "sizes": gathered.sizes}
    if problems:
        return replace(records, **images, problems=problems)
    objects, categories = gathered.objects, gathered.categories
    used = np.zeros(len(categories), bool)
    used[objects.label] = True
    roots = _unused_roots(categories, used.tolist())
    order = sorted(set(range(len(categories))) - set(roots), key=lambda place: categories[place]["id"])
    remarks = []
    if roots:
        names = listed([categories[place]["name"] for place in roots])
        remarks.append(f"category {names} left out: it names the others and has no objects")
    label = np.zeros(len(categories), np.int64)
    label[order] = np.arange(len(order))
    return replace(
        records,
        **images,
        classes=[(categories[place]["id"], categories[place]["name"]) for place in order],
        objects=objects._replace(label=label[objects.label]),
        verified=gathered.stated.verified({categories[place]["id"]: label for label, place in enumerate(order)}),
        remarks=remarks,
    )


def _unused_roots(categories: list[dict], used: list[bool]) -> list[int]:
    """Places of the categories that only name a group of others, and that no object has, as Roboflow writes one."""
    groups = {
        category["supercategory"]
        for category in categories
        if isinstance(category.get("supercategory"), str) and category["supercategory"] != category["name"]
    }
    return [
        place
        for place, category in enumerate(categories)
        if category["name"] in groups and category.get("supercategory") in (None, "", "none") and not used[place]
    ]


class _LabelStudioNames:
    """Makes the images' ``file_name`` relative to the data set, from whatever Label Studio has put there.

    It may be a path of the machine that annotated, with the slashes of Windows, or the address of its own server.
    """

    def __init__(self, root: Path):
        self._root = root
        self._images: dict[str, list] = defaultdict(list)

    def __call__(self, images: list[dict]) -> None:
        """Changes some images."""
        for image in images:
            name = image.get("file_name")
            if not isinstance(name, str) or not name:
                continue
            path = PurePosixPath(unquote(name).rpartition("?d=")[2].replace("\\", "/"))
            within = not path.is_absolute() and ".." not in path.parts
            candidates = [str(path)] if within else []
            candidates += [f"images/{path.name}", path.name]
            found = next((place for place in candidates if (self._root / place).is_file()), candidates[-2])
            image["file_name"] = found
            self._images[found].append(image.get("id"))

    def problems(self) -> Iterator[Problem]:
        """What is wrong: two images of one file, of which the export overwrote the other."""
        for name, numbers in self._images.items():
            if len(numbers) > 1:
                what = f"are both {name}, since files of one name overwrote each other"
                advice = "export again with names of their own"
                yield Problem("image file name", f"images {' and '.join(map(str, numbers[:2]))} {what}; {advice}")
