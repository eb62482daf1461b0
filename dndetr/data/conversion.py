"""A data set written anew in another format: checked as before training, and nothing is lost without a word."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Literal

from ..demands import demand
from ..files import Unwritten, demand_new_folder, new_folder
from .errors import DataError
from .formats import coco_writer, yolo_writer
from .records import Records, Source, class_problems, raise_problems
from .review.image_files import file_problems, told
from .split_names import NAMES

Format = Literal["coco", "yolo"]
Placing = Literal["copy", "link", "hardlink"]

_WRITERS = {"coco": coco_writer.write, "yolo": yolo_writer.write}
# Folders that only say where the images of a split are.
_PLACES = {"images", *(name for names in NAMES.values() for name in names)}


def convert(
    source: Source, folder: Path, format: Format, splits: Sequence[str] = (), images: Placing = "copy"
) -> list[str]:
    """Write the splits of a data set, by default all, into a new folder -> what is there now, in lines.

    images: what becomes of their files. DataError for what would stop training, FileExistsError for a folder with
    something in it; nothing is written then.
    """
    demand_new_folder(folder)
    for split in splits:
        known = split in NAMES or (format == "coco" and os.path.basename(split) == split)
        demand(known, "splits", split, ", ".join(NAMES) if format == "yolo" else "names of splits")
    found = []
    for records in map(source.read, splits or source.splits):
        raise_problems(records.problems, records)
        raise_problems([*class_problems(records.classes, (found or [records])[0].classes)], records)
        _demand_outside(folder, source, records)
        raise_problems(told(file_problems(records)), records)
        found.append(records)
    lines = []
    for records in found:
        about = f"{len(records):,} images, {len(records.objects.image):,} objects of {len(records.classes)} classes"
        lines += [f"{records.name}: {about}", *(f"{records.name}: {remark}" for remark in records.remarks)]
    with new_folder(folder) as unfinished:
        return lines + _WRITERS[format](unfinished, [_shortened(records) for records in found], partial(_place, images))


def _demand_outside(folder: Path, source: Source, records: Records) -> None:
    """DataError where the folder to write is inside the data set, of which nothing is changed."""
    target = Path(os.path.realpath(folder))
    for place in (source.root, records.folder):
        if place.is_dir() and target.is_relative_to(os.path.realpath(place)):
            raise DataError(f"{folder} is inside the data set {place}, which is only read; give a folder elsewhere")


def _shortened(records: Records) -> Records:
    """The same with names of images without the folders in which all of them are and that only say where a split is.

    The folder is then the one that is left, and that of all images where some lie outside of the data set.
    """
    names = [os.path.normpath(name) for name in records.names]
    folder = records.folder
    if any(map(os.path.isabs, names)):
        files = [os.path.abspath(folder / name) for name in names]
        folder = Path(os.path.commonpath(map(os.path.dirname, files)))
        names = [os.path.relpath(file, folder) for file in files]
    shared = Path(os.path.commonpath(map(os.path.dirname, names))).parts
    inner = Path(*takewhile(_PLACES.__contains__, shared))
    return replace(records, folder=folder / inner, names=[os.path.relpath(name, inner) for name in names])


def _place(how: Placing, file: Path, target: Path) -> None:
    """Put an image there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if how == "copy":
        shutil.copyfile(file, target)
        return
    try:
        (os.symlink if how == "link" else os.link)(os.path.realpath(file), target)
    except OSError as error:
        raise Unwritten(
            f"--images {how}: no link to {file} can be made ({error.strerror}); give --images copy"
        ) from error
