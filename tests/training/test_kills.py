"""``small`` on real data, killed at random moments again and again, loses nothing.

DNDETR_KILLS=10 runs the full version (sizes as in the preset); without it a few kills of a small run.
"""

import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import goldens
import pytest
import torch

from dndetr.runs.run_log import read_rows

DATA, WEIGHTS = goldens.SHARED / "data" / "bccd", goldens.SHARED / "weights" / "resnet18_imagenet_to_layer3.pt"
PROGRAM = [sys.executable, "-m", "dndetr.train"]
FULL = shlex.split(f"--init '{WEIGHTS}' --epochs 3 --max-steps-per-epoch 16 --checkpoint-every 2 --log-every 3")
SHORT = shlex.split(
    "--epochs 2 --max-steps-per-epoch 6 --checkpoint-every 2 --log-every 2 --images.canvas 32 32 "
    "--model.backbone.blocks 1 1 1 --model.backbone.planes 8 8 8 --model.width 32 --model.hidden 32 "
    "--model.decoder-layers 1 --model.queries 8"
)


def trained(folder: Path) -> dict:
    """Everything in a run's checkpoint that training goes on from."""
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    return {
        name: checkpoint[name] for name in ("model", "ema", "optimizer", "scheduler", "rng", "step", "epoch", "best")
    }


def assert_same(one, other, where: str = "") -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one:
            assert_same(one[name], other[name], f"{where}.{name}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for place, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{place}]")
    else:
        assert one == other, where


def log_of(folder: Path) -> list[tuple]:
    """Rows of the log without what a clock said."""
    compared = ("event", "step", "epoch", "loss", "grad_norm", "lr", "AP", "AP50", "APs")
    return [tuple(row.get(key) for key in compared) for row in read_rows(folder / "metrics.jsonl")]


@pytest.mark.slow
def test_small_on_real_data_loses_nothing_in_kills_at_random_moments(tmp_path, capsys):
    if not (DATA.is_dir() and WEIGHTS.is_file()):
        pytest.skip(f"no data at {DATA} (set DNDETR_SHARED)")
    kills = int(os.environ.get("DNDETR_KILLS", "0"))
    flags = ["--preset", "small", "--data", str(DATA), "--quiet", *(FULL if kills else SHORT)]
    environment = {**os.environ, "PYTHONPATH": str(goldens.ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    options = {"cwd": tmp_path, "env": environment, "stderr": subprocess.PIPE, "text": True}

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    begin, length = timed(flags, whole, options)
    seed = time.time_ns() % 10_000
    draw = random.Random(seed)
    moments, steps, finished = [], [], False
    for _ in range(kills or 3):
        # Each takes its share of the run forward, or none where it comes before the first step.
        moments.append(draw.uniform(0.8 * begin, begin + 1.7 * (length - begin) / (kills or 3)))
        done, finished = launch(flags, killed, options, moments[-1])
        if finished:
            break
        steps.append(done)
    if not finished:
        launch(flags, killed, options, None)
    with capsys.disabled():
        shown = ", ".join(f"{moment:.1f}" for moment in moments)
        print(f"\nkilled after {shown} of {length:.1f} s (seed {seed}), at saved steps {steps}")
    assert steps == sorted(steps), "a kill lost saved steps"
    assert_same(trained(whole), trained(killed))
    assert log_of(whole) == log_of(killed)
    names = [{path.name for path in folder.iterdir()} for folder in (whole, killed)]
    assert names[0] == names[1]


def timed(flags: list[str], folder: Path, options: dict) -> tuple[float, float]:
    """An undisturbed run -> the seconds until its first checkpoint, and until its end."""
    started, begin = time.monotonic(), None
    process = subprocess.Popen([*PROGRAM, *flags, "--output", folder.name], **options)
    while process.poll() is None:
        if begin is None and (folder / "checkpoint.pt").exists():
            begin = time.monotonic() - started
        time.sleep(0.01)
    assert process.returncode == 0, process.stderr.read()
    return begin, time.monotonic() - started


def launch(flags: list[str], folder: Path, options: dict, seconds: float | None) -> tuple[int, bool]:
    """Start or resume the run and kill it after so many seconds -> the saved step, and whether the run ended."""
    saved = (folder / "checkpoint.pt").exists()
    if not saved and folder.exists():
        shutil.rmtree(folder)  # killed before the first checkpoint: there is nothing to resume yet
    where = ["--resume", folder.name, "--quiet"] if saved else [*flags, "--output", folder.name]
    process = subprocess.Popen([*PROGRAM, *where], **options)
    try:
        _, error = process.communicate(timeout=seconds)
        assert process.returncode == 0, error
        finished = True
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        finished = False
    path = folder / "checkpoint.pt"
    return (torch.load(path, weights_only=True)["step"] if path.exists() else 0), finished
