"""Image files against their annotations, before anything is trained: there, whole, readable, and of the stated size.

Files are judged by their first and last bytes, which takes seconds for 100,000 of them, or decoded. Those found good
are remembered by name, size and times in ``$XDG_CACHE_HOME/dndetr`` (default ``~/.cache``) and not opened again until
they change; what was wrong is always looked at anew. Of large splits no file is remembered, but the folders that they
lie in (``known_folders``). Whatever can be said of the annotations alone is in ``formats``.
"""

import os
import stat
import struct
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import DataError, UnreadableImage
from ..file_names import MissingFiles
from ..folder_dataset import FolderDataset
from ..image import KEPT, TURNED, UNDECIDED, read_header, read_turned
from ..image_header import jpeg_frame
from ..known_folders import LARGE, KnownFolders
from ..records import Problem, Records, raise_problems
from ..remembered import STAMP, Remembered, stamp
from .fingerprints import LENGTH, fingerprint

MISSING, UNREADABLE, SIZE = "missing file", "unreadable file", "file size"

_CHUNK = 256  # files that a thread takes at a time
_TOGETHER = 64 * _CHUNK  # that wait for threads
_HEAD, _TAIL = 4096, 64  # bytes; a JPEG's sizes may lie further on, behind its metadata
# A split of up to so many pixels is decoded before training: seconds, once. Of larger ones headers and ends are read.
_DECODED_PIXELS = 200_000_000
_PNG_END = b"IEND\xaeB`\x82"
_TURNS = (None, TURNED, KEPT, UNDECIDED)


class FileProblem(NamedTuple):
    """What is wrong with the file of an image: its place in the list, MISSING, UNREADABLE or SIZE, and a sentence."""

    index: int
    kind: str
    message: str


class _Good(NamedTuple):
    """A file that is as it should be: where it was decoded, what became of its orientation, and its fingerprint."""

    turn: str | None = None
    fingerprint: bytes = b""


def check_files(dataset: FolderDataset, skip_unreadable: bool = False) -> list[str]:
    """Raises a DataError with the first thing wrong with the files of a split -> remarks on the split to show once.

    skip_unreadable: leave out the images that cannot be decoded instead.
    """
    records, pixels = dataset.records, dataset.records.sizes.prod(axis=1).sum()
    decode = skip_unreadable or pixels <= _DECODED_PIXELS
    many = len(records) >= LARGE and not decode
    problems = _problems_of_many(records) if many else file_problems(records, decode)
    remarks = [f"{records.name}: {', '.join(dataset.remarks)}"] if dataset.remarks else []
    if not skip_unreadable:
        raise_problems(told(problems), records)
        return remarks
    unreadable = [problem for problem in problems if problem.kind == UNREADABLE]
    raise_problems(told(problem for problem in problems if problem.kind != UNREADABLE), records)
    if len(unreadable) == len(dataset):
        raise DataError(f"{records.file}: not one image can be read; {unreadable[0].message}")
    if unreadable:
        others = f" (all: python -m dndetr.check_data {records.root})" if len(unreadable) > 1 else ""
        remarks.append(
            f"{records.name}: {len(unreadable):,} of {len(dataset):,} images cannot be read and are skipped; "
            f"the first: {unreadable[0].message}{others}"
        )
        dataset.leave_out(problem.index for problem in unreadable)
    return remarks


def told(problems: Iterable[FileProblem]) -> list[Problem]:
    """The same as problems of their split."""
    return [Problem(problem.kind, problem.message) for problem in problems]


def turn_remarks(turns: Counter[str]) -> list[str]:
    """Who turned the pictures, in words; turns: as ``file_problems`` counts them."""
    whats = {
        TURNED: "turned upright by EXIF data",
        KEPT: "kept as stored against EXIF data, since width and height say so",
        UNDECIDED: "turned upright by EXIF data, though width and height do not say whether boxes are: look at some",
    }
    return [
        f"{turns[turn]:,} {'image' if turns[turn] == 1 else 'images'} {what}"
        for turn, what in whats.items()
        if turns[turn]
    ]


def file_problems(
    records: Records,
    decode: bool = False,
    progress: Callable[[int], None] = lambda files: None,
    turns: Counter[str] | None = None,
    fingerprints: dict[int, bytes] | None = None,
) -> list[FileProblem]:
    """What is wrong with the files of a split's images, in their order.

    decode: also decode every file that is not known to be good. progress: called with the numbers of files done.
    turns: where files are decoded, counts the good ones that are TURNED, KEPT or UNDECIDED (``image.read_turned``).
    fingerprints: where files are decoded, takes those of the good ones, by their places in the list.
    """
    stamps, problems = _stamps(records)
    names, there = records.names, stamps[:, -STAMP:].any(axis=1)
    memory = _memory(records, decode)
    places = memory.places(names, stamps)
    columns = {"turns": np.zeros(len(names), np.uint8), "fingerprints": np.zeros((len(names), LENGTH), np.uint8)}
    good = places >= 0
    if not decode:
        columns = {}
        good |= _memory(records, decoded=True).places(names, stamps) >= 0
    elif good.any():
        for name, column in columns.items():
            column[good] = memory.columns[name][places[good]]
    waiting = np.flatnonzero(there & ~good).tolist()
    progress(len(records) - len(waiting))

    def judge(chunk: list[int]) -> list[DataError | _Good]:
        return [_verdict(str(records.path(index)), tuple(records.sizes[index].tolist()), decode) for index in chunk]

    chunks = [waiting[at : at + _CHUNK] for at in range(0, len(waiting), _CHUNK)]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        for chunk, verdicts in zip(chunks, threads.map(judge, chunks), strict=True):
            for index, verdict in zip(chunk, verdicts, strict=True):
                if isinstance(verdict, DataError):
                    problems.append(_told_of(records, index, verdict))
                    continue
                good[index] = True
                if decode:
                    columns["turns"][index] = _TURNS.index(verdict.turn)
                    columns["fingerprints"][index] = np.frombuffer(verdict.fingerprint, np.uint8)
            progress(len(chunk))
    if good[waiting].any():
        kept = [names[index] for index in np.flatnonzero(good).tolist()]
        memory.keep(kept, stamps[good], {name: column[good] for name, column in columns.items()})
    if turns is not None and decode:
        turns.update(filter(None, (_TURNS[turn] for turn in columns["turns"][good].tolist())))
    if fingerprints is not None and decode:
        fingerprints.update(
            (index, columns["fingerprints"][index].tobytes()) for index in np.flatnonzero(good).tolist()
        )
    return sorted(problems)


