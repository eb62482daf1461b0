"""What data lies at a path: the formats that are known, asked one after the other."""

from pathlib import Path

from .division import Divided
from .errors import DataError
from .formats import coco, voc, yolo
from .records import Source

FORMATS = (coco, yolo, voc)
"""Modules with a function ``find(path) -> Source | None``; the first that finds something reads the data."""


def open_source(path: str | Path, val_share: float | None = None, split_file: str | Path | None = None) -> Source:
    """The data set in a folder, or that of a YOLO file data.yaml.

    val_share, split_file: how a set without a validation split is divided, see ``division.Divided``. DataError where
    there is none.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such folder; give the folder of a data set")
    source = next((found for kind in FORMATS if (found := kind.find(path)) is not None), None)
    if source is None:
        if path.is_file():
            raise DataError(f"{path}: is no data set; give the folder of one, or the data.yaml of a YOLO set")
        if inner := _unpacked(path):
            raise DataError(f"{path}: no annotations here; give the folder within, {inner}")
        raise DataError(
            f"{path}: no annotations here; a COCO-format folder holds annotations/instances_train.json with train/, or "
            "train/_annotations.coco.json, a YOLO folder data.yaml, a Pascal VOC folder Annotations/ with JPEGImages/ "
            "(python -m dndetr.shapes DIR writes an example)"
        )
    return source if val_share is None and split_file is None else Divided(source, val_share, split_file)


def _unpacked(path: Path) -> Path | None:
    """The data set that lies in the only folder within, as in what was an archive."""
    for _ in range(3):
        folders = [folder for folder in path.glob("[!._]*") if folder.is_dir()]
        if len(folders) != 1:
            return None
        path = folders[0]
        if any(kind.find(path) for kind in FORMATS):
            return path
    return None
