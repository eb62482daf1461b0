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
from typing import NamedTuple

from ..files import Unwritten, cache_folder, write_atomic, writing
from .columns import Names
from .errors import DataError
from .mapped_file import ArrayWriter, Damaged, in_use, map_arrays
from .records import Objects, Records, by_image, image_order
from .remembered import stamp
from .spool import in_order
from .summary import Summary, summarise
from .verified import Lists, Verified

SMALLEST = 8 << 20
"""Bytes of an annotation file from which on it is worth an index."""
_VERSION = 2  # of what is in one
_ENDING = ".arrays"
_LISTS = ("absent", "partial")


class Read(NamedTuple):
    """Records as they were read, their objects in any order of images; layout: of the folders that they depend on, as
    a text that changes with it, None where they are of the annotation file alone."""

    records: Records
    layout: str | None = None


Build = Callable[[Path | None], Read]
"""Reads the records, with room for what does not fit into memory in a folder."""


def indexed(split: Records, build: Build, layout: Callable[[], str] = lambda: "") -> Records:
    """The records of the split's file, from their index, which is made where there is none.

    Those with problems have none. split: with everything that is not read from the file; layout: that of the folders
    now, asked only where the records depend on it.
    """
    before = stamp(split.file.stat())
    key = hashlib.blake2b(os.fsencode(split.file.resolve()), digest_size=8).hexdigest()
    version = hashlib.blake2b(repr(before).encode(), digest_size=8).hexdigest()
    name = f"{_VERSION}-{key}-{version}{_ENDING}"
    try:
        with writing("the cache folder"):
            path = _folder() / name
        if (known := _recall(path, split, layout)) is not None:
            return known
        limit = _limit()
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.parent / f"{key}.lock"):
            if (known := _recall(path, split, layout)) is not None:  # another process has made it
                return known
            _tidy(path, key)
            read = build(path.parent)
            records = read.records
            if stamp(split.file.stat()) != before:
                raise DataError(f"{split.file}: was changed while it was read; start again")
            if records.problems:
                return records
            write_atomic(path, lambda file: _write(ArrayWriter(file), read))
            _make_room(path, limit)
            with writing(path):
                return _from(path, split, None)
    except Unwritten as error:
        advice = "set XDG_CACHE_HOME to a folder that has room"
        warnings.warn(f"annotations are kept in memory, once for each process, since {error}; {advice}", stacklevel=2)
    records = build(None).records
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


def _write(writer: ArrayWriter, read: Read) -> None:
    records = read.records
    names = records.names if isinstance(records.names, Names) else Names.of(records.names)
    order = image_order(records.objects.image)
    for name, column in zip(Objects._fields, records.objects, strict=True):
        writer.add(f"objects.{name}", in_order(column, order), column.dtype, column.shape[1:])
    objects = Objects(*(writer.so_far()[f"objects.{name}"] for name in Objects._fields))
    summary = summarise(records.sizes, objects, len(records.classes))
    arrays = {"ids": records.ids, "sizes": records.sizes, "content": names.content, "ends": names.starts}
    arrays |= {name: getattr(summary, name) for name in ("starts", "counts", "classes")}
    if records.verified is not None:
        arrays["verified.stated"] = records.verified.stated
        for name in _LISTS:
            lists = getattr(records.verified, name)
            arrays |= {f"verified.{name}.labels": lists.labels, f"verified.{name}.starts": lists.starts}
    for name, array in arrays.items():
        writer.add(name, [array], array.dtype, array.shape[1:])
    words = {"classes": records.classes, "remarks": records.remarks, "summary": summary.remarks}
    writer.finish(words | {"layout": read.layout})


def _recall(path: Path, split: Records, layout: Callable[[], str]) -> Records | None:
    """The split with what an index holds; None where there is none, none that can be read, or one of other folders."""
    try:
        records = _from(path, split, layout)
    except (OSError, Damaged):
        return None
    with contextlib.suppress(OSError):  # of a folder that is only read
        os.utime(path)  # when it was used last
    return records


def _from(path: Path, split: Records, layout: Callable[[], str] | None) -> Records:
    """Damaged where the folders have changed; layout: that of these, None where it is known to be the same."""
    arrays, words = map_arrays(path)
    if layout is not None and words["layout"] not in (None, layout()):
        raise Damaged("of images that were elsewhere")
    verified = None
    if "verified.stated" in arrays:
        lists = (Lists(*(arrays[f"verified.{name}.{part}"] for part in Lists._fields)) for name in _LISTS)
        verified = Verified(arrays["verified.stated"], *lists)
    return replace(
        split,
        classes=[(number, name) for number, name in words["classes"]],
        names=Names(arrays["content"], arrays["ends"]),
        ids=arrays["ids"],
        sizes=arrays["sizes"],
        objects=Objects(*(arrays[f"objects.{name}"] for name in Objects._fields)),
        remarks=words["remarks"],
        verified=verified,
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
    with contextlib.suppress(ValueError):
        if 0 <= (limit := float(text)) < float("inf"):
            return limit * 1e9
    raise ValueError(f"DNDETR_INDEX_GB={text}: give a number of gigabytes, such as 20")


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
