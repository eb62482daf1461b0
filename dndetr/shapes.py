"""``python -m dndetr.shapes DIR``: writes the built-in synthetic data as a COCO-format folder."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image

from .commandline import program
from .data.errors import DataError
from .data.shapes import MIN_SIZE, ShapesDataset, render
from .files import demand_new_folder, new_folder


@dataclass(frozen=True)
class Arguments:
    """One folder of built-in data."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """New folder to write."""
    train: int = 2000
    """Number of training images."""
    val: int = 200
    """Number of validation images."""
    size: int = MIN_SIZE
    """Side of the images in pixels."""
    seed: int = 0
    """Another seed, other images."""


def write_shapes(folder: Path, train: int = 2000, val: int = 200, size: int = MIN_SIZE, seed: int = 0) -> None:
    """Writes ``train/``, ``val/`` (PNG) and ``annotations/instances_<split>.json``, all at once or nothing."""
    demand_new_folder(folder)
    for flag, length in (("--train", train), ("--val", val)):
        if length < 1:
            raise DataError(f"{flag} {length}: at least one image is needed")
    datasets = [ShapesDataset("train", train, size, seed), ShapesDataset("val", val, size, seed)]
    with new_folder(folder) as unfinished:
        (unfinished / "annotations").mkdir()
        for dataset in datasets:
            _write_split(dataset, unfinished)


def _write_split(dataset: ShapesDataset, folder: Path) -> None:
    document = dataset.coco_dict()
    (folder / dataset.split).mkdir()
    for index, image in enumerate(document["images"]):
        pixels, _, _ = render(dataset.split, index, dataset.size, dataset.seed)
        Image.fromarray(pixels.transpose(1, 2, 0).copy()).save(folder / dataset.split / image["file_name"])
    path = folder / "annotations" / f"instances_{dataset.split}.json"
    path.write_text(json.dumps(document), encoding="utf-8")


def run(arguments: Arguments) -> None:
    """Write the folder that the arguments describe."""
    write_shapes(arguments.folder, arguments.train, arguments.val, arguments.size, arguments.seed)
    print(f"{arguments.train} training and {arguments.val} validation images in {arguments.folder}")


main = program(Arguments, run, "shapes", __doc__)


if __name__ == "__main__":
    sys.exit(main())
