"""``python -m dndetr.train``: train a detector on the built-in shapes or on a data set of yours."""

import contextlib
import sys
from collections.abc import Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from . import _process, commandline  # noqa: F401
from .config import Config
from .hub import is_of_transformers
from .output import unfailing
from .presets import preset_named
from .published_backbones import with_published_backbone
from .runs.checkpoint import load_checkpoint
from .runs.listener import Listener
from .training.overfit import overfitting, verdict
from .training.signals import Stopped

if TYPE_CHECKING:
    from .training.distributed import Processes
    from .training.resuming import Found, Origin
    from .training.trainer import Trainer


class Outcome(NamedTuple):
    """How training in this process ended.

    first: whether it is the process that prints and writes; stopped: why the run is not at its end, if it is not;
    signal: the one that came while it trained, also in its last moments.
    """

    folder: Path
    first: bool
    stopped: Stopped | None = None
    signal: int | None = None


def parse(arguments: Sequence[str]) -> Config:
    """Command-line arguments -> the configuration of ``--preset`` (else of ``--init``), changed by the other flags."""
    count = None
    with contextlib.suppress(ValueError):  # what is no number is told below, with all other mistakes
        count = int(_flag(arguments, "--overfit") or 0)
    default = starting_point(_flag(arguments, "--preset"), count, _flag(arguments, "--init"))
    return commandline.parse(Config, list(arguments), "python -m dndetr.train", default=default, description=__doc__)


def starting_point(preset: str | None, overfit: int | None, init: str | None = None) -> Config:
    """What all other settings change: the preset, also as it learns so many images by heart.

    Without one, the model and the images of the transformers detector in ``init``, or else tiny.
    """
    if preset is None and init is not None and is_of_transformers(init):
        from .runs.detector_folder import as_starting_point  # here, since other runs are to know their flags at once

        config = as_starting_point(init)
    else:
        config = preset_named("tiny" if preset is None else preset)
    return overfitting(config, overfit) if overfit is not None and overfit > 0 else config


def _flag(arguments: Sequence[str], flag: str) -> str | None:
    """The value of ``flag`` as in ``--flag value`` or ``--flag=value``, the last one as everywhere."""
    found = None
    for place, argument in enumerate(arguments):
        if argument == flag and place + 1 < len(arguments):
            found = arguments[place + 1]
        elif argument.startswith(f"{flag}="):
            found = argument.partition("=")[2]
    return found


def given_flags(arguments: Sequence[str]) -> set[str]:
    """The settings that are given as flags, by their names in the configuration."""
    flags = (argument.partition("=")[0] for argument in arguments if argument.startswith("--"))
    paths = (flag.removeprefix("--").replace("-", "_").rpartition(".") for flag in flags)
    return {f"{group}{dot}{name.removeprefix('no_')}" for group, dot, name in paths}


@unfailing()
def run(arguments: Sequence[str], listeners: Sequence[Listener] = ()) -> Path:
    """Train as the arguments say, in this process or in those that torchrun started -> the run's folder.

    listeners: are told of the run beside its own, on the first process (docs/listeners.md).
    """
    folder, first, stopped, _ = train(parse(arguments), given_flags(arguments), listeners)
    if stopped is not None:
        if first:
            print(f"{stopped}; continue with --resume {folder}", file=sys.stderr)
        raise SystemExit(128 + stopped.number)
    return folder


def train(config: Config, given: Set[str], listeners: Sequence[Listener] = ()) -> Outcome:
    """Train as configured, or go on with a run; given: names of the settings that were not left to their defaults."""
    # Imported here so that --help and mistakes in the flags answer at once.
    from .context import own_context
    from .training.distributed import Processes
    from .training.resuming import Origin, asked_for, find, shared_anew

    processes, found = Processes(), None
    with contextlib.ExitStack() as stack:
        stack.enter_context(own_context())
        stack.enter_context(processes)
        if config.resume is not None:
            found = find(config, processes, stack)
            if found is None:
                config = replace(config, resume=None)
        origin = Origin(config, asked_for(config), processes.world) if found is None else found.origin(config, given)
        if origin.config.data is None:
            from_file = config.init is not None and "preset" not in given
            what = f"--init {config.init}" if from_file else f"--preset {config.preset}"
            raise ValueError(f"{what} needs data: --data DIR (yours) or --data shapes")
        config = shared_anew(origin, processes.world)
        return _train(config, origin, given, found, processes, listeners, stack)


