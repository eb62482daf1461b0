"""``python -m dndetr.profile``: traces training steps, or counts one without a GPU, and names the dearest parts.

    python -m dndetr.profile [--steps N] [--trace FILE] [flags of dndetr.train]
    python -m dndetr.profile --count [--gpu NAME] [--canvas HxW] [--objects N] [--json FILE] [flags of dndetr.train]

The trace opens in chrome://tracing or ui.perfetto.dev. No run folder is made and no weights are kept. What is counted
runs on fake tensors, so it needs neither GPU nor data.
"""

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import _process, commandline, train  # noqa: F401
from .config import Config
from .files import demand_file, write_json_atomic, writing
from .published_backbones import with_published_backbone

_WARM = 3  # steps before those that count: first uses compile, test and allocate
_STEPS, _TRACE = 5, Path("trace.json.gz")
_CANVAS, _OBJECTS, _CLASSES = (800, 1333), 20, 91  # as COCO has them
_TRACING, _COUNTING = ("steps", "trace"), ("gpu", "canvas", "objects", "classes", "json")


def split_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's flags, and those that it hands to training; ValueError for flags of tracing and counting both."""
    parser = argparse.ArgumentParser(
        prog="python -m dndetr.profile", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--steps", type=int, help=f"how many steps are traced (default {_STEPS})")
    parser.add_argument("--trace", type=Path, help=f"file to write (default: {_TRACE})")
    parser.add_argument("--count", action="store_true", help="count a step of a GPU instead, on fake tensors")
    parser.add_argument("--gpu", help="whose time is predicted: h200 (default), h100, a100, rtx-4090")
    parser.add_argument("--canvas", help="height and width of the images (default: a fixed canvas, or 800x1333)")
    parser.add_argument("--objects", type=int, help=f"most objects of an image (default {_OBJECTS})")
    parser.add_argument("--classes", type=int, help=f"classes of the detector (default {_CLASSES})")
    parser.add_argument("--json", type=Path, help="file for the numbers that are counted")
    given, rest = parser.parse_known_args(arguments)
    wrong = [f"--{name}" for name in (_TRACING if given.count else _COUNTING) if getattr(given, name) is not None]
    if wrong and given.count:
        raise ValueError(f"--count traces nothing: leave out {', '.join(wrong)}")
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: only what is counted has this; add --count")
    return given, rest


def count(given: argparse.Namespace, rest: Sequence[str]) -> str:
    """Count a step as the arguments say -> its stages and dearest operations, as text."""
    unread = {argument.partition("=")[0] for argument in rest} & {"--data", "--init", "--resume"}
    if "--data" in unread:
        raise ValueError("--count reads no data: leave out --data (--classes is the number of its classes)")
    if unread:
        raise ValueError(f"--count reads no weights: leave out {', '.join(sorted(unread))} (--preset is counted)")
    for name in ("objects", "classes"):
        number = getattr(given, name)
        if number is not None and number < 1:
            raise ValueError(f"--{name} {number}: give 1 or more")
    if given.json is not None:
        demand_file(given.json, "give another --json")
    config = _settings(rest)
    canvas = _canvas(given.canvas, config)
    objects, classes = given.objects or _OBJECTS, given.classes or _CLASSES

    from .counting.gpus import gpu_named
    from .counting.report import numbers, words
    from .counting.step import count_step

    name = "h200" if given.gpu is None else given.gpu
    gpu = gpu_named(name)
    operations, stages = count_step(config, canvas, objects, classes)
    found = numbers(operations, stages, gpu)
    about = {
        "preset": config.preset,
        "images": config.batch_size * config.accumulate,
        "canvas": list(canvas),
        "objects": objects,
        "classes": classes,
        "gpu": name,
        "rates": gpu.source,
    }
    if given.json is not None:
        write_json_atomic(given.json, about | found, indent=1)
    head = (
        f"a step of {config.preset}, counted; images: {about['images']} of {canvas[0]}x{canvas[1]}, "
        f"up to {objects} objects each; predicted for {name} (rates {gpu.source})"
    )
    return "\n".join([head, *words(found)])


def _settings(rest: Sequence[str]) -> Config:
    """The training's configuration; ValueError where it leaves the number of images open."""
    config, given = train.parse(rest), train.given_flags(rest)
    if config.batch_size == "auto":
        raise ValueError("--batch-size auto: only training measures what fits; give a number of images")
    if config.model.backbone.settings and "model.backbone.name" not in given:
        return config  # a preset's, whose architecture it knows
    return with_published_backbone(config, given)[0]


def _canvas(given: str | None, config: Config) -> tuple[int, int]:
    """Height and width as the flag has them, or the data's own; ValueError for what is no size."""
    if given is None:
        return config.images.canvas if config.images.recipe == "fixed" else _CANVAS
    sides = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", given)
    if sides is None:
        raise ValueError(f"--canvas {given}: give height and width, such as 800x1333")
    return int(sides[1]), int(sides[2])


def profile(arguments: Sequence[str]) -> str:
    """Trace steps, or count one, as the arguments say -> the dearest parts, as text."""
    given, rest = split_arguments(arguments)
    if given.count:
        return count(given, rest)
    traced, path = _STEPS if given.steps is None else given.steps, given.trace or _TRACE
    if traced < 1:
        raise ValueError(f"--steps {traced}: trace at least one step")
    demand_file(path, "give another --trace")
    config = _settings(rest)
    if config.data is None:
        raise ValueError(f"--preset {config.preset} needs data: --data DIR (yours) or --data shapes")

    import torch

    from .data.training import TrainingData
    from .training.distributed import Processes
    from .training.trainer import Trainer

    trainer = Trainer(config, TrainingData(config), Processes({}))
    trainer.prepare()
    trainer.model.train()
    batches = iter(trainer.data.training(0, 0))

    def steps(count: int) -> float:
        """Seconds waited for data."""
        waited = 0.0
        for _ in range(count):
            start = time.perf_counter()
            with torch.profiler.record_function("waiting for data"):
                batch = next(batches)
            waited += time.perf_counter() - start
            trainer.step(batch)
        return waited

    steps(_WARM)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    start = time.perf_counter()
    with torch.profiler.profile(activities=activities) as profiler:
        waited = steps(traced)
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    with writing(path):
        profiler.export_chrome_trace(str(path))
    head = (
        f"{traced} steps of {config.preset}, {seconds / traced * 1e3:.1f} ms each while traced, "
        f"{waited / seconds:.1%} waiting for data; trace: {path}"
    )
    return "\n".join([head, *dearest(profiler.key_averages(), traced, trainer.device.type)])


def dearest(events, steps: int, device: str, count: int = 10) -> list[str]:
    """Lines that name the parts with most time of their own, on the device where there is one."""
    spent = "self_cpu_time_total"
    if device == "cuda":
        # Calls on the host and annotations carry the time of their kernels once more.
        spent = "self_device_time_total"
        events = [event for event in events if event.device_type.name == "CUDA" and not event.is_user_annotation]
    ranked = sorted(events, key=lambda event: -getattr(event, spent))
    total = max(sum(getattr(event, spent) for event in events), 1e-9)
    lines = [f"{'ms/step':>9} {'share':>6} {'calls/step':>10}  part"]
    for event in ranked[:count]:
        time_of = getattr(event, spent)
        lines.append(
            f"{time_of / steps / 1e3:9.2f} {time_of / total:6.1%} {event.count / steps:10.1f}  {event.key[:80]}"
        )
    return lines


def run(arguments: Sequence[str]) -> None:
    """Trace, or count, and print."""
    print(profile(arguments))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command-line entry; exit status 1 and one line on stderr for what the user can mend."""
    return commandline.exit_status(lambda: run(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
