"""Processes under torchrun, of which any, or the launcher with all of them, is killed at any moment: nothing is lost.

DNDETR_KILLS=20 with -m slow is the long version.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from short_runs import SMALL, environment

from dndetr.runs.folder import hold
from dndetr.runs.run_log import read_rows

LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
RUN = [*SMALL, "--data", "shapes", "--epochs", "4", "--batch-size", "1", "--val-images", "2", "--workers", "1"]
RUN += ["--checkpoint-every", "2", "--log-every", "2", "--quiet", "--resume", "auto"]


def launch(processes: int, steps: int, restarts: int, folder: Path) -> subprocess.Popen:
    """A run of so many steps, which starts or goes on."""
    several = ["--nproc-per-node", str(processes), "--max-restarts", str(restarts), "-m", "dndetr.train"]
    length = ["--train-images", str(steps // 4 * processes), "--output", "run"]
    with open(folder / "errors.txt", "a") as errors:
        options = {"env": environment(), "cwd": folder, "stdout": errors, "stderr": errors}
        return subprocess.Popen([*LAUNCHER, *several, *RUN, *length], **options)


def programs(folder: Path) -> dict[int, list[str]]:
    """The processes that run in this folder: numbers and command lines."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and os.readlink(entry / "cwd") == str(folder):
                found[int(entry.name)] = (entry / "cmdline").read_text().split("\0")
        except OSError:  # it has ended
            pass
    return found


def trainers(folder: Path) -> list[int]:
    return [number for number, command in programs(folder).items() if "dndetr.train" in command[:4]]


def saved(folder: Path) -> dict | None:
    path = folder / "run" / "checkpoint.pt"
    return torch.load(path, weights_only=True) if path.exists() else None


def wait(until, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


class Killed:
    """A run that is started again and again until it ends; told: what was killed, and the saved step at that time."""

    def __init__(self, folder: Path, processes: int, steps: int, kills: int, seed: int):
        self._folder, self._processes, self._steps = folder, processes, steps
        self._kills, self._draw = kills, random.Random(seed)
        self.told: list[tuple[str, int]] = []

    def run(self) -> None:
        self._launch()
        while len(self.told) < self._kills:
            self._wait_for_a_moment()
            assert not self._over(), (self._folder / "errors.txt").read_text()[-3000:]
            if self._draw.random() < 0.3:
                self.told.append(("all", self._step()))
                self._process.kill()
                self._process.wait()
                self._launch()
            else:
                self._kill_one()
        assert self._process.wait(300) == 0, (self._folder / "errors.txt").read_text()[-3000:]

    def _launch(self) -> None:
        self._process = launch(self._processes, self._steps, self._kills, self._folder)

    def _over(self) -> bool:
        return self._process.poll() is not None

    def _step(self) -> int:
        return (saved(self._folder) or {"step": -1})["step"]

    def _wait_for_a_moment(self) -> None:
        """While it starts, or some time after it has saved anew."""
        if self._draw.random() < 0.3:
            wait(lambda: trainers(self._folder) or self._over())
            time.sleep(self._draw.uniform(0, 6))
        else:
            before = self._step()
            wait(lambda: self._step() > before or self._over())
            time.sleep(self._draw.uniform(0, 0.3))

    def _kill_one(self) -> None:
        """Of those that train, and of those that prepare images."""
        victims = sorted(programs(self._folder).keys() - {self._process.pid})
        if victims:
            victim, step = self._draw.choice(victims), self._step()
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(victim, signal.SIGKILL)
                self.told.append(("one", step))
            wait(lambda: victim not in programs(self._folder))


def assert_same(one, other) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_same(one[name], other[name])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def log_of(folder: Path) -> list[tuple]:
    """Rows of the log without what a clock said."""
    compared = ("event", "step", "epoch", "loss", "grad_norm", "lr", "AP", "AP50")
    return [tuple(row.get(key) for key in compared) for row in read_rows(folder) if row["event"] != "restart"]


def assert_nothing_is_lost(tmp_path: Path, processes: int, steps: int, kills: int, capsys) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    assert launch(processes, steps, 0, whole).wait(300) == 0, (whole / "errors.txt").read_text()[-3000:]
    seed = time.time_ns() % 10_000
    run = Killed(killed, processes, steps, kills, seed)
    run.run()
    with capsys.disabled():
        print(f"\nseed {seed}, killed: " + ", ".join(f"{what} at {step}" for what, step in run.told))
    first, second = saved(whole), saved(killed)
    assert first["step"] == second["step"] == steps
    for name in ("model", "ema", "optimizer", "scheduler", "rng", "best", "matching", "noise_sums"):
        assert_same(first[name], second[name])
    assert log_of(whole / "run" / "metrics.jsonl") == log_of(killed / "run" / "metrics.jsonl")
    restarts = [row for row in read_rows(killed / "run" / "metrics.jsonl") if row["event"] == "restart"]
    assert restarts and all(row["message"].startswith("goes on from step ") for row in restarts)
    files = [{path.name for path in (folder / "run").iterdir()} for folder in (whole, killed)]
    assert files[0] == files[1], "also no temporary ones"
    wait(lambda: not programs(killed), 10)
    with hold(killed / "run"):
        pass


def test_five_kills_lose_nothing(tmp_path, capsys):
    assert_nothing_is_lost(tmp_path, 2, 80, 5, capsys)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("processes", "kills"), [(2, int(os.environ.get("DNDETR_KILLS", "20"))), (3, 4)])
def test_more_kills_and_processes_lose_nothing(tmp_path, processes, kills, capsys):
    """Of three processes, gradients are added up in an order that must not depend on when each was started."""
    assert_nothing_is_lost(tmp_path, processes, 16 * kills, kills, capsys)
