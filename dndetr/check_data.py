"""``python -m dndetr.check_data DIR``: everything that is wrong with a data set, and what is in it."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import rich.console
import rich.markup
import rich.progress
import tyro

from .commandline import program
from .config import Config
from .data.batch_shapes import choose_shapes
from .data.errors import DataError
from .data.folder_dataset import FolderDataset
from .data.review.findings import ERROR, NOTE, WARNING, counted
from .data.review.report import Report, Review, obstacle, review_source
from .data.source import open_source
from .data.training import training_transform
from .demands import demand
from .files import demand_file, write_json_atomic
from .pictures.data_sheet import draw_data
from .presets import preset_named
from .runs.console import Console


@dataclass(frozen=True)
class Arguments:
    """One check: every image is decoded, every problem listed, the objects of each class counted."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder in COCO, YOLO or VOC format."""
    val_share: float | None = None
    """For data without a validation split: as of the train command."""
    split_file: Path | None = None
    """As of the train command."""
    splits: tuple[str, ...] = ()
    """Splits to check (default: train, val, and test where there is one)."""
    output: Path | None = None
    """PNG to write, with samples and their boxes drawn."""
    json: Path | None = None
    """JSON file to write, with all findings and every image and object that they are about."""
    preset: str = "dn-detr-r50"
    """Preset for which boxes are tiny and images crowded, and the shapes of batches are told."""
    canvas: Annotated[tuple[int, int] | None, tyro.conf.arg(name="images.canvas")] = None
    """Height and width that images are resized to, for presets with one canvas, as of the train command."""
    batch_size: tuple[int, ...] = (2, 16)
    """Sizes of batches to tell them for."""


@contextmanager
def _progress(text: str, files: int) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal, if there is one."""
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(rich.markup.escape(text), total=files)
        yield lambda done: bar.advance(task, done)


def print_contents(reports: Sequence[Report]) -> None:
    """Sizes and remarks of each split, then the table of classes."""
    for report in reports:
        records, classes = report.records, report.records.classes
        objects = f", {sum(report.counts):,} objects of {len(classes)} classes" if classes else ""
        print(f"{records.name}: {counted(len(records), 'image')}{objects} ({records.file})")
        for remark in report.remarks:
            print(f"  {remark}")
    known = [report for report in reports if report.records.classes]
    if known:
        classes = known[0].records.classes
        table = {}
        for report in known:
            found = dict(zip((number for number, _ in report.records.classes), report.counts, strict=True))
            table[report.records.name] = [found.get(number, 0) for number, _ in classes]
        Console().classes(classes, table)


def batch_lines(dataset: FolderDataset, config: Config, batch_sizes: Sequence[int]) -> list[str]:
    """For each size of a batch one line: the shapes that training on a GPU would choose, and how far they carry."""
    transform = training_transform(config)
    if transform.canvas is not None:
        height, width = transform.canvas
        return [f"batches of {config.preset}: one canvas of {height}x{width}"]
    lines, seen = [], dataset.with_transform(transform, config.seed)
    for size in batch_sizes:
        if size > len(seen):
            lines.append(f"batches of {size}: more than the {len(seen):,} training images")
            continue
        steps = config.epochs * (len(seen) // size)
        shapes = choose_shapes(seen, replace(config, batch_size=size), steps)
        lines.append(f"batches of {size} ({config.preset}): {shapes}")
    return lines


def run(arguments: Arguments) -> None:
    """Check the folder and print what was found; DataError, with the number of problems, if anything is wrong."""
    folder, output = arguments.folder, arguments.output
    config = _config(arguments)
    for size in arguments.batch_size:
        demand(size >= 1, "batch-size", size, "1 or more")
    for file, flag in ((output, "--output"), (arguments.json, "--json")):
        if file is not None:
            demand_file(file, f"give another {flag}")
    try:
        source = open_source(folder, arguments.val_share, arguments.split_file)
    except DataError as error:
        review = Review([], [obstacle(error, "train")])
    else:
        print(f"{folder}: {source.about}")
        review = review_source(source, config, _progress, arguments.splits)
    print_contents(review.reports)
    for finding in review.findings:
        print(finding.line())
    for report in review.reports:
        if report.records.name == "train" and report.dataset is not None and any(report.dataset.counts):
            print("\n".join(batch_lines(report.dataset, config, arguments.batch_size)))
    if output is not None:
        datasets = [report.dataset for report in review.reports if report.dataset is not None]
        drawn = draw_data(output, datasets, review.findings, str(folder))
        print(f"{drawn} images drawn in {output}" if drawn else f"{output} not written: no split can be drawn")
    if arguments.json is not None:
        write_json_atomic(arguments.json, review.as_json(), indent=1)
        print(f"all findings written to {arguments.json}")
    _conclude(folder, review)


def _config(arguments: Arguments) -> Config:
    """The run that is checked for."""
    # By its whole path, since "shapes" alone would be the built-in data.
    config = replace(preset_named(arguments.preset), data=str(arguments.folder.absolute()))
    if arguments.canvas is None:
        return config
    height, width = arguments.canvas
    fixed = config.images.recipe == "fixed"
    demand(fixed, "images.canvas", f"{height} {width}", f"none with --preset {config.preset}, which has no one canvas")
    return replace(config, images=replace(config.images, canvas=arguments.canvas))


def _conclude(folder: Path, review: Review) -> None:
    """Say how much was found and whether training would go on; DataError if there are problems."""
    mild = [counted(len(review.of(severity)), severity) for severity in (WARNING, NOTE) if review.of(severity)]
    print("; ".join([review.verdict(), *([", ".join(mild)] if mild else [])]))
    kinds = Counter(finding.kind for finding in review.of(ERROR))
    if kinds:
        listed = ", ".join(f"{kind} {count:,}" for kind, count in kinds.items())
        raise DataError(f"{folder}: {counted(kinds.total(), 'problem')} ({listed})")
    print("no problems")


main = program(Arguments, run, "check_data", __doc__)


if __name__ == "__main__":
    sys.exit(main())
