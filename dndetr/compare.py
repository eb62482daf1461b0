"""``python -m dndetr.compare``: train with one setting changed and show what it buys; by default, denoising on and off.

All other flags are those of ``python -m dndetr.train`` and hold for every run, such as ``--preset small --data DIR``;
without ``--preset`` it is the quick start, shortened to 10 epochs of 62 steps.
"""

import contextlib
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

from . import _process, commandline, train  # noqa: F401
from .config import Config

PROGRAM = "python -m dndetr.compare"
# What the comparison in docs/denoising.md was made with.
_SHORT = {"--epochs": "10", "--train-images": "992", "--lr": "2e-3"}
# Settings of the command, of a run's place, or that decide what all other settings are.
_NOT_COMPARED = ("preset", "output", "resume", "quiet", "seed", "given")


@dataclass(frozen=True)
class Arguments:
    """One comparison."""

    field: str = "denoising.groups"
    """The setting that differs, by its flag's name, such as optimizer.ema."""
    values: tuple[str, ...] = ()
    """Its values, the baseline last (default for denoising.groups: as in the preset, and 0)."""
    seeds: int | None = None
    """Runs per value, with seeds from --seed on, the same for all values (default 3)."""
    output: Path | None = None
    """New folder for runs, figure and verdict (default: a numbered one under runs/)."""
    resume: Path | None = None
    """Continue the comparison in this folder; --seeds may be raised."""
    quiet: bool = False
    """Print nothing but the verdict and errors."""


@dataclass(frozen=True)
class Plan:
    """What is compared, as ``comparison.json`` keeps it; flags: those handed on to every run.

    directory: where the comparison was started, which paths among flags and values are relative to.
    """

    field: str
    values: list[str]
    first_seed: int
    seeds: int
    flags: list[str]
    directory: str = ""

    def runs(self) -> list[tuple[str, int]]:
        """(value, seed) in the order of training: seed by seed, so that what is done so far can always be compared.

        Every other seed starts from the other end: a machine that slows down favours no value.
        """
        order = []
        for number in range(self.seeds):
            order += [(value, self.first_seed + number) for value in self.values[:: -1 if number % 2 else 1]]
        return order

    def folder(self, value: str, seed: int) -> str:
        """Name of a run's folder: its own, also where values differ in nothing that a file's name may hold."""
        names = [re.sub(r"[^A-Za-z0-9.+-]+", "_", each) for each in self.values]
        place = self.values.index(value)
        name = f"{names[place]}~{place + 1}" if names.count(names[place]) > 1 else names[place]
        return f"{self.field.rpartition('.')[2]}-{name}-seed-{seed}"

    def arguments(self, value: str, seed: int) -> list[str]:
        """Flags of the train command for one run."""
        flags = [*self.flags, *_flags(self.field, value), "--seed", str(seed)]
        return flags if self.directory == os.getcwd() else _moved(flags, self.directory)

    def label(self, value: str) -> str:
        """How a value is called in the figure."""
        return f"{self.field} {value}"


def make_plan(arguments: Arguments, rest: Sequence[str]) -> Plan:
    """The plan of a new comparison, every run's settings checked; rest: the train command's flags."""
    given = {argument.partition("=")[0].replace("_", "-") for argument in rest if argument.startswith("--")}
    field = arguments.field.replace("-", "_").removeprefix("__")
    seeds = 3 if arguments.seeds is None else arguments.seeds
    if seeds < 1:
        raise ValueError(f"--seeds {seeds}: give 1 or more")
    if not _is_setting(field) or field in _NOT_COMPARED:
        raise ValueError(f"--field {arguments.field}: give the name of a setting, such as denoising.groups or lr")
    if same := given & {f"--{field}".replace("_", "-"), _negative(field)}:
        raise ValueError(f"{same.pop()} is what is compared: give its values with --values")
    flags = list(rest)
    if "--preset" not in given:
        for flag, value in _SHORT.items():
            if flag not in given:
                flags += [flag, value]
    flags, first = _without_seed(flags)
    base = train.parse(flags)
    if base.data is None:
        raise ValueError(f"--preset {base.preset} needs data: --data DIR (yours) or --data shapes")
    values = list(arguments.values)
    if not values and field == "denoising.groups":
        values = [str(base.denoising.groups or 5), "0"]
    if len(values) < 2 or len(set(values)) < len(values):
        raise ValueError(f"--values {' '.join(values)}: give two or more different values of --field {arguments.field}")
    plan = Plan(field, values, base.seed if first is None else first, seeds, flags, os.getcwd())
    for value in values:
        train.parse(plan.arguments(value, plan.first_seed))
    return plan


def _flags(field: str, value: str) -> list[str]:
    flag = f"--{field}".replace("_", "-")
    if value.lower() in ("true", "false"):
        return [flag if value.lower() == "true" else _negative(field)]
    return [flag, *value.split()]


def _moved(flags: list[str], directory: str) -> list[str]:
    """Flags that mean the same outside of the directory that their paths are relative to."""
    moved, before = [], ""
    for flag in flags:
        name, equals, path = flag.partition("=") if flag.startswith("--") else (before, "", flag)
        if name.replace("_", "-") in ("--data", "--split-file", "--init") and path and path != "shapes":
            flag = f"{name}{equals}" * bool(equals) + os.path.join(directory, path)
        moved.append(flag)
        before = name
    return moved


