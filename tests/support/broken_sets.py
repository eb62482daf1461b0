"""Commands on data sets that are broken in some way: run quickly, and held to one plain line with nothing left behind.

A test module gives ``good_set``, a folder as it should be, and takes ``broken`` and ``command`` from conftest.py.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from goldens import ROOT

# As small as a detector gets: what is tested here is what happens before it.
FLAGS = [
    "--preset", "small", "--epochs", "1", "--max-steps-per-epoch", "1", "--batch-size", "2", "--device", "cpu",
    "--images.canvas", "64", "64", "--model.width", "16", "--model.hidden", "16", "--model.queries", "4",
    "--model.encoder-layers", "1", "--model.decoder-layers", "1", "--denoising.groups", "1",
]  # fmt: skip

# Importing torch takes longer than refusing a data set: each line of input is run as the command line would run it, in
# a fork of a process that has done the slow imports.
FORKS = """
import json, os, runpy, sys, traceback
import dndetr.training.trainer, dndetr.data.training, dndetr.pictures.samples
for line in sys.stdin:
    sys.argv, folder, cache = json.loads(line)
    if os.fork() == 0:
        os.chdir(folder)
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        os.environ["XDG_CACHE_HOME"] = cache
        try:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # taking the interpreter down takes longer than all the rest
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""

Command = Callable[..., tuple[int, str, str]]


@contextlib.contextmanager
def forked_commands() -> Iterator[Command]:
    """``command(folder, module, *arguments)`` runs ``python -m module`` in a folder -> status, stdout, stderr."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}

    def run(folder: Path, module: str, *arguments: str) -> tuple[int, str, str]:
        process.stdin.write(json.dumps([[module, *arguments], str(folder), str(folder / "cache")]) + "\n")
        process.stdin.flush()
        status = int(process.stdout.readline())
        return status, (folder / "stdout").read_text(), (folder / "stderr").read_text()

    with subprocess.Popen([sys.executable, "-c", FORKS], env=_environment(), **pipes) as process:
        yield run
        process.stdin.close()


def train(folder: Path, data: Path, *flags: str) -> subprocess.CompletedProcess:
    """A training run in a process of its own, as small as a detector gets."""
    environment = _environment() | {"XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, "-m", "dndetr.train", *FLAGS, "--data", str(data), *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=120)


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
