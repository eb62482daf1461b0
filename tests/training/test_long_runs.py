"""A run of very many steps needs no more memory and no more files at its end than at its beginning.

DNDETR_STEPS=50000 with -m slow is the full version.
"""

import contextlib
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from short_runs import environment

from dndetr.runs.run_log import read_rows

STEPS = int(os.environ.get("DNDETR_STEPS", "5000"))
FLAGS = shlex.split(
    "--data shapes --train-images 500 --val-images 4 --batch-size 2 --workers 1 --quiet --log-every 10 "
    "--model.backbone.blocks 1 1 1 --model.backbone.planes 8 8 8 --model.width 32 --model.hidden 32 "
    "--model.decoder-layers 1 --model.queries 8 --epochs"
)


def processes(parent: int) -> list[Path]:
    """A process and those that it started."""
    started = [Path("/proc", number) for number in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    return [Path("/proc", str(parent)), *started]


def private_bytes(process: Path) -> int:
    rollup = (process / "smaps_rollup").read_text()
    return sum(int(size) for size in re.findall(r"Private_\w+:\s+(\d+) kB", rollup)) * 1024


def open_files(process: Path) -> tuple[int, int]:
    """How many files a process has open: those of batches that are on their way, and all others."""
    links = []
    for file in (process / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            links.append(os.readlink(file))
    ways = sum("/torch_" in link or link.startswith("socket:") for link in links)
    return ways, len(links) - ways


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_and_files_stay(tmp_path, capsys):
    command = [sys.executable, "-m", "dndetr.train", *FLAGS, str(STEPS // 250), "--output", "run"]
    errors = open(tmp_path / "errors.txt", "w")  # noqa: SIM115
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=errors)
    log, moments, seen = tmp_path / "run" / "metrics.jsonl", [STEPS * place // 10 for place in range(2, 10)], []
    try:
        for moment in moments:
            while not (log.exists() and any(row["step"] >= moment for row in read_rows(log)[-5:])):
                assert process.poll() is None, (tmp_path / "errors.txt").read_text()[-3000:]
                time.sleep(0.05)
            # Between two of its moments: an evaluation, a checkpoint or a picture is not what stays.
            samples = []
            for _ in range(15):
                those = processes(process.pid)
                ways, files = map(sum, zip(*map(open_files, those), strict=True))
                samples.append((sum(map(private_bytes, those)), ways, files, len(those)))
                time.sleep(0.1)
            seen.append(tuple(min(column) for column in zip(*samples, strict=True)))
    finally:
        process.kill()
        process.wait()
        errors.close()
    memory, ways, files, count = zip(*seen, strict=True)
    with capsys.disabled():
        megabytes = ", ".join(f"{size / 1e6:.1f}" for size in memory)
        print(f"\n{STEPS} steps: {megabytes} MB private, {files} files and {ways} of batches, in {count[0]} processes")
    assert set(count) == {3}, "the run, and a worker each for training and validation images"
    assert max(files) == min(files)
    assert max(ways) <= min(ways) + 24, "three batches of eight tensors may be on their way"
    # Within the first ten thousand steps the allocator still grows a little.
    assert max(memory) <= (1.02 if STEPS >= 50_000 else 1.05) * memory[0]
