"""YOLO data sets: data.yaml, folders or lists of images, and a text file of labels for each image.

Also the flat exports of Label Studio (``classes.txt`` with ``images/`` and ``labels/``) and CVAT's "YOLO 1.1"
(``obj.data``, ``obj.names``), which have no data.yaml.
"""

import os
from pathlib import Path

import numpy as np

from ..errors import DataError
from ..records import Problem, Records, make_objects
from ..split_names import NAMES, names_of, no_split, way_without
from .labels_cache import Known
from .yolo_files import Images, find_images
from .yolo_labels import rows_of, text_of
from .yolo_yaml import Description, Entry, looks_like_one, read_description

_FILES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")


def find(path: Path) -> "YoloSource | None":
    """The YOLO data set in a folder or described by a YAML file, if there is one."""
    if path.is_file():
        return YoloSource(path, read_description(path)) if path.suffix in (".yaml", ".yml") else None
    for file in (path / name for name in _FILES):
        if file.is_file():
            return YoloSource(path, read_description(file))
    others = [file for file in sorted(path.glob("*.y*ml")) if file.is_file() and looks_like_one(file)]
    if len(others) > 1:
        raise DataError(f"{path}: {others[0].name} and {others[1].name} both describe YOLO data; give the path of one")
    if others:
        return YoloSource(path, read_description(others[0]))
    description = _label_studio(path) or _cvat(path)
    return None if description is None else YoloSource(path, description)


class YoloSource:
    """A data set that a description names."""

    def __init__(self, given: Path, description: Description):
        self.root, self._description = given, description
        self._start, said = _start(description)
        self.splits = tuple(split for split in NAMES if split in description.splits)
        self.about = f"YOLO, {description.file.name}{said}"

    def read(self, split: str) -> Records:
        """train, val or test."""
        file = self._description.file
        if split not in self.splits:
            raise no_split(file, split, names_of(split), self.splits)
        images = find_images(self._description, split, self._start)
        if not images.files and not images.problems:
            entry = self._description.splits[split][0]
            way = way_without(split, "take the line out")
            raise DataError(f"{file}:{entry.line}: {split} has no images in {entry.path!r}; put them there{way}")
        names = _relative(images.files, self._start)
        known, problems = rows_of(images, names, f"{file.resolve()}\n{split}", self._description.keypoints)
        strange = self._strange_classes(images, known)
        objects = make_objects(np.repeat(np.arange(len(names)), known.counts), known.classes, known.boxes)
        return Records(
            name=split,
            root=self.root,
            file=file,
            folder=self._start,
            classes=list(enumerate(self._description.names)),
            names=names,
            ids=np.arange(1, len(names) + 1),
            sizes=known.sizes.astype(np.int64),
            objects=objects.where(objects.label < len(self._description.names)),
            remarks=images.remarks,
            problems=[*images.problems, *problems, *strange, *_no_labels(images, split)],
        )

    def _strange_classes(self, images: Images, known: Known) -> list[Problem]:
        """The rows of classes that have no name."""
        last, problems = len(self._description.names) - 1, []
        ends = known.counts.cumsum()
        strange = np.flatnonzero(known.classes > last)
        place = np.searchsorted(ends, strange, side="right")
        for image in np.unique(place).tolist():
            label = images.labels[image]
            lines = [line for line, text in enumerate(text_of(label).split("\n"), start=1) if text.strip()]
            first = int(ends[image] - known.counts[image])
            for row in strange[place == image].tolist():
                what = f"has class {known.classes[row]}, but the last one of {self._description.file.name} is {last}"
                what += f" ({self._description.names[last]!r}); add a name there or correct the row"
                problems.append(Problem("class", what, f"{label}:{lines[row - first]}"))
        return problems


def _no_labels(images: Images, split: str) -> list[Problem]:
    """A problem where not one image has a file of labels, though any may lack one: it has no objects then."""
    if not images.files or any(map(os.path.exists, images.labels)):
        return []
    folders = list(dict.fromkeys(map(os.path.dirname, images.labels)))
    others = f" and {len(folders) - 1} more folders" if len(folders) > 1 else ""
    what = f"0 of {len(images.files):,} images of {split} have labels, looked in {folders[0]}{others}"
    return [Problem("labels", f"{what}; put a .txt file there for each image with objects")]


def _start(description: Description) -> tuple[Path, str]:
    """The folder that paths start from, and what is to be said of it."""
    folder = description.file.parent
    if description.path is None:
        return folder, ""
    place = folder / description.path.path.replace("\\", "/")
    if place.is_dir():
        return Path(os.path.normpath(place)), ""
    return folder, f" (its path {description.path.path!r} is not there, so all paths start from the file's folder)"


def _relative(files: list[str], folder: Path) -> list[str]:
    """Paths within a folder; in full where a file lies elsewhere."""
    if folder == Path():
        return files
    before = f"{folder}{os.sep}"
    return [file[len(before) :] if file.startswith(before) else os.path.abspath(file) for file in files]


def _label_studio(folder: Path) -> Description | None:
    """Names in classes.txt, and all images in one folder."""
    file = folder / "classes.txt"
    if not file.is_file() or not all((folder / name).is_dir() for name in ("images", "labels")):
        return None
    return Description(file, None, _names(file), {"train": [Entry("images", 1)]}, None)


def _cvat(folder: Path) -> Description | None:
    """Keys and values in obj.data, names in obj.names, lists of images beside their labels."""
    file, names = folder / "obj.data", folder / "obj.names"
    if not file.is_file() or not names.is_file():
        return None
    splits = {}
    for line, row in enumerate(text_of(str(file)).split("\n"), start=1):
        key, _, value = (part.strip() for part in row.partition("="))
        if key in ("train", "valid") and value:
            splits["val" if key == "valid" else key] = [Entry(value.removeprefix("data/"), line)]
    return Description(file, None, _names(names), splits or {"train": [Entry("train.txt", 1)]}, None)


def _names(file: Path) -> list[str]:
    names = [line.strip() for line in text_of(str(file)).split("\n") if line.strip()]
    if not names:
        raise DataError(f"{file}: is empty; write the names of the classes, one a line")
    return names
