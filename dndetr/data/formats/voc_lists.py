"""The text files of a Pascal VOC folder: which images a split has, and which classes there are."""

import re
from pathlib import Path

from ..errors import DataError
from ..limits import is_plain
from ..split_names import NAMES, names_of

_CLASS_FILES = ("labelmap.txt", "classes.txt", "labels.txt", "predefined_classes.txt")
_WHOLE = ("trainval", "default")  # lists of all images that are not for testing; the latter is CVAT's
_COMMON = {*_WHOLE, *(name for names in NAMES.values() for name in names)}


def find_lists(home: Path) -> dict[str, Path]:
    """The lists of images of a folder by their names, without those of a single class ("dog_train")."""
    for folder in (home / "ImageSets" / "Main", home / "ImageSets"):
        if files := {path.stem: path for path in sorted(folder.glob("*.txt"))}:
            return {name: path for name, path in files.items() if not _is_of_a_class(name)}
    return {}


def lists_of_splits(lists: dict[str, Path]) -> dict[str, Path]:
    """The list of each split that has one; of a set that nobody has divided, the list of all is that of train."""
    found = {split: lists[name] for split in NAMES for name in reversed(names_of(split)) if name in lists}
    whole = next((lists[name] for name in _WHOLE if name in lists), None)
    return found if whole is None or {"train", "val"} & found.keys() else {"train": whole, **found}


def _is_of_a_class(name: str) -> bool:
    first, _, last = name.rpartition("_")
    return bool(first) and last in _COMMON


def read_rows(file: Path) -> list[tuple[int, str]]:
    """The rows of a text file that are not empty, each with the number of its line."""
    if not file.is_file():  # to open a pipe would wait for its other end
        raise DataError(f"{file}: is no file; put the list there")
    content = file.read_bytes()
    try:
        rows = re.split(r"\r\n?|\n", content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}:{line}: is not UTF-8 text; save the list in UTF-8") from error
    return [(line, row.strip()) for line, row in enumerate(rows, 1) if row.strip()]


def find_class_file(home: Path) -> Path | None:
    """The list of classes of a folder, if it has one."""
    return next((home / name for name in _CLASS_FILES if (home / name).exists()), None)


def read_classes(file: Path) -> list[str]:
    """The names of the classes in a list, in its order."""
    rows = read_rows(file)
    if file.name == "labelmap.txt":  # CVAT's: "name:colour:parts:actions"
        rows = [(line, row.partition(":")[0].strip()) for line, row in rows if not row.startswith("#")]
        rows = [(line, name) for line, name in rows if name != "background"]
    if not rows:
        raise DataError(f"{file}: the list of classes is empty; write one name a line, or remove the file")
    first: dict[str, int] = {}
    for line, name in rows:
        if name in first:
            raise DataError(f"{file}:{line}: class {name!r} is there already, in line {first[name]}; take one out")
        if not name or not is_plain(name):
            raise DataError(f"{file}:{line}: class {name!r} is no name to be shown; give it letters")
        first[name] = line
    return list(first)
