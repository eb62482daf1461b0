"""The run folder: where it comes from, and its log of one JSON object a line."""

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from .checkpoint import write_atomic


def new_run_folder(name: str, root: str | Path = "runs") -> Path:
    """Make ``root/name-1``, ``root/name-2``, ...: the number above all in use, whoever else is starting."""
    root = Path(root)
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


def claim_output(path: str | Path) -> Path:
    """Make the folder a user asked for; FileExistsError if anything is in it already.

    What a run that was killed in its first moments leaves, half a checkpoint, is nothing.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"--output {path} is a file: give a new folder")
    if path.is_dir() and any(not fnmatch(entry.name, ".*.tmp") for entry in path.iterdir()):
        advice = "choose another --output"
        if (path / "checkpoint.pt").exists():
            advice += f", or continue that run with --resume {path}"
        raise FileExistsError(f"--output {path} exists and is not empty, and runs are never overwritten: {advice}")
    path.mkdir(parents=True, exist_ok=True)
    return path


_held: set[int] = set()


def _let_go() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


# A worker process may outlive its parent for seconds, and would hold the folder as long.
os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def hold(folder: str | Path) -> Iterator[None]:
    """Within, no other process can hold the folder; ValueError if one does now. A process that dies lets go."""
    descriptor = os.open(folder, os.O_RDONLY)
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is being trained by another process: wait for its end, or stop it") from None
        except OSError:
            pass  # not every file system has locks
        yield
    finally:
        if descriptor in _held:
            _held.remove(descriptor)
            os.close(descriptor)


class RunLog:
    """Appends rows to ``metrics.jsonl``; each has ``event`` and ``step``, and is on the disk when ``write`` returns."""

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / "metrics.jsonl"
        if self.path.exists():
            self._drop_half_written_line()

    def write(self, event: str, step: int, **fields) -> dict:
        """Append one row -> that row; NaN and infinities become null, numpy values and host tensors plain numbers."""
        row = _plain({"event": event, "step": step, **fields})
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n")
        return row

    def rows(self, event: str | None = None) -> list[dict]:
        """All rows so far, or those of one event."""
        return [row for row in read_rows(self.path) if event in (None, row["event"])]

    def truncate_to(self, step: int) -> None:
        """Forget what came after ``step``, and that the run ended: it is about to be continued from there."""
        kept = [row for row in read_rows(self.path) if row["step"] <= step and row["event"] != "end"]
        write_atomic(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept).encode())

    def _drop_half_written_line(self) -> None:
        """A killed process may leave half a row; the next row must not be glued to it."""
        data = self.path.read_bytes()
        if data and not data.endswith(b"\n"):
            write_atomic(self.path, data[: data.rfind(b"\n") + 1])


def read_rows(path: str | Path) -> list[dict]:
    """Rows of a ``metrics.jsonl``; a half-written last line, as a killed run leaves it, is passed over."""
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    *lines, _half_written = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not JSON ({error}): remove that line") from None
    return rows


def _plain(value):
    """``value`` in JSON's types."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
