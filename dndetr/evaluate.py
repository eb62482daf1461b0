"""``python -m dndetr.evaluate RUN_OR_CHECKPOINT``: COCO's numbers of a trained detector, by class, with figures."""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rich.cells import cell_len, set_cell_size

from . import _process  # noqa: F401
from .commandline import DeviceName, ModelPath, PresetName, program
from .data.classes import distinct_names, listed, match_classes
from .demands import demand
from .hub import is_hub_name
from .presets import preset_named

_MEANINGS = {
    "AP": "IoU 0.50:0.95",
    "AP50": "IoU 0.50",
    "AP75": "IoU 0.75",
    "APs": "small objects (area below 32x32)",
    "APm": "medium objects",
    "APl": "large objects (area above 96x96)",
    "AR1": "recall with 1 detection an image",
    "AR10": "recall with 10",
    "AR100": "recall with 100",
    "ARs": "recall, small objects",
    "ARm": "recall, medium objects",
    "ARl": "recall, large objects",
    "calibration": "expected error of scores from 0.05, IoU 0.50",
}


@dataclass(frozen=True)
class Arguments:
    """One evaluation."""

    model: ModelPath
    data: str | None = None
    """A folder in COCO, YOLO or VOC format, or "shapes" (default: the data that the run was trained on)."""
    val_share: float | None = None
    """For --data without a validation split: as of the train command."""
    split_file: Path | None = None
    """As of the train command, for --data."""
    split: str = "val"
    """Which part of the data: val, train, test or any name it has."""
    output: Path | None = None
    """New folder for the results (default: a numbered one beside the run)."""
    threshold: float = 0.5
    """Score from which a detection counts in the confusion matrix."""
    preset: PresetName = None
    device: DeviceName = "auto"
    batch_size: int | None = None
    """Images at once (default: as in the run)."""
    fast_eval: bool = False
    """Score with hotcoco (extra fast-eval): the same numbers as pycocotools, sooner."""
    workers: int = 0
    """Processes that prepare images (0: in this process)."""
    skip_unreadable: bool = False
    """Leave out and count the images that cannot be decoded, also where the run did not."""


def run(arguments: Arguments) -> Path:
    """Evaluate as the arguments say -> the folder with the results."""
    # Imported here so that --help and mistakes in the flags answer at once.
    from .data.loader import build_loader
    from .data.training import evaluation_batch
    from .detector import load
    from .files import write_json_atomic, write_json_rows
    from .pictures.scores import draw_confusion, draw_precision_recall
    from .scoring.calibration import calibration_error
    from .scoring.coco import coco_scores, detect, metrics_of, precision_by_class
    from .scoring.confusion import confusion_matrix
    from .scoring.evaluators import demand_hotcoco
    from .scoring.truth import Truth

    demand(arguments.batch_size is None or arguments.batch_size >= 1, "batch-size", arguments.batch_size, "1 or more")
    demand(0 <= arguments.threshold <= 1, "threshold", arguments.threshold, "a score from 0 to 1")
    demand(arguments.workers >= 0, "workers", arguments.workers, "0 or more")
    if arguments.fast_eval:
        demand_hotcoco()
    if arguments.preset is None:
        detector = load(arguments.model, arguments.device)
        data, source = open_split(arguments, detector.config)
    else:
        data, source = open_split(arguments, preset_named(arguments.preset))
        detector = load(arguments.model, arguments.device, preset=arguments.preset, classes=data.classes)
    truth = Truth.of(data.records)
    classes, columns = known_classes(data.classes, detector.classes, truth, source)
    loader = build_loader(
        data,
        arguments.batch_size or evaluation_batch(detector.config, data.canvas),
        training=False,
        workers=arguments.workers,
        multiple=detector.config.images.multiple,
    )

    def predict(batch):
        logits, boxes = detector.infer(batch)
        return logits[..., columns], boxes

    with _results(arguments) as results:
        detections, image_ids = detect(predict, _shown(loader), classes, detector.config.detections)
        scores = coco_scores(truth, detections, image_ids, arguments.fast_eval)
        metrics = metrics_of(scores) | {"calibration": calibration_error(truth, detections)}
        title = f"{arguments.model.name} on {source} ({arguments.split}, {len(image_ids)} images)"
        counts = confusion_matrix(truth, detections, [number for number, _ in classes], arguments.threshold)
        with results.file(f"detections_{arguments.split}.json") as path:
            write_json_rows(path, detections)
        with results.file("precision_recall.png") as path:
            draw_precision_recall(path, precision_by_class(scores), title)
        names = distinct_names(classes)
        with results.file("confusion.png") as path:
            draw_confusion(path, counts, names, f"{title}, scores from {arguments.threshold:g}")
        with results.file("metrics.json") as path:
            write_json_atomic(path, metrics, indent=2)
    print(report(metrics, truth))
    print(f"\nresults in {results.path}")
    return results.path


