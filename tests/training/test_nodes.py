"""Two machines, played by two launchers that meet over the loopback: the run is the one of a single machine."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import goldens
import pytest
import torch
from short_runs import SMALL, TORCHRUN, environment

from dndetr.runs.run_log import read_rows

SCRIPT = str(goldens.ROOT / "tests" / "support" / "train_as_one_of_two.py")
RUN = [*SMALL, "--data", "shapes", "--epochs", "2", "--batch-size", "2", "--train-images", "40", "--val-images", "6"]
RUN += ["--checkpoint-every", "1", "--log-every", "2", "--quiet", "--resume", "auto", "--output", "run"]

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def machine(port: int, folder: Path, *program: str) -> subprocess.Popen:
    """One of two launchers with a process each."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    launcher += ["--rdzv-id", "7", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
    with open(folder / "errors.txt", "a") as errors:
        # Otherwise a machine that comes later never hears where the first process is (docs/several-gpus.md).
        own = environment() | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        options = {"env": own, "cwd": folder, "stdout": errors, "stderr": errors}
        return subprocess.Popen([*launcher, "--max-restarts", "5", *program], **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run of a single launcher with both processes."""
    folder = tmp_path_factory.mktemp("whole")
    command = [*TORCHRUN, "-m", "dndetr.train", *RUN]
    done = subprocess.run(command, env=environment(), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def numbers(folder: Path) -> list[tuple]:
    compared = ("event", "step", "loss", "grad_norm", "AP")
    rows = read_rows(folder / "run" / "metrics.jsonl")
    return [tuple(row.get(key) for key in compared) for row in rows if row["event"] != "restart"]


def assert_same_run(folder: Path, whole: Path) -> None:
    ends = [torch.load(path / "run" / "checkpoint.pt", weights_only=True) for path in (folder, whole)]
    for part in ("model", "ema"):
        for name, value in ends[0][part].items():
            assert torch.equal(value, ends[1][part][name]), name
    assert numbers(folder) == numbers(whole)


@pytest.mark.parametrize("program", [["-m", "dndetr.train"], [SCRIPT, "straggle"]], ids=["alike", "one is slow"])
def test_two_machines_train_as_one(tmp_path, whole, program):
    port = free_port()
    both = [machine(port, tmp_path, *program, *RUN) for _ in range(2)]
    assert [process.wait(300) for process in both] == [0, 0], (tmp_path / "errors.txt").read_text()[-3000:]
    assert_same_run(tmp_path, whole)


def test_a_machine_that_is_lost_and_comes_back(tmp_path, whole):
    port = free_port()
    first = machine(port, tmp_path, "-m", "dndetr.train", *RUN)
    time.sleep(1)  # so that it is the one that the others meet at
    second = machine(port, tmp_path, "-m", "dndetr.train", *RUN)
    log = tmp_path / "run" / "metrics.jsonl"
    end = time.monotonic() + 120
    while not (log.exists() and read_rows(log)):
        assert time.monotonic() < end and first.poll() is None, (tmp_path / "errors.txt").read_text()[-3000:]
        time.sleep(0.02)
    second.kill()
    second.wait()
    time.sleep(20)  # torchrun misses a machine after 15, and until then would count on it once more
    second = machine(port, tmp_path, "-m", "dndetr.train", *RUN)
    assert [process.wait(400) for process in (first, second)] == [0, 0], (tmp_path / "errors.txt").read_text()[-3000:]
    assert any(row["event"] == "restart" for row in read_rows(log))
    assert_same_run(tmp_path, whole)