def _problems_of_many(records: Records) -> list[FileProblem]:
    """What is wrong with the files of a large split, of which a sample is looked at where nothing has changed.

    Nothing is kept of each file, which memory would have to hold.
    """
    known, missing, folder = KnownFolders(records, "headers"), MissingFiles(records), str(records.folder)

    def judge(chunk: list[tuple[int, str]]) -> list[FileProblem]:
        found = []
        for index, name in chunk:
            path = os.path.join(folder, name)
            _, problem = _status(records, index, path, missing)
            if problem is None and isinstance(
                verdict := _verdict(path, tuple(records.sizes[index].tolist()), False), DataError
            ):
                problem = _told_of(records, index, verdict)
            found += [] if problem is None else [problem]
        return found

    images, problems = records.named(known.to_look_at()), []
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        while some := list(islice(images, _TOGETHER)):
            chunks = [some[at : at + _CHUNK] for at in range(0, len(some), _CHUNK)]
            for found in threads.map(judge, chunks):
                problems += found
    if not problems:
        known.keep()
    return problems


def _told_of(records: Records, index: int, error: DataError) -> FileProblem:
    kind = UNREADABLE if isinstance(error, UnreadableImage) else SIZE
    return FileProblem(index, kind, f"{records.called(index)}{error}")


def _status(
    records: Records, index: int, path: str, missing: MissingFiles
) -> tuple[os.stat_result | None, FileProblem | None]:
    """A file's status, or why it is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None, FileProblem(index, MISSING, missing.sentence(index))
    if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait for its other end
        what = f"{records.called(index)}{path}: is no file; put the image there"
        return None, FileProblem(index, UNREADABLE, what)
    return status, None


def _stamps(records: Records) -> tuple[np.ndarray, list[FileProblem]]:
    """What changes with each file, and with what the annotations say of it [n, 2 + STAMP]; and those that are no files.

    The stamp of these is zero.
    """
    missing, folder = MissingFiles(records), str(records.folder)
    found: list[int] = []
    problems = []
    for index, name in enumerate(records.names):
        status, problem = _status(records, index, os.path.join(folder, name), missing)
        problems += [] if problem is None else [problem]
        found += stamp(status)
    return np.concatenate((records.sizes, np.array(found, np.int64).reshape(-1, STAMP)), axis=1), problems


def _verdict(path: str, size: tuple[int, int], decode: bool) -> DataError | _Good:
    """What is wrong with a file whose annotation states this (height, width), or what there is to know of it."""
    try:
        found = _examine(path)
        if decode:
            picture, turn = read_turned(Path(path), size)
            return _Good(turn, fingerprint(picture))
        if found != size:
            # Another size, turned by its metadata, or a kind of file that is not known here.
            read_header(Path(path), size)
    except DataError as error:
        return error
    except OSError as error:
        return UnreadableImage(f"{path}: cannot be read ({error.strerror or error}); replace it")
    return _Good()


def _examine(path: str) -> tuple[int, int] | None:
    """(height, width) as stored in a JPEG or PNG file, None for others; UnreadableImage where its end is missing."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        head = os.pread(descriptor, _HEAD, 0)
        length = os.fstat(descriptor).st_size
        tail = os.pread(descriptor, _TAIL, max(0, length - _TAIL))
        size, whole = None, True
        if head.startswith(b"\xff\xd8"):
            size, scan, _ = jpeg_frame(descriptor, head)
            # Some programs write on behind the picture. An end marker before the scan is that of a thumbnail.
            whole = tail.endswith(b"\xff\xd9") or b"\xff\xd9" in os.pread(descriptor, length, scan)
        elif head.startswith(b"\x89PNG\r\n\x1a\n"):
            if head[12:16] == b"IHDR" and len(head) >= 24:
                width, height = struct.unpack(">II", head[16:24])
                size = height, width
            whole = _PNG_END in tail or _PNG_END in os.pread(descriptor, length, 0)
        elif head.startswith(b"RIFF") and head[8:12] == b"WEBP":
            whole = length >= 8 + int.from_bytes(head[4:8], "little")
    finally:
        os.close(descriptor)
    if not whole:
        raise UnreadableImage(f"{path}: the file is cut off, its end is missing; replace it")
    return size


def _memory(records: Records, decoded: bool) -> Remembered:
    """What is known of files of a split that were found good, decoded or by their first and last bytes."""
    # Two splits may be read from one file.
    key = f"{LENGTH} {records.file.resolve()}\n{records.name}"
    return Remembered("checked", f"{'decoded' if decoded else 'headers'} {key}")