def _train(
    config: Config,
    origin: "Origin",
    given: Set[str],
    found: "Found | None",
    processes: "Processes",
    listeners: Sequence[Listener],
    stack: contextlib.ExitStack,
) -> Outcome:
    from .data.training import TrainingData
    from .runs.console import Console
    from .runs.folder import hold, output_folder
    from .runs.paths import demand_data_there
    from .training.batch_size import with_fitting_batch
    from .training.listeners import all_listeners
    from .training.time_limit import stopwatch
    from .training.trainer import Trainer

    elapsed, notes = stopwatch(), []
    console = Console(quiet=config.quiet or not processes.first)
    everyone = all_listeners(config, console, listeners)
    checkpoint = None if found is None else found.checkpoint
    if found is not None:
        demand_data_there(config)
        published = None
    else:
        config, published, about = with_published_backbone(config, given)
        notes += about
    if config.batch_size == "auto":
        config, note = with_fitting_batch(config, processes)
        notes.append(note)
    if found is None:
        origin = origin._replace(config=config)
    data = TrainingData(config, processes.rank, processes.world, processes.neighbours)
    trainer = Trainer(config, data, processes, checkpoint, elapsed, origin)
    chosen = [] if trainer.batch_shapes is None else [f"CUDA graphs: {trainer.batch_shapes}"]
    notes += [*data.about, _summary(trainer), *chosen, *data.warnings]
    if found is not None:
        if [tuple(entry) for entry in checkpoint["classes"]] != data.classes:
            raise ValueError(f"the classes in {config.data} are not those of the run in {found.folder}")
        folder = found.folder
        if processes.from_first(processes.first and found.tell_if_finished(trainer.total_steps)):
            _judge(config, processes, found.last_ap())
            return Outcome(folder, processes.first)
    else:
        notes += _start_from(trainer, published)
        folder = None
        if processes.first:
            try:
                folder = stack.enter_context(output_folder(config.output, config.preset))
            except FileExistsError as error:
                if "resume" not in given or not (Path(config.output) / "checkpoint.pt").exists():
                    raise
                what = "another start of this run was faster: give the command again, which waits for it"
                raise FileExistsError(f"--output {config.output}: {what}") from error
            stack.enter_context(hold(folder))
        folder = processes.from_first(folder)
    for note in (f"run folder: {folder}", *notes):
        console.message(note)
    console.classes(data.classes, data.class_counts)
    trainer.prepare()
    restart = found.restart(processes.world) if found is not None and processes.first else None
    try:
        metrics = trainer.fit(folder, everyone, restart)
    except Stopped as stopped:
        return Outcome(folder, processes.first, stopped, trainer.signal)
    _judge(config, processes, metrics.get("AP"))
    return Outcome(folder, processes.first, signal=trainer.signal)


def _judge(config: Config, processes: "Processes", ap: float | None) -> None:
    """Of a run with ``--overfit``, say whether it passed; RuntimeError where it did not."""
    if config.overfit and processes.first:
        passed, text = verdict(ap, config.overfit, config.data)
        if not passed:
            raise RuntimeError(text)
        if not config.quiet:
            print(text)


def _start_from(trainer: "Trainer", published: Path | None) -> list[str]:
    """Load what a new run starts from -> a line for each file; published: the folder with the backbone's weights."""
    from .models.weights.pretrained import initialise
    from .models.weights.published import load_published
    from .runs.detector_folder import compared

    config, notes = trainer.config, []
    name = config.model.backbone.name
    if published is not None:
        notes.append(f"--model.backbone.name {name}: {load_published(trainer.model.backbone, published)}")
    if config.init is not None:
        weights = load_checkpoint(config.init, needs=())
        report = initialise(trainer.model, weights, config.init, trainer.data.classes)
        if name and published is None and not any(tensor.startswith("backbone.") for tensor in report.kept):
            raise ValueError(f"--init {config.init} has no backbone: give one, --model.backbone.name {name}")
        notes.append(f"--init {config.init}: {report}")
        if is_of_transformers(config.init) and "config" in weights:
            notes.append(f"--init {config.init}: {compared(weights, config)}")
    return notes


def _summary(trainer: "Trainer") -> str:
    """One line: model, size, data, arithmetic."""
    config, data, world = trainer.config, trainer.data, trainer.processes.world
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters()) / 1e6
    shared = f", {world} processes" if world > 1 else ""
    noise = config.denoising
    groups = f"{'contrastive ' * noise.contrastive}denoising groups"
    groups = f"{noise.groups} {groups}"
    if noise.fill and noise.groups:
        groups = f"up to {groups} of {noise.fill} queries together"
    return (
        f"{config.model.variant}, {parameters:.1f} M parameters, {len(data.classes)} classes, "
        f"{data.images['train']:,} training and {data.images['val']:,} validation images, "
        f"{config.batch_size * config.accumulate * world} a step, {groups}, "
        f"{trainer.device.type} {str(trainer.precision).removeprefix('torch.')}, {trainer.mode} steps{shared}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command-line entry; exit status 1 and one line on stderr for what the user can mend."""
    return commandline.exit_status(lambda: run(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
