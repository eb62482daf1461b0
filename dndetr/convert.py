"""``python -m dndetr.convert SRC DST --format coco|yolo``: a data set written anew, whatever format it is in."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from .commandline import program
from .data.conversion import Format, Placing, convert
from .data.source import open_source
from .files import demand_new_folder


@dataclass(frozen=True)
class Arguments:
    """One conversion; the data set itself is only read."""

    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Folder in COCO, YOLO or VOC format."""
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """New folder to write."""
    format: Format
    """Format to write."""
    splits: tuple[str, ...] = ()
    """Splits to write (default: all of train, val and test that there are)."""
    val_share: float | None = None
    """For data without a validation split: as of the train command."""
    split_file: Path | None = None
    """As of the train command."""
    images: Placing = "copy"
    """What becomes of image files: copied, or linked to where they are (hardlink: on the same disk)."""


def run(arguments: Arguments) -> None:
    """Convert as the arguments say, and say what is there now."""
    demand_new_folder(arguments.folder)
    source = open_source(arguments.data, arguments.val_share, arguments.split_file)
    print(f"{arguments.data}: {source.about}")
    lines = convert(source, arguments.folder, arguments.format, arguments.splits, arguments.images)
    print("\n".join([*lines, f"written as {arguments.format.upper()} to {arguments.folder}"]))


main = program(Arguments, run, "convert", __doc__)


if __name__ == "__main__":
    sys.exit(main())
