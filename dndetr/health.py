"""``python -m dndetr.health RUN``: what denoising does in a trained detector, whether it leaks, and what it costs."""

import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from . import _process  # noqa: F401
from .commandline import DeviceName, ModelPath, program
from .demands import demand

if TYPE_CHECKING:
    from .analysis.leak import LeakCheck
    from .config import Config
    from .data.training import TrainingData


@dataclass(frozen=True)
class Arguments:
    """One examination."""

    model: ModelPath
    data: str | None = None
    """A folder in COCO, YOLO or VOC format, or "shapes" (default: the data that the run was trained on)."""
    val_share: float | None = None
    """For --data without a validation split: as of the train command."""
    split_file: Path | None = None
    """As of the train command, for --data."""
    output: Path | None = None
    """New folder for denoising.png and denoising.json (default: only print)."""
    leak_check: bool = False
    """Only the leak check; exit status 1 where there is a leak."""
    steps: int = 8
    """Training steps to time with and without denoising (0: do not time)."""
    device: DeviceName = "auto"
    workers: int | None = None
    """Processes that prepare images, 0 for this one alone (default: as in the run)."""


def time_steps(config: "Config", data: "TrainingData", steps: int) -> tuple[float, float]:
    """Median seconds of a training step with and without denoising, one after the other on the same batches.

    Two steps of each are run before the first that counts.
    """
    from .training.distributed import Processes
    from .training.trainer import Trainer

    trainers = []
    for groups in (config.denoising.groups, 0):
        trainer = Trainer(replace(config, denoising=replace(config.denoising, groups=groups)), data, Processes({}))
        trainer.prepare()
        trainer.model.train()
        trainers.append(trainer)
    seconds: tuple[list[float], list[float]] = ([], [])
    batches = _repeated(data)
    for number in range(steps + 2):
        batch = next(batches)
        for trainer, times in zip(trainers, seconds, strict=True):
            started = time.perf_counter()
            _, norm = trainer.step(batch)
            norm.item()  # waits for the device
            if number >= 2:
                times.append(time.perf_counter() - started)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def _repeated(data: "TrainingData"):
    epoch = 0
    while True:
        yield from data.training(epoch)
        epoch += 1


def table(report: dict) -> str:
    """The report of a reconstruction as lines of text."""
    layers = range(1, len(report["error"]) + 1)
    lines = [
        f"1 - IoU with the original, {report['objects']} objects of {report['images']} images; "
        f"{report['label_noise']:.0%} of the labels drawn anew",
        "box noise   noised" + "".join(f"  layer {layer}" for layer in layers) + "  flipped corrected  kept correct",
    ]
    for column, level in enumerate(report["levels"]):
        numbers = [report["noised_error"][column], *(layer[column] for layer in report["error"])]
        labels = [report[name][column] for name in ("flipped_corrected", "kept_correct")]
        row = f"{level:>9g}" + "".join(f"{number:9.3f}" for number in numbers)
        shares = ["-" if share is None else f"{share:.1%}" for share in labels]
        lines.append(f"{row}  {shares[0]:>17}  {shares[1]:>12}")
    return "\n".join(lines)


def leak_sentence(check: "LeakCheck") -> str:
    """The check's outcome in one line."""
    told = (
        f"largest change of a matching query's output {check.matching:.1e} under other targets, {check.absent:.1e} "
        f"without denoising; between groups {check.groups:.1e}; changed queries themselves {check.control:.1e}"
    )
    return f"leak check: {'passed' if check.passed else 'FAILED'} ({told})"


def run(arguments: Arguments) -> None:
    """Examine as the arguments say and print it; RuntimeError where ground truth leaks."""
    from .analysis.leak import leak_check
    from .data.training import TrainingData
    from .detector import load
    from .pictures.denoising import write_denoising
    from .runs.folder import output_folder
    from .runs.paths import demand_data_there, with_data

    demand(arguments.steps >= 0, "steps", arguments.steps, "0 or more")
    demand((arguments.workers or 0) >= 0, "workers", arguments.workers, "0 or more")
    detector = load(arguments.model, arguments.device)
    workers = detector.config.workers if arguments.workers is None else arguments.workers
    config = with_data(detector.config, arguments.data, arguments.val_share, arguments.split_file)
    config = replace(config, device=arguments.device, workers=workers)
    if config.data is None:
        raise ValueError(f"{arguments.model} needs data: --data DIR (yours) or --data shapes")
    if arguments.data is None:
        demand_data_there(config)
    data = TrainingData(config)
    if [name for _, name in data.classes] != [name for _, name in detector.classes]:
        raise ValueError(f"the classes in {config.data} are not those that {arguments.model} was trained on")
    groups = config.denoising.groups
    batch = next((batch for batch in data.validation() if batch.targets.counts.any()), None)
    if batch is None:
        raise ValueError(f"{config.data}: the val split has no objects, so there is nothing to noise")
    official = config.denoising.padding == "official"
    check = leak_check(detector.model, batch.to(detector.device), len(data.classes), min(max(groups, 2), 5), official)
    if not check.passed:
        raise RuntimeError(leak_sentence(check))
    print(leak_sentence(check))
    if arguments.leak_check:
        return
    if groups == 0:
        print("trained without denoising: there is nothing to restore and no cost")
        return

    def infer(batch, noised):
        return detector.model.infer(batch, detector.precision, noised)

    if arguments.output is not None:
        with output_folder(arguments.output, "health") as folder:
            report = write_denoising(folder, infer, data.validation(), detector.names, config, detector.device)
    else:
        from .analysis.reconstruction import measure_reconstruction

        noise = config.denoising.label_noise
        report = measure_reconstruction(infer, data.validation(), len(data.classes), noise, detector.device).report
    print(table(report))
    if arguments.steps:
        slow, fast = time_steps(config, data, arguments.steps)
        print(
            f"cost: a training step takes {slow * 1e3:.1f} ms with denoising and {fast * 1e3:.1f} ms without, "
            f"{slow / fast - 1:+.0%} (medians of {arguments.steps}, interleaved, data not counted)"
        )


main = program(Arguments, run, "health", __doc__)


if __name__ == "__main__":
    sys.exit(main())
