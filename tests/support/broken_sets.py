"""Commands on data sets that are broken in some way: run quickly, and held to one plain line with nothing left behind.

A test module gives ``good_set``, a folder as it should be, and takes ``broken`` and ``command`` from conftest.py.
"""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from forks import forks
from goldens import ROOT

# As small as a detector gets: what is tested here is what happens before it.
FLAGS = [
    "--preset", "small", "--epochs", "1", "--max-steps-per-epoch", "1", "--batch-size", "2", "--device", "cpu",
    "--images.canvas", "64", "64", "--model.width", "16", "--model.hidden", "16", "--model.queries", "4",
    "--model.encoder-layers", "1", "--model.decoder-layers", "1", "--denoising.groups", "1",
]  # fmt: skip

Command = Callable[..., tuple[int, str, str]]


@contextlib.contextmanager
def forked_commands() -> Iterator[Command]:
    """``command(folder, module, *arguments)`` runs ``python -m module`` in a folder -> status, stdout, stderr."""
    imports = "import runpy, dndetr.training.trainer, dndetr.data.training, dndetr.pictures.samples"

    def command(folder: Path, module: str, *arguments: str) -> tuple[int, str, str]:
        line = f"import runpy, sys\nsys.argv = {[module, *arguments]}\n"
        line += "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
        return run(line, folder, XDG_CACHE_HOME=str(folder / "cache"))

    with forks(imports, _environment()) as run:
        yield command


def train(folder: Path, data: Path, *flags: str) -> subprocess.CompletedProcess:
    """A training run in a process of its own, as small as a detector gets."""
    environment = _environment() | {"XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, "-m", "dndetr.train", *FLAGS, "--data", str(data), *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


def assert_training_stops(command: Command, data: Path, folder: Path, where: str, what: str, *flags: str) -> None:
    """Training ends with one line that has both texts and names the data set, before anything is written."""
    status, out, error = command(folder, "dndetr.train", *FLAGS, "--data", str(data), *flags)
    assert (status, out) == (1, "")
    assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n")
    assert str(data) in error and where in error and what in error
    assert {path.name for path in folder.iterdir()} <= {"cache", "stdout", "stderr"}


def assert_check_lists(command: Command, data: Path, folder: Path, where: str, what: str, *flags: str) -> None:
    """The check lists a problem that has both texts, and ends with the number of problems."""
    status, out, error = command(folder, "dndetr.check_data", str(data), *flags)
    assert status == 1 and re.fullmatch(r"error: [^\n]+: \d+ problems? \([^\n]+\)\n", error)
    assert any(where in line and what in line for line in out.splitlines() if line.startswith("problem: "))


def cut(name: str, keep: float) -> Callable[[Path], None]:
    """Cuts off a file: a share of it stays."""

    def apply(root: Path):
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[: int(len(content) * keep)])

    return apply


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "40"}
