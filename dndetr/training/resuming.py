"""Going on with a run: which checkpoint, what may be otherwise than it was, and how processes share its steps anew."""

import contextlib
import os
import socket
from collections.abc import Set
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ..config import Config, from_dict, to_dict
from ..runs.checkpoint import load_checkpoint
from ..runs.folder import hold
from ..runs.paths import remembered
from ..runs.run_log import NAME, read_rows
from .distributed import Processes

AUTO = "auto"

# What may change when a run is continued: where and how loudly it runs, not what it computes.
WITH_RESUME = (
    "data",
    "split_file",
    "device",
    "mode",
    "workers",
    "fast_eval",
    "tensorboard",
    "tracker",
    "project",
    "quiet",
)
_PATIENCE = 120  # seconds for the process that trained before to end, and a file system to notice
_SHOWN = 3  # differences in a line


class Origin(NamedTuple):
    """How a run was started: its configuration, what was asked for (paths absolute), and by how many processes."""

    config: Config
    asked: dict
    processes: int

    def saved(self) -> dict:
        """What a checkpoint keeps of it."""
        config = to_dict(remembered(self.config))
        return {"config": config, "asked": self.asked, "processes": self.processes}


def asked_for(config: Config) -> dict:
    """Settings as they were typed, to compare those of another start with."""
    return to_dict(remembered(config))


class Found(NamedTuple):
    """A checkpoint to go on from, and the folder of its run; restarted: whether nobody asked for that alone."""

    checkpoint: dict
    folder: Path
    restarted: bool

    def origin(self, config: Config, given: Set[str]) -> Origin:
        """How the run was started, with what this invocation changes; ValueError for what would make another run.

        given: names of the settings that were not left to their defaults.
        """
        saved = self.checkpoint["config"]
        asked = self.checkpoint.get("asked", saved)  # version 0.1.0 did not keep it
        if self.restarted:
            demand_same(asked_for(config), asked, self.folder)
            given = given & set(WITH_RESUME)
        states = self.checkpoint["rng"].get("noise")
        processes = self.checkpoint["processes"] if states is None else len(states)
        started = resumed_config(replace(config, resume=str(self.folder)), saved, given)
        return Origin(started, asked, processes)

    def tell_if_finished(self, steps: int) -> bool:
        """Whether the run, of so many steps, has ended; then a line says so."""
        end = next((row for row in read_rows(self.folder / NAME) if row["event"] == "end"), None)
        if end is not None:
            why = f" ({end['reason']})" if "reason" in end else ""
            print(f"{self.folder} is finished: {self.checkpoint['step']} of {steps} steps are done{why}")
        return end is not None

    def last_ap(self) -> float | None:
        """AP of the last evaluation."""
        rows = [row for row in read_rows(self.folder / NAME) if row["event"] == "eval"]
        return rows[-1].get("AP") if rows else None

    def restart(self, processes: int) -> str | None:
        """What the log says of a restart, where this is one."""
        if not self.restarted:
            return None
        step = self.checkpoint["step"]
        reached = max((row["step"] for row in read_rows(self.folder / NAME)), default=step)
        lost = f"; the log had come to step {reached}" if reached > step else ""
        several = f", with {processes} processes" if processes > 1 else ""
        return f"goes on from step {step}{several}{lost}"


def find(config: Config, processes: Processes, stack: contextlib.ExitStack) -> Found | None:
    """What ``--resume`` goes on from, the same for all processes; None where ``auto`` has nothing yet.

    stack: holds the run's folder, which no other process may train in, until it ends.
    """
    path, restarted = config.resume, config.resume == AUTO
    if restarted:
        if config.output is None:
            raise ValueError("--resume auto needs --output RUN: the folder to start in, or to go on in if it is there")
        path = config.output
        there = processes.gather((os.path.exists(Path(path) / "checkpoint.pt"), socket.gethostname()))
        if not there[0][0]:
            elsewhere = next((host for found, host in there if found), None)
            if elsewhere is not None:
                raise ValueError(
                    f"--output {path}: {elsewhere} has a run there, and {there[0][1]}, where the first process is, has "
                    "none: put it on a disk that all machines share"
                )
            return None
    folder = _run_folder(path)
    checkpoint = None
    if processes.first:
        if folder.is_dir():  # before the checkpoint is read, which another may write
            stack.enter_context(hold(folder, _PATIENCE if restarted else 0))
        checkpoint = load_checkpoint(path, needs=("model", "step", "config", "classes"))
        if "optimizer" not in checkpoint:
            raise ValueError(
                f"--resume {path}: this file has weights but not the state of the training; give the run folder, or "
                "start anew from these weights with --init"
            )
    return Found(processes.from_first(checkpoint), folder, restarted)


def _run_folder(path: str | Path) -> Path:
    """The folder of the run that is resumed."""
    path = Path(path)
    return path if path.is_dir() else path.parent


def resumed_config(config: Config, saved: dict, given: Set[str]) -> Config:
    """The saved run's configuration, on this invocation's device; ValueError for settings that would change the run.

    given: names of those that were not left to their defaults.
    """
    refused = sorted(given - {"resume", *WITH_RESUME})
    if refused:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in refused)
        raise ValueError(
            f"--resume continues a run as it was configured; leave out {flags} "
            "(to start from its weights with other settings use --init)"
        )
    changed = {name: getattr(config, name) for name in WITH_RESUME if name in given}
    run = from_dict(saved)
    typed = {name: path for name, path in run.given.items() if name not in ("resume", *changed)}
    return replace(run, resume=config.resume, given=typed, **changed)


def demand_same(now: dict, before: dict, folder: Path) -> None:
    """ValueError, with the settings and both values, where a start asks for another run than the one in the folder."""
    ours, theirs = _flat(now), _flat(before)
    different = [name for name in theirs | ours if ours.get(name) != theirs.get(name)]
    if different:
        shown = [
            f"--{name.replace('_', '-')} is {_said(theirs.get(name))} there and {_said(ours.get(name))} here"
            for name in different[:_SHOWN]
        ]
        more = f" and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
        raise ValueError(
            f"--resume auto: {folder} was started with other settings: {'; '.join(shown)}{more}: give the same, or "
            "another --output"
        )


def _flat(settings: dict, group: str = "") -> dict:
    """Settings by the names of their flags, without those that may change and those that say where the run is."""
    found = {}
    for name, value in settings.items():
        if isinstance(value, dict) and name != "given":
            found |= _flat(value, f"{group}{name}.")
        elif group or name not in ("given", "output", "resume", *WITH_RESUME):
            found[group + name] = value
    return found


def _said(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def shared_anew(origin: Origin, world: int) -> Config:
    """The configuration with the same images a step for another number of processes.

    A process never takes more images at once than before, since more might not fit into its memory. ValueError, with
    the numbers of processes that could, where so many cannot share a step evenly.
    """
    config, before = origin.config, origin.processes
    if world == before:
        return config
    images = config.batch_size * config.accumulate * before
    each, rest = divmod(images, world)
    if rest:
        able = ", ".join(str(count) for count in range(1, images + 1) if images % count == 0)
        raise ValueError(
            f"the run has {images} images a step ({config.batch_size} at once in each of its processes), which {world} "
            f"processes cannot share evenly: start it with one of {able}"
        )
    size = max(size for size in range(1, config.batch_size + 1) if each % size == 0)
    return replace(config, batch_size=size, accumulate=each // size)
