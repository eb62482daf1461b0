"""Splits as a COCO-format folder: ids, areas, crowd regions and the order of images as they are."""

from collections.abc import Callable, Sequence
from pathlib import Path

from ...files import write_json_atomic
from ..records import Records


def write(folder: Path, splits: Sequence[Records], place: Callable[[Path, Path], None]) -> list[str]:
    """``annotations/instances_<split>.json`` and ``<split>/`` -> remarks, of which there are none.

    place: puts the file at a path to another one.
    """
    (folder / "annotations").mkdir()
    for records in splits:
        files = {name: records.path(index) for index, name in enumerate(records.names)}
        for name, file in files.items():
            place(file, folder / records.name / name)
        write_json_atomic(folder / "annotations" / f"instances_{records.name}.json", records.coco_dict())
    return []
