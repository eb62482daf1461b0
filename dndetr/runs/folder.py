"""Where a run is written: a folder of its own, held by one process at a time."""

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from ..files import demand_writable, making


def new_run_folder(name: str, root: str | Path = "runs") -> Path:
    """Make ``root/name-1``, ``root/name-2``, ...: the number above all in use, whoever else is starting."""
    root = Path(root)
    with making(root / name, "name another place with --output"):
        return _next_folder(name, root)


def _next_folder(name: str, root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    taken = [entry.name.removeprefix(f"{name}-") for entry in root.glob(f"{name}-*")]
    number = max((int(tail) for tail in taken if tail.isascii() and tail.isdigit()), default=0)
    while True:
        number += 1
        folder = root / f"{name}-{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder


@contextlib.contextmanager
def output_folder(output: str | Path | None, name: str, root: str | Path = "runs") -> Iterator[Path]:
    """The folder that the user asked for, or else a new one, ``root/name-1`` or the next.

    If the block fails, the folder, and those above it, are removed where they are new and nothing is in them.
    """
    if output is None:
        folder = new_run_folder(name, root)
        made = [folder]  # not the root: somebody else may be about to use it
    else:
        folder = Path(output)
        made = [path for path in (folder, *folder.parents) if not os.path.exists(path)]  # which does not raise
    try:
        yield folder if output is None else claim_output(folder)
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):  # the error that is on its way says more
                path.rmdir()
        raise


def claim_output(path: str | Path) -> Path:
    """Make the folder a user asked for; FileExistsError if anything is in it already.

    What a run that was killed in its first moments leaves, half a checkpoint, is nothing.
    """
    path = Path(path)
    with making(path, "give another --output"):
        _claim(path)
    return path


def _claim(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"--output {path} is a file: give a new folder")
    if path.is_dir() and any(not fnmatch(entry.name, ".*.tmp") for entry in path.iterdir()):
        advice = "choose another --output"
        if (path / "checkpoint.pt").exists():
            advice += f", or continue that run with --resume {path}"
        raise FileExistsError(f"--output {path} exists and is not empty, and runs are never overwritten: {advice}")
    path.mkdir(parents=True, exist_ok=True)
    demand_writable(path)


_held: set[int] = set()


def _let_go() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


# A worker process may outlive its parent for seconds, and would hold the folder as long.
os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def hold(folder: str | Path, seconds: float = 0) -> Iterator[None]:
    """Within, no other process can hold the folder; ValueError if one does now. A process that dies lets go.

    seconds: how long to wait for it to do so.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    _held.add(descriptor)
    try:
        if not _locked(descriptor):
            taken = f"{folder} is being trained by another process"
            if seconds:
                print(f"{taken}: waiting for its end, for up to {seconds:g} s", file=sys.stderr)
            _wait_for(lambda: _locked(descriptor), seconds, f"{taken}: wait for its end, or stop it")
        yield
    finally:
        if descriptor in _held:
            _held.remove(descriptor)
            os.close(descriptor)


def _wait_for(done: Callable[[], bool], seconds: float, otherwise: str) -> None:
    """ValueError, in these words, where it is not done within so many seconds."""
    until = time.monotonic() + seconds
    while not done():
        if time.monotonic() >= until:
            raise ValueError(otherwise)
        time.sleep(0.1)


def _locked(descriptor: int) -> bool:
    """Whether this process has the lock now, as it has where the file system knows none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
