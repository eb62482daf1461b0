"""Files that are either whole or not there: atomic writing, and checkpoints on top of it."""

import json
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch


def write_atomic(path: str | Path, content: bytes | Callable[[BinaryIO], None]) -> None:
    """Replace ``path`` in one step; whoever reads it sees the old file or the new one, never a part.

    content: the bytes, or a function that writes them to the open binary file it is given. When writing fails (a full
    disk, an interrupt) the error is passed on, the old file stays, and the temporary one beside it is removed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_json_atomic(path: str | Path, value, indent: int | None = None) -> None:
    """``write_atomic`` for a JSON value; NaN and infinities are refused, since JSON has none."""
    separators = (",", ":") if indent is None else None
    text = json.dumps(value, indent=indent, separators=separators, allow_nan=False, ensure_ascii=False)
    write_atomic(path, (text + "\n").encode())


def save_checkpoint(path: str | Path, checkpoint: dict) -> None:
    """Write a checkpoint atomically; it may hold tensors, numbers, strings and containers of them, nothing else."""
    path = Path(path)

    def write(file: BinaryIO) -> None:
        guard = _ErrorKeeper(file)
        try:
            torch.save(checkpoint, guard)
        except RuntimeError as error:
            # torch's zip writer reports a failed write as an assertion about positions; the cause is what helps.
            raise guard.error or error from None

    try:
        write_atomic(path, write)
    except OSError as error:
        unchanged = "; the file that was there before is unchanged" if path.exists() else ""
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}{unchanged}") from error


def load_checkpoint(path: str | Path, needs: tuple[str, ...] = ("model",)) -> dict:
    """Read a checkpoint on the CPU, without running any code that the file may hold.

    path: a file, or a run folder, whose ``checkpoint.pt`` is meant; needs: keys without which the file is refused
    -> the dict that was saved. FileNotFoundError or ValueError, in one line, for what cannot be a checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "checkpoint.pt"
    if not path.exists():
        beside = sorted(file.name for file in path.parent.glob("*.pt")) if path.parent.is_dir() else []
        hint = f"that folder has {', '.join(beside)}" if beside else "check the path"
        raise FileNotFoundError(f"no checkpoint at {path}: {hint}")
    with open(path, "rb") as file:
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged files raise anything: zip, pickle, end-of-file and even OS errors
            reason = re.split(r"\. |\n", str(error).strip())[0][:120]
            size = path.stat().st_size
            raise ValueError(
                f"{path} cannot be read as a checkpoint ({size} bytes; {type(error).__name__}: {reason}): it "
                "is cut short or holds more than tensors and plain values: copy it again or use another file"
            ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint dict")
    missing = [key for key in needs if key not in checkpoint]
    if missing:
        found = ", ".join(str(key) for key in list(checkpoint)[:6]) or "nothing"
        raise ValueError(
            f"{path} is not a dndetr checkpoint: it has no {', '.join(repr(key) for key in missing)} (it starts with "
            f"{found}); weights from elsewhere are given with --init FILE"
        )
    return checkpoint


class _ErrorKeeper:
    """A file whose failed write is remembered, for writers that replace the error by one of their own."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.error: OSError | None = None

    def write(self, data) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut; not every system can open a folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
