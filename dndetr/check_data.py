"""``python -m dndetr.check_data DIR``: everything that is wrong with a data set, and what is in it."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import rich.console
import rich.markup
import rich.progress
import tyro

from .commandline import program
from .config import Config
from .data.batch_shapes import choose_shapes
from .data.checks import MISSING, file_problems, told, turn_remarks
from .data.classes import Classes, distinct_names
from .data.errors import DataError
from .data.folder_dataset import FolderDataset
from .data.records import NOTHING_TO_LEARN, Problem, Records, Source, class_problems
from .data.source import open_source
from .data.training import training_transform
from .data.transforms import Unresized
from .demands import demand
from .files import demand_file
from .pictures.samples import draw_samples
from .presets import preset_named
from .runs.console import Console

_SAMPLES = 12  # images on the contact sheet


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
    preset: str = "dn-detr-r50"
    """Preset whose image sizes and denoising the shapes of batches are told for."""
    batch_size: tuple[int, ...] = (2, 16)
    """Sizes of batches to tell them for."""


class Report(NamedTuple):
    """One split: what is in it, what is wrong, and the data set as far as it can be used."""

    records: Records
    counts: list[int]
    problems: list[Problem]
    remarks: list[str]
    dataset: FolderDataset | None


def check_split(records: Records, training: Classes | None = None) -> Report:
    """Everything wrong with a split, each image decoded; training: the classes of the training split."""
    problems = list(records.problems)
    if training is not None:
        problems += class_problems(records.classes, training)
    with _progress(f"decoding {records.folder}", len(records)) as advance:
        files = file_problems(records, decode=True, progress=advance, turns=(turns := Counter()))
    dataset, remarks = None, [*records.remarks, *turn_remarks(turns)]
    if not problems and len(files) < len(records) and not any(problem.kind == MISSING for problem in files):
        dataset = FolderDataset(records, Unresized(), training or records.classes, cache_bytes=0)
        remarks = [*dataset.remarks, *turn_remarks(turns)]
        dataset.leave_out(problem.index for problem in files)
        if training is None and records.name == "train" and not any(dataset.counts):
            problems.append(Problem("objects", NOTHING_TO_LEARN))
    problems += told(files)
    single = records.objects.label[~records.objects.crowd]
    counts = np.bincount(single, minlength=len(records.classes)).tolist()
    return Report(records, counts, problems, remarks, dataset)


def check_source(source: Source, splits: Sequence[str] = ()) -> tuple[list[Report], list[str]]:
    """Reports on the splits, by default train, val, and test where there is one; and what keeps one from being read."""
    reports, obstacles = [], []
    for name in splits or ("train", "val", "test"):
        if not splits and name == "test" and name not in source.splits:
            continue  # what training does not need may be absent
        try:
            records = source.read(name)
        except DataError as error:
            if str(error) not in obstacles:
                obstacles.append(str(error))
            continue
        if any(records is report.records for report in reports):
            continue  # nothing is divided before it is sound
        training = next((report.records.classes for report in reports if report.records.name == "train"), None)
        reports.append(check_split(records, training or None))
    return reports, obstacles


def draw_sheet(path: Path, reports: Sequence[Report], title: str) -> int:
    """Images of every usable split with their boxes, all classes among them if possible -> how many were drawn."""
    usable = [report for report in reports if report.dataset is not None]
    samples, names = [], []
    for report in usable:
        dataset = report.dataset
        names = names or distinct_names(dataset.classes)
        for index in _choose(dataset, _SAMPLES // len(usable)):
            sample = dataset.sample(index)
            caption = f"{report.records.name} image {sample.image_id}: {len(sample.labels)} objects"
            boxes, labels = sample.boxes_xyxy.tolist(), sample.labels.tolist()
            samples.append((dataset.picture(index), boxes, labels, caption))
    if samples:
        draw_samples(path, samples, names, title)
    return len(samples)


def _choose(dataset: FolderDataset, count: int) -> list[int]:
    """Images from all over a split; each adds what was seen least among those before it."""
    candidates = (
        [round(at * (len(dataset) - 1) / 199) for at in range(200)] if len(dataset) > 200 else range(len(dataset))
    )
    candidates, seen, chosen = list(candidates), Counter(), []
    while candidates and len(chosen) < count:
        best = max(candidates, key=lambda index: sum(0.1 ** seen[label] for label in set(dataset.labels(index))))
        candidates.remove(best)
        chosen.append(best)
        seen.update(set(dataset.labels(best)))
    return sorted(chosen)


@contextmanager
def _progress(text: str, files: int) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal, if there is one."""
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(rich.markup.escape(text), total=files)
        yield lambda done: bar.advance(task, done)


def print_reports(reports: Sequence[Report], obstacles: Sequence[str]) -> None:
    """Sizes, the class table and remarks, then one line for each problem."""
    for report in reports:
        records, classes = report.records, report.records.classes
        objects = f", {sum(report.counts):,} objects of {len(classes)} classes" if classes else ""
        print(f"{records.name}: {len(records):,} images{objects} ({records.file})")
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
    for obstacle in obstacles:
        print(f"problem: {obstacle}")
    for report in reports:
        for problem in report.problems:
            print(f"problem: {report.records.of(problem)}")


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
    config = preset_named(arguments.preset)
    for size in arguments.batch_size:
        demand(size >= 1, "batch-size", size, "1 or more")
    if output is not None:
        demand_file(output, "give another --output")
    try:
        source = open_source(folder, arguments.val_share, arguments.split_file)
    except DataError as error:
        reports, obstacles = [], [str(error)]
    else:
        print(f"{folder}: {source.about}")
        reports, obstacles = check_source(source, arguments.splits)
    print_reports(reports, obstacles)
    for report in reports:
        if report.records.name == "train" and report.dataset is not None and any(report.dataset.counts):
            print("\n".join(batch_lines(report.dataset, config, arguments.batch_size)))
    if output is not None:
        drawn = draw_sheet(output, reports, str(folder))
        print(f"{drawn} images drawn in {output}" if drawn else f"{output} not written: no split can be drawn")
    kinds = Counter(problem.kind for report in reports for problem in report.problems)
    kinds.update({"split": len(obstacles)})
    if kinds.total():
        listed = ", ".join(f"{kind} {count:,}" for kind, count in kinds.items() if count)
        problems = "1 problem" if kinds.total() == 1 else f"{kinds.total():,} problems"
        raise DataError(f"{folder}: {problems} ({listed})")
    print("no problems")


main = program(Arguments, run, "check_data", __doc__)


if __name__ == "__main__":
    sys.exit(main())
