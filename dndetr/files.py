"""Files that are either whole or not there."""

import contextlib
import errno
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

_ROWS = 10_000  # of a long list that are written at a time


def write_atomic(path: str | Path, content: bytes | Callable[[BinaryIO], None]) -> None:
    """Replace ``path`` in one step; whoever reads it sees the old file or the new one, never a part.

    content: the bytes, or a function that writes them to the open binary file it is given. When writing fails (a full
    disk, an interrupt) the old file stays, and the temporary one beside it is removed. OSError that names ``path``.
    """
    path = Path(path)
    with writing(path):
        _write_atomic(path, content)
    _sync_folder(path.parent)


def _write_atomic(path: Path, content: bytes | Callable[[BinaryIO], None]) -> None:
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
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def cache_folder() -> Path:
    """Where what can be made again is kept between runs: ``$XDG_CACHE_HOME/dndetr``, or that of ``~/.cache``.

    RuntimeError where there is no home.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (cache if cache.is_absolute() else Path.home() / ".cache") / "dndetr"


class Unwritten(OSError):
    """A file of ours that could not be written; the message names it, and the system's reason."""


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Within, ``path`` is written or made: an OSError becomes one that names it, which those of a full disk do not."""
    try:
        yield
    except Unwritten:
        raise
    except OSError as error:
        raise Unwritten(f"cannot write {path}: {error.strerror or error}") from error


def write_json_atomic(path: str | Path, value, indent: int | None = None) -> None:
    """``write_atomic`` for a JSON value; NaN and infinities are refused, since JSON has none."""
    separators = (",", ":") if indent is None else None
    text = json.dumps(value, indent=indent, separators=separators, allow_nan=False, ensure_ascii=False)
    # Bytes in a file's name that are no UTF-8 are escaped, as JSON has it.
    write_atomic(path, (text + "\n").encode(errors="backslashreplace"))


def write_json_rows(path: str | Path, rows: Sequence[dict]) -> None:
    """What ``write_json_atomic`` writes of a list of these rows, of which only some are in memory at a time."""

    def write(file: BinaryIO) -> None:
        file.write(b"[")
        for start in range(0, len(rows), _ROWS):
            some = list(rows[start : start + _ROWS])
            text = json.dumps(some, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
            file.write(("," * (start > 0) + text[1:-1]).encode(errors="backslashreplace"))
        file.write(b"]\n")

    write_atomic(path, write)


@contextlib.contextmanager
def making(path: str | Path, advice: str) -> Iterator[None]:
    """Within, ``path`` is made or opened for what the user asked for: an OSError says where, why and ``advice``."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # in words already
            raise
        above = Path(path).absolute().parents
        file = next((place for place in above if os.path.isfile(place)), None)
        place = next(place for place in above if os.path.isdir(place))
        why = f"{error.strerror}, in {place}" if file is None else f"{file} is a file"
        raise type(error)(f"{path} cannot be made: {why}: {advice}") from error


def demand_new_folder(path: str | Path) -> None:
    """FileExistsError where a folder that is to be made is there already, with something in it."""
    path = Path(path)
    with making(path, "give another folder"):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(f"{path} is already there and not empty; give a new folder")


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder that becomes ``path`` when the block has ended; where that fails, nothing of it stays.

    Errors are those of ``demand_new_folder``, and OSErrors that name ``path``.
    """
    demand_new_folder(path)
    real = Path(os.path.realpath(path))  # an empty folder may be replaced, but not a link to one
    above = [folder for folder in real.parents if not os.path.exists(folder)]
    with making(path, "give another folder"):
        real.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{real.name}-", dir=real.parent))
    try:
        with writing(path):
            yield unfinished
            unfinished.chmod(0o755)
            unfinished.replace(real)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        for folder in above:
            with contextlib.suppress(OSError):  # the error that is on its way says more
                folder.rmdir()
        raise


def demand_writable(folder: Path) -> None:
    """OSError where nothing can be written in a folder."""
    with tempfile.TemporaryFile(dir=folder):
        pass


def demand_file(path: Path, advice: str) -> None:
    """OSError, as ``making`` words it, where a file cannot be written, as far as that shows before the work is done."""
    with making(path, advice):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        demand_writable(path.parent)


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