def _negative(field: str) -> str:
    """The flag that switches a setting off: --images.no-augment."""
    group, dot, name = field.replace("_", "-").rpartition(".")
    return f"--{group}{dot}no-{name}"


def _is_setting(path: str) -> bool:
    """Whether a configuration has such a field, other than a group of fields."""
    value = Config()
    for name in path.split("."):
        if not is_dataclass(value) or name not in {field.name for field in fields(value)}:
            return False
        value = getattr(value, name)
    return not is_dataclass(value)


def _without_seed(flags: list[str]) -> tuple[list[str], int | None]:
    """The flags without --seed, and its value."""
    seed, kept, rest = None, [], iter(flags)
    for flag in rest:
        name, equals, value = flag.partition("=")
        if name != "--seed":
            kept.append(flag)
            continue
        text = value if equals else next(rest, "")
        if not text.isdecimal():
            raise ValueError(f"--seed {text}: give 0 or more")
        seed = int(text)
    return kept, seed


def compare(folder: Path, plan: Plan, quiet: bool = False) -> dict:
    """Train what is not trained yet, and keep figure and verdict up to date after every run -> the verdict."""
    from .analysis.comparison import read_track, sentences, verdict
    from .files import write_json_atomic
    from .pictures.comparison import draw_comparison

    told: dict = {}
    tracks = []
    order = plan.runs()
    for number, (value, seed) in enumerate(order, start=1):
        run = folder / plan.folder(value, seed)
        if not quiet:
            print(f"[{number}/{len(order)}] {plan.label(value)}, seed {seed}: {run}", flush=True)
        _finish(run, [*plan.arguments(value, seed), *(["--quiet"] if quiet else [])])
        tracks.append(read_track(run, value, seed))
        if not tracks[-1].epochs:
            raise ValueError(f"{run / 'metrics.jsonl'} has no evaluation to compare: remove {run} to train it anew")
        told = verdict(plan.field, plan.values, tracks)
        write_json_atomic(folder / "verdict.json", told, indent=2)
        draw_comparison(folder / "compare.png", told)
        if not quiet and number < len(order):
            print("\n".join(sentences(told)), flush=True)
    return told


def _finish(run: Path, arguments: Sequence[str]) -> None:
    """Train the run in this folder to its end, wherever it stands."""
    import shutil

    from .runs.run_log import read_rows

    config = train.parse(arguments)
    rows = read_rows(run / "metrics.jsonl")
    evaluated = [row.get("epoch") for row in rows if row["event"] == "eval"]
    if (evaluated and evaluated[-1] == config.epochs) or any(row["event"] == "end" for row in rows):
        return
    if (run / "checkpoint.pt").exists():
        if config.data != "shapes" and not Path(config.data).exists():
            raise ValueError(
                f"{config.data}: no such folder; put the comparison's data set back there, or a link to it"
            )
        quiet = [flag for flag in arguments if flag == "--quiet"]
        train.run(["--resume", str(run), *quiet])
        return
    if run.exists():
        shutil.rmtree(run)  # killed before its first checkpoint: nothing in it can be continued
    train.run([*arguments, "--output", str(run)])


def _resumed_plan(arguments: Arguments, rest: Sequence[str]) -> Plan:
    """The plan of the comparison that is resumed, with more seeds where they are asked for."""
    folder = arguments.resume
    if not (folder / "comparison.json").exists():
        raise ValueError(f"--resume {folder}: there is no comparison.json, so no comparison was started there")
    changed = [flag for flag in ("field", "values", "output") if getattr(arguments, flag) != getattr(Arguments, flag)]
    if rest or changed:
        given = " ".join([*(f"--{flag}" for flag in changed), *rest])
        raise ValueError(f"--resume continues a comparison as it was planned; leave out {given}")
    saved = json.loads((folder / "comparison.json").read_text())
    return Plan(**saved | {"seeds": max(saved["seeds"], arguments.seeds or 1)})


def run(argv: Sequence[str] | None = None) -> Path:
    """Compare as the arguments say -> the comparison's folder."""
    arguments, rest = commandline.parse(Arguments, argv, PROGRAM, description=__doc__, return_unknown_args=True)
    # Imported here so that --help and mistakes in the flags answer at once.
    from .analysis.comparison import sentences
    from .files import write_json_atomic
    from .runs.folder import output_folder
    from .training.distributed import Processes

    if Processes().world > 1:
        raise ValueError(f"{PROGRAM} trains in one process: start it without torchrun (or unset WORLD_SIZE)")
    with contextlib.ExitStack() as stack:
        if arguments.resume is None:
            plan = make_plan(arguments, rest)
            folder = stack.enter_context(output_folder(arguments.output, "compare"))
        else:
            folder, plan = arguments.resume, _resumed_plan(arguments, rest)
        write_json_atomic(folder / "comparison.json", vars(plan), indent=2)
        try:
            told = compare(folder, plan, arguments.quiet)
        except BaseException as error:
            begun = any(entry.is_dir() for entry in folder.iterdir())
            if begun and isinstance(error, (SystemExit, KeyboardInterrupt)):
                print(f"continue the comparison with {PROGRAM} --resume {folder}", file=sys.stderr)
            if not begun and arguments.resume is None:
                (folder / "comparison.json").unlink()
            raise
    print("\n".join([*sentences(told), f"{folder}: compare.png, verdict.json, and the runs"]))
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    """Command-line entry; exit status 1 and one line on stderr for what the user can mend."""
    return commandline.exit_status(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