def open_split(arguments: Arguments, config):
    """The data set to evaluate on, prepared as ``config`` says, and its name in messages."""
    from .data.folder_dataset import FolderDataset
    from .data.review.image_files import check_files
    from .data.sample import normalisation
    from .data.shapes import ShapesDataset
    from .data.training import evaluation_transform, shapes_or_folder, source_of
    from .runs.paths import demand_data_there, with_data

    named = with_data(config, arguments.data, arguments.val_share, arguments.split_file)
    source, name = named.data, named.data_name
    if source is None:
        what = str(arguments.model) if arguments.preset is None else "--preset"
        raise ValueError(f"{what} needs data: --data DIR (yours) or --data shapes")
    if arguments.data is None:
        demand_data_there(config)
    for warning in shapes_or_folder(source):
        print(f"warning: {warning}", file=sys.stderr)
    if source == "shapes":
        colours = normalisation(config.images)
        if arguments.split == "train":
            return ShapesDataset("train", config.train_images, seed=config.seed, colours=colours), source
        return ShapesDataset(arguments.split, config.val_images, colours=colours), source
    cache = config.images.cache_mib << 20  # decides how large pictures are decoded, so it is the run's
    data = FolderDataset(source_of(named).read(arguments.split), evaluation_transform(config), cache_bytes=cache)
    if config.images.skip_unreadable or arguments.skip_unreadable:
        images = len(data)
        remarks = check_files(data, skip_unreadable=True)
        if len(data) < images:
            print(f"warning: {remarks[-1]}", file=sys.stderr)  # those before it are about training
    return data, name


def known_classes(own, trained, truth, source: str) -> tuple[list[tuple[int, str]], list[int]]:
    """The data's classes that the detector knows, in its order, and their places among the detector's.

    ValueError for a class with objects that it does not know; one without objects, as some tools write, is left out.
    """
    used = set(truth.category_ids.tolist())
    places = match_classes(own, trained)
    missing = [f"{name!r} (id {number})" for (number, name), place in zip(own, places, strict=True)
               if place is None and number in used]  # fmt: skip
    known = sorted((place, entry) for entry, place in zip(own, places, strict=True) if place is not None)
    if missing or not known:
        missing = missing or [f"{name!r} (id {number})" for number, name in own]
        raise ValueError(
            f"{source}: the detector was not trained on {listed(missing)}; its classes are "
            f"{listed(distinct_names(trained), 10)}; give the data's categories the names they had in training"
        )
    return [entry for _, entry in known], [place for place, _ in known]


def report(metrics: dict, truth) -> str:
    """The numbers, then a table of the classes, as lines of text."""
    lines = [f"{name:<11} {_number(metrics[name])}   {meaning}" for name, meaning in _MEANINGS.items()]
    objects = Counter(truth.category_ids[~truth.crowd].tolist())
    # Both are ordered by category id.
    numbers = sorted(number for number, _ in truth.classes)
    width, wide = max(5, *(cell_len(name) for name in metrics["classes"])), max(6, len(str(numbers[-1])))
    lines += ["", f"{'class':<{width}}  {'id':>{wide}}  {'objects':>7}  AP"]
    for number, (name, value) in zip(numbers, metrics["classes"].items(), strict=True):
        lines.append(f"{set_cell_size(name, width)}  {number:>{wide}}  {objects[number]:>7}  {_number(value)}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "    -" if value is None else f"{value:.3f}"


def _results(arguments: Arguments):
    """The folder for the results, as ``results_folder`` has it: by default beside the run."""
    from .runs.results import results_folder

    if is_hub_name(str(arguments.model)):
        return results_folder(arguments.output, f"{arguments.model.name}-{arguments.split}")
    path = arguments.model.resolve()
    run = path if path.is_dir() else path.parent
    is_run = (run / "config.json").exists()
    name = run.name if path.is_dir() else f"{run.name}-{path.stem}" if is_run else path.stem
    root = run.parent if is_run or path.is_dir() else run
    return results_folder(arguments.output, f"{name}-{arguments.split}", root)


def _shown(loader):
    """The loader's batches, with a bar on a terminal."""
    if not sys.stderr.isatty():
        return loader.epoch()
    from rich.console import Console
    from rich.progress import track

    return track(loader.epoch(), "evaluating", total=len(loader), console=Console(stderr=True), transient=True)


main = program(Arguments, run, "evaluate", __doc__)


if __name__ == "__main__":
    sys.exit(main())
