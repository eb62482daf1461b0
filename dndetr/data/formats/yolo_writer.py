"""Splits as a YOLO folder: data.yaml, ``images/<split>/`` and ``labels/<split>/``, a row for each box.

Numbers are written so fine that boxes come back as they were. What the format cannot hold is told: crowd regions, and
boxes of which a share would leave [0, 1], since other programs pass over the whole image for one such row.
"""

import os
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

import numpy as np
import yaml

from ..classes import Classes, distinct_names
from ..errors import DataError
from ..image import is_image_name
from ..image_header import upright_size
from ..natural_order import natural_key
from ..records import Records, pairs

_ROW = "{} {:.15f} {:.15f} {:.15f} {:.15f}\n"


def write(folder: Path, splits: Sequence[Records], place: Callable[[Path, Path], None]) -> list[str]:
    """Writes them into an empty folder -> what became otherwise than it was, in words.

    place: puts the file at a path to another one. Images keep their order: where it is not that of their names, a list
    ``<split>.txt`` has it. DataError for images that readers would not find, or see otherwise than they are annotated.
    """
    classes = splits[0].classes
    names = distinct_names(classes)
    remarks = [
        f"class {number} {name!r} is called {own!r}, since names tell classes apart"
        for (number, name), own in zip(classes, names, strict=True)
        if name != own
    ]
    entries = {}
    for records in splits:
        _demand_readable(records)
        rows, told = _rows(records, classes)
        files, renamed = _files(records)
        entries[records.name] = f"images/{records.name}"
        if files != sorted(files, key=natural_key):
            entries[records.name] = f"{records.name}.txt"
            (folder / f"{records.name}.txt").write_text("".join(f"./{file}\n" for file in files), encoding="utf-8")
        for index, (file, text) in enumerate(zip(files, rows, strict=True)):
            place(records.path(index), folder / file)
            label = folder / _label_file(file)
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text(text)
        if records.verified is not None:
            told.append("which classes were looked for left out, since YOLO has no place for it")
        remarks += [f"{records.name}: {remark}" for remark in (*told, *renamed)]
    description = {**entries, "nc": len(names), "names": dict(enumerate(names))}
    text = yaml.safe_dump(description, allow_unicode=True, sort_keys=False, width=float("inf"))
    (folder / "data.yaml").write_text(text, encoding="utf-8")
    return remarks


def _demand_readable(records: Records) -> None:
    """DataError for the first image that a reader would pass over, or turn against its annotations."""
    for index, size in enumerate(pairs(records.sizes)):
        path = records.path(index)
        where = f"{records.file}: {records.called(index)}{path}"
        if "\\" in records.names[index] or not is_image_name(records.names[index]):
            what = "YOLO knows images by names that end in .jpg or the like, without backslashes"
            raise DataError(f"{where}: {what}; rename the file")
        if upright_size(str(path)) != size:
            raise DataError(
                f"{where}: annotated as stored, but all who read YOLO turn it by its EXIF data; write it without these"
            )


def _rows(records: Records, classes: Classes) -> tuple[list[str], list[str]]:
    """The label file of each image, and what is not in them."""
    place = {number: label for label, (number, _) in enumerate(classes)}
    objects = records.objects.where(~records.objects.crowd)
    labels = np.array([place[number] for number, _ in records.classes], np.int64)[objects.label]
    sides = records.sizes[objects.image, ::-1].astype(np.float64)
    shares = _shares(objects.boxes, sides)
    beyond = ((shares < 0) | (shares > 1)).any(axis=1)
    low = objects.boxes[:, :2].clip(0, sides)
    spans = (objects.boxes[:, :2] + objects.boxes[:, 2:]).clip(0, sides) - low
    shares[beyond] = _shares(np.concatenate((low, spans), axis=1), sides)[beyond]
    outside = beyond & (spans == 0).any(axis=1)
    kept = ~outside
    columns = (labels[kept].tolist(), *shares[kept].T.tolist())
    rows = [_ROW.format(*row) for row in zip(*columns, strict=True)]
    ends = np.bincount(objects.image[kept], minlength=len(records)).cumsum().tolist()
    told = [
        f"{number:,} {noun if number == 1 else plural} {what}"
        for number, noun, plural, what in (
            (records.objects.crowd.sum(), "crowd region", "crowd regions", "left out, since YOLO has none"),
            (outside.sum(), "box", "boxes", "outside the image left out"),
            ((beyond & kept).sum(), "box", "boxes", "clipped to the image, for the centre or a side is beyond it"),
        )
        if number
    ]
    return ["".join(rows[start:end]) for start, end in zip([0, *ends], ends, strict=False)], told


def _shares(boxes: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """Boxes [m, 4] x, y, width, height in pixels -> cx, cy, w, h in shares of the sides [m, 2] (width, height)."""
    return np.concatenate(((boxes[:, :2] + boxes[:, 2:] / 2) / sides, boxes[:, 2:] / sides), axis=1)


def _files(records: Records) -> tuple[list[str], list[str]]:
    """Where each image goes, with a name that is its own without the ending; and a remark on those that had none."""
    stems = [name.rpartition(".")[0] for name in records.names]
    first, taken, files, renamed = set(), set(stems), [], []
    for name, stem in zip(records.names, stems, strict=True):
        own = stem
        if stem in first:
            own = next(other for number in count(2) if (other := f"{stem}-{number}") not in taken)
            renamed.append(f"{name} is {own}{name[len(stem) :]}")
        first.add(stem)
        taken.add(own)
        files.append(f"images/{records.name}/{own}{name[len(stem) :]}")
    images = "1 image" if len(renamed) == 1 else f"{len(renamed):,} images"
    told = f"{images} renamed, since labels belong to names without endings; the first: "
    return files, [told + renamed[0]] if renamed else []


def _label_file(file: str) -> str:
    """The labels of an image are where all programs look: in ``labels`` for the last ``images`` of its path."""
    before, _, after = f"/{os.path.splitext(file)[0]}.txt".rpartition("/images/")
    return f"{before}/labels/{after}".lstrip("/")
