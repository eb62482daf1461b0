"""Where the images of a YOLO split are, in folders or lists, and the files of their labels."""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ..errors import DataError
from ..image import is_image_name
from ..natural_order import natural_key
from ..records import Problem
from .yolo_yaml import Description, Entry


class Images(NamedTuple):
    """The images of a split: their files and, in the same order, those of their labels; what is wrong with lists."""

    files: list[str]
    labels: list[str]
    problems: list[Problem]

    def remarks(self) -> list[str]:
        """What is odd about the labels' files."""
        remarks = []
        if shared := len(self.labels) - len(set(self.labels)):
            whose = "image has" if shared == 1 else "images have"
            remarks.append(f"{shared:,} {whose} the labels of another one, since only their endings differ")
        used = set(self.labels)
        folders = {os.path.dirname(label) for label in used}
        present = (
            f"{folder}{os.sep}{name}"
            for folder in sorted(folders)
            if os.path.isdir(folder)
            for name in os.listdir(folder)
            if name.endswith(".txt") and name != "classes.txt"
        )
        if unused := sum(label not in used for label in present):
            remarks.append(f"{unused:,} label {'file' if unused == 1 else 'files'} without an image left out")
        return remarks


def find_images(description: Description, split: str, start: Path) -> Images:
    """The images of a split, those of folders in natural order; start: the folder that paths start from.

    DataError for a folder or list that is not there.
    """
    files: dict[str, None] = {}
    problems = []
    for entry in description.splits[split]:
        path = _find(description, split, entry, start)
        if path.is_dir():
            files.update(dict.fromkeys(sorted(_images_below(path), key=natural_key)))
        elif is_image_name(path.name):
            files[str(path)] = None
        else:
            problems += _read_list(path, start, files)
    label_folder, labels = cache(_label_folder), []
    for file in files:
        folder, base = os.path.split(file)
        labels.append(f"{label_folder(folder)}{os.sep}{base.rpartition('.')[0]}.txt")
    return Images(list(files), labels, problems)


def _find(description: Description, split: str, entry: Entry, start: Path) -> Path:
    """Where the images of a split, or the list of them, are."""
    text = entry.path.replace("\\", "/")
    within = text
    while within.startswith(("../", "./")):  # Roboflow writes ../train/images of what lies beside the file
        within = within.partition("/")[2].lstrip("/")
    bases = dict.fromkeys((start, description.file.parent))
    places = dict.fromkeys(Path(os.path.normpath(base / path)) for path in (text, within) for base in bases)
    for place in places:
        if place.is_dir() or place.is_file():
            return place
    tried = " or ".join(map(str, places))
    where = f"{description.file}:{entry.line}"
    raise DataError(f"{where}: {split} is {entry.path!r}, and there is no {tried}; correct it, or path")


def _images_below(folder: Path) -> Iterator[str]:
    """The images in a folder and in those inside it; links are followed, but not in circles."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (os.path.join(place, name) for name in names if is_image_name(name))


def _read_list(path: Path, start: Path, files: dict[str, None]) -> Iterator[Problem]:
    """Adds the images that a list names to ``files``, in its order -> what is wrong with its rows."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is no text; give a folder of images, or a list of them") from error
    bases = list(dict.fromkeys((str(start), str(path.parent))))
    seen = set()
    for line, row in enumerate(text.split("\n"), start=1):
        row = row.strip().replace("\\", "/")
        if not row:
            continue
        # CVAT begins paths with a folder "data" that it does not write.
        forms = (row, row.removeprefix("data/")) if row.startswith("data/") else (row,)
        places = (os.path.normpath(os.path.join(base, form)) for form in forms for base in bases)
        file = next(filter(_is_file, places), None)
        where = f"{path}:{line}"
        if file is None:
            yield Problem("missing file", f"{row} is missing; put it there, or remove the row", where)
        elif not is_image_name(file):
            yield Problem("image file name", f"{row} is no image, by its name; list images", where)
        elif file in seen:
            yield Problem("image twice", f"{row} is there twice; leave one of them", where)
        else:
            seen.add(file)
            files[file] = None


def _is_file(path: str) -> bool:
    return "\0" not in path and os.path.isfile(path)


def _label_folder(folder: str) -> str:
    """Where the labels of the images in a folder are: ``labels`` for ``images`` in its path, beside it, or in it."""
    parts = Path(folder).absolute().parts
    swapped = [
        Path(*parts[:at], "labels", *parts[at + 1 :]) for at in reversed(range(len(parts))) if parts[at] == "images"
    ]
    places = [*swapped, Path(folder).absolute().parent / "labels"]
    found = next((place for place in places if place.is_dir()), None)
    if found is None and any(name.endswith(".txt") for name in os.listdir(folder)):
        return folder
    return os.path.relpath(found or places[0]) if not os.path.isabs(folder) else str(found or places[0])
