"""Where the images of a YOLO split are, in folders or lists, and the files of their labels."""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ..errors import DataError
from ..folders import walk
from ..image import is_image_name
from ..limits import is_plain
from ..natural_order import natural_key
from ..records import Problem
from ..split_names import way_without
from .yolo_yaml import Description, Entry


class Images(NamedTuple):
    """The images of a split: their files and, in the same order, those of their labels; what is odd about these, in
    words, and what is wrong with lists and names."""

    files: list[str]
    labels: list[str]
    remarks: list[str]
    problems: list[Problem]


def find_images(description: Description, split: str, start: Path) -> Images:
    """The images of a split, those of folders in natural order; start: the folder that paths start from.

    DataError for a folder or list that is not there.
    """
    files: dict[str, None] = {}
    problems = []
    for entry in description.splits[split]:
        path = _find(description, split, entry, start)
        if path.is_dir():
            below = (f"{place}{os.sep}{name}" for place, names in walk(path) for name in names if is_image_name(name))
            files.update(dict.fromkeys(sorted(below, key=natural_key)))
        elif is_image_name(path.name):
            files[str(path)] = None
        else:
            problems += _read_list(path, start, files)
    # The folder of the data set itself may be called what it likes.
    for file in [file for file in files if not is_plain(file.removeprefix(str(start)))]:
        del files[file]
        problems.append(Problem("image file name", f"{file!r} has control characters; rename the file"))
    label_folder, labels = cache(_label_folder), []
    for file in files:
        folder, _, base = file.rpartition(os.sep)
        labels.append(f"{label_folder(folder)}{os.sep}{base.rpartition('.')[0]}.txt")
    remarks, misnamed = _about(labels)
    return Images(list(files), labels, remarks, problems + misnamed)


def _about(labels: list[str]) -> tuple[list[str], list[Problem]]:
    """What is odd about files of labels, and what is wrong with their names."""
    used, unused, problems = set(labels), 0, []
    for folder in sorted({label.rpartition(os.sep)[0] for label in used}):
        for name in os.listdir(folder) if os.path.isdir(folder) else ():
            label = f"{folder}{os.sep}{name}"
            if label in used or name == "classes.txt" or not name.lower().endswith(".txt"):
                continue
            if f"{label[:-4]}.txt" in used:
                problems.append(Problem("labels", "labels are read from files in .txt; rename it", label))
            unused += name.endswith(".txt")
    remarks = []
    if shared := len(labels) - len(used):
        whose = "image has" if shared == 1 else "images have"
        remarks.append(f"{shared:,} {whose} the labels of another one, since only their endings differ")
    if unused:
        remarks.append(f"{unused:,} label {'file' if unused == 1 else 'files'} left out, of images that are not read")
    return remarks, problems


def _find(description: Description, split: str, entry: Entry, start: Path) -> Path:
    """Where the images of a split, or the list of them, are."""
    text = entry.path.replace("\\", "/")
    within = text
    while within.startswith(("../", "./")):  # Roboflow writes ../train/images of what lies beside the file
        within = within.partition("/")[2].lstrip("/")
    bases = dict.fromkeys((start, description.file.parent))
    places = dict.fromkeys(Path(os.path.normpath(base / path)) for path in (text, within) for base in bases)
    for place in places:
        if os.path.isdir(place) or os.path.isfile(place):
            return place
    tried = " or ".join(map(str, places))
    where = f"{description.file}:{entry.line}"
    way = way_without(split, "take the line out")
    raise DataError(f"{where}: {split} is {entry.path!r}, and there is no {tried}; correct it, or path{way}")


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
            yield Problem("missing file", f"{row!r} is missing; put it there, or remove the row", where)
        elif not is_image_name(file):
            yield Problem("image file name", f"{row!r} is no image, by its name; list images", where)
        elif file in seen:
            yield Problem("image twice", f"{row!r} is there twice; leave one of them", where)
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
    if found is None and any(name.endswith(".txt") for name in os.listdir(folder or os.curdir)):
        return folder or os.curdir
    return os.path.relpath(found or places[0]) if not os.path.isabs(folder) else str(found or places[0])
