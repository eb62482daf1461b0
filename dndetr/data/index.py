"""Records of large annotation files in mapped arrays, kept between runs and shared by all processes of a machine.

An index is a file in the cache folder, named after its annotation file's path and stamp. Of several processes that want
one that is not there, one makes it while the others wait. Where it cannot be written, records are arrays in memory.
"""

import contextlib
import fcntl
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from ..files import Unwritten, cache_folder, write_atomic, writing
from .columns import Names
from .errors import DataError
from .mapped_file import ArrayWriter, Damaged, in_use, map_arrays
from .records import Objects, Records, by_image, image_order
from .remembered import stamp
from .spool import in_order
from .summary import Summary, summarise

SMALLEST = 8 << 20
"""Bytes of an annotation file from which on it is worth an index."""
_VERSION = 1  # of what is in one
_ENDING = ".arrays"

Build = Callable[[Path | None], Records]
"""Reads the records, their objects in any order of images, with room for what does not fit into memory in a folder."""


def indexed(split: Records, build: Build) -> Records:
    """The records of the split's file, from their index, which is made where there is none.

    Those with problems have none. split: with everything that is not read from the file.
    """
    before = stamp(split.file.stat())
    key = hashlib.blake2b(os.fsencode(split.file.resolve()), digest_size=8).hexdigest()
    version = hashlib.blake2b(repr(before).encode(), digest_size=8).hexdigest()
    name = f"{_VERSION}-{key}-{version}{_ENDING}"
    try:
        with writing("the cache folder"):
            path = _folder() / name
        if (known := _recall(path, split)) is not None:
            return known
        limit = _limit()
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.parent / f"{key}.lock"):
            if (known := _recall(path, split)) is not None:  # another process has made it
                return known
            _tidy(path, key)
            records = build(path.parent)
            if stamp(split.file.stat()) != before:
                raise DataError(f"{split.file}: was changed while it was read; start again")
            if records.problems:
                return records
            write_atomic(path, lambda file: _write(ArrayWriter(file), records))
            _make_room(path, limit)
            with writing(path):
                return _from(path, split)
    except Unwritten as error:
        advice = "set XDG_CACHE_HOME to a folder that has room"
        warnings.warn(f"annotations are kept in memory, once for each process, since {error}; {advice}", stacklevel=2)
    records = build(None)
    return replace(records, objects=by_image(records.objects))


def _folder() -> Path:
    try:
        return cache_folder() / "index"
    except RuntimeError as error:
        raise OSError(str(error)) from error


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Within, no other process is here; the system ends this with the process, however that ends."""
    with writing(path):
        file = open(path, "ab")  # noqa: SIM115 (it is closed below)
    with file:
        with writing(path):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(writer: ArrayWriter, records: Records) -> None:
    names = records.names if isinstance(records.names, Names) else Names.of(records.names)
    order = image_order(records.objects.image)
    for name, column in zip(Objects._fields, records.objects, strict=True):
        writer.add(f"objects.{name}", in_order(column, order), column.dtype, column.shape[1:])
    objects = Objects(*(writer.so_far()[f"objects.{name}"] for name in Objects._fields))
    summary = summarise(records.sizes, objects, len(records.classes))
    arrays = {"ids": records.ids, "sizes": records.sizes, "content": names.content, "ends": names.starts}
    arrays |= {name: getattr(summary, name) for name in ("starts", "counts", "classes")}
    for name, array in arrays.items():
        writer.add(name, [array], array.dtype, array.shape[1:])
    words = {"classes": records.classes, "remarks": records.remarks, "summary": summary.remarks}
    writer.finish(words)


def _recall(path: Path, split: Records) -> Records | None:
    """The split with what an index holds; None where there is none, or none that can be read."""
    try:
        records = _from(path, split)
    except (OSError, Damaged):
        return None
    with contextlib.suppress(OSError):  # of a folder that is only read
        os.utime(path)  # when it was used last
    return records


def _from(path: Path, split: Records) -> Records:
    arrays, words = map_arrays(path)
    return replace(
        split,
        classes=[(number, name) for number, name in words["classes"]],
        names=Names(arrays["content"], arrays["ends"]),
        ids=arrays["ids"],
        sizes=arrays["sizes"],
        objects=Objects(*(arrays[f"objects.{name}"] for name in Objects._fields)),
        remarks=words["remarks"],
        known=Summary(arrays["starts"], arrays["counts"], arrays["classes"], words["summary"]),
    )


def _tidy(path: Path, key: str) -> None:
    """Removes what is left of the same annotations as they were, of a build that did not end, and of other versions."""
    for other in path.parent.iterdir():
        unfinished = other.name.startswith(f".{_VERSION}-{key}-")
        old = other.name.endswith(_ENDING) and not other.name.startswith(f"{_VERSION}-")
        same = other.name.startswith(f"{_VERSION}-{key}-")
        if unfinished or old or same:
            _remove(other)


def _limit() -> float:
    """Bytes that all indexes may take."""
    text = os.environ.get("DNDETR_INDEX_GB", "20")
    try:
        return float(text) * 1e9
    except ValueError:
        raise ValueError(f"DNDETR_INDEX_GB={text}: give a number of gigabytes, such as 20") from None


def _make_room(path: Path, limit: float) -> None:
    """Removes those that were not used for longest, until the others are within the limit."""
    found = []
    for other in path.parent.glob(f"*{_ENDING}"):
        with contextlib.suppress(OSError):
            found.append((other.stat().st_mtime_ns, other.stat().st_size, other))
    total = sum(size for _, size, _ in found)
    for _, size, other in sorted(found):
        if total > limit and other != path and _remove(other):
            total -= size


def _remove(path: Path) -> bool:
    """Whether a file that nobody uses is removed."""
    with contextlib.suppress(OSError):
        if not in_use(path):
            path.unlink()
            return True
    return False
