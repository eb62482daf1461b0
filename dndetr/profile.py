"""``python -m dndetr.profile``: traces training steps and names the ten dearest parts.

    python -m dndetr.profile [--steps N] [--trace FILE] [flags of dndetr.train]

The trace opens in chrome://tracing or ui.perfetto.dev. No run folder is made and no weights are kept.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import _process, commandline, train  # noqa: F401
from .files import demand_file, writing

_WARM = 3  # steps before those that count: first uses compile, test and allocate


def split_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's flags, and those that it hands to training."""
    parser = argparse.ArgumentParser(
        prog="python -m dndetr.profile", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--steps", type=int, default=5, help="how many steps are traced (default 5)")
    parser.add_argument(
        "--trace", type=Path, default=Path("trace.json.gz"), help="file to write (default: %(default)s)"
    )
    return parser.parse_known_args(arguments)


def profile(arguments: Sequence[str]) -> str:
    """Trace steps as the arguments say -> the ten dearest parts, as text."""
    given, rest = split_arguments(arguments)
    if given.steps < 1:
        raise ValueError(f"--steps {given.steps}: trace at least one step")
    demand_file(given.trace, "give another --trace")
    config = train.parse(rest)
    if config.data is None:
        raise ValueError(f"--preset {config.preset} needs data: --data DIR (a COCO-format folder) or --data shapes")

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
        waited = steps(given.steps)
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    with writing(given.trace):
        profiler.export_chrome_trace(str(given.trace))
    head = (
        f"{given.steps} steps of {config.preset}, {seconds / given.steps * 1e3:.1f} ms each while traced, "
        f"{waited / seconds:.1%} waiting for data; trace: {given.trace}"
    )
    return "\n".join([head, *dearest(profiler.key_averages(), given.steps, trainer.device.type)])


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
    """Trace and print."""
    print(profile(arguments))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command-line entry; exit status 1 and one line on stderr for what the user can mend."""
    return commandline.exit_status(lambda: run(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
