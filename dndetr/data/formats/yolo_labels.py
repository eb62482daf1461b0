"""Sizes and boxes of a YOLO split's images, read from their headers and label files, or remembered."""

import errno
import os
import stat

import numpy as np

from ..errors import DataError, UnreadableImage
from ..image_header import UNKNOWN, upright_size
from ..records import Problem
from .labels_cache import Known, LabelsCache, stamps
from .yolo_files import Images
from .yolo_rows import Labels, parse_labels, pixel_boxes


def rows_of(images: Images, names: list[str], key: str, keypoints: int | None) -> tuple[Known, list[Problem]]:
    """The rows of all label files that have no problem, with the sizes of their images, and the problems of the others.

    names, key: of the images and of the split, in the cache; keypoints: numbers behind a box.
    """
    now = stamps(images.files, images.labels)
    cache = LabelsCache(f"{key}\n{keypoints}")
    good, recalled = cache.recall(names, now)
    fresh = _Fresh(keypoints)
    for index in np.flatnonzero(~good).tolist():
        fresh.read(index, images.files[index], images.labels[index])
    known = fresh.merged(good, recalled)
    sound = np.ones(len(names), bool)
    sound[fresh.unsound] = False
    cache.keep([names[index] for index in np.flatnonzero(sound).tolist()], now[sound], known.where(sound))
    return known, fresh.problems


def text_of(file: str) -> str:
    """The content of a text file; one that is not there is empty. DataError for what is no text."""
    content = _content(file)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}:{_line_at(content, error.start)}: is no text; write it anew") from error


def _read_labels(label: str, keypoints: int | None) -> Labels:
    """The rows of a label file; an image without one has no objects."""
    try:
        content = _content(label)
        return parse_labels(content.decode("utf-8-sig"), keypoints)
    except UnicodeDecodeError as error:
        return Labels([], [], [], [(_line_at(content, error.start), "is no text; write it anew")])
    except OSError as error:
        return Labels([], [], [], [(1, f"cannot be read ({error.strerror}); put the file there")])


def _content(file: str) -> bytes:
    """What is in a file, with lines as Unix ends them."""
    try:
        with open(file, "rb", buffering=0, opener=_not_waiting) as opened:
            if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
                raise OSError(errno.EINVAL, "it is no file")
            return opened.read().replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    except FileNotFoundError as error:
        if os.path.islink(file):
            raise OSError(errno.ENOENT, "it is a link that leads nowhere") from error
        return b""


def _not_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe would wait for its other end


def _line_at(content: bytes, place: int) -> int:
    return content[:place].count(b"\n") + 1


class _Fresh:
    """Images that were read just now, in columns, and what is wrong with their labels."""

    def __init__(self, keypoints: int | None):
        self._keypoints = keypoints
        self._sizes: list[tuple[int, int]] = []
        self._counts: list[int] = []
        self._classes: list[int] = []
        self._shares: list[float] = []
        self._decimals: list[int] = []
        self.problems: list[Problem] = []
        self.unsound: list[int] = []

    def read(self, index: int, image: str, label: str) -> None:
        """Read the size of an image and its labels; one that cannot be read is unsound, and has no objects here."""
        size, rows = UNKNOWN, None
        try:
            size = upright_size(image)
        except UnreadableImage:
            pass  # whoever checks the files says so
        except DataError as error:
            self.problems.append(Problem("missing file", str(error).removeprefix(f"{image}: "), image))
        else:
            rows = _read_labels(label, self._keypoints)
            self.problems += (Problem("row", what, f"{label}:{line}") for line, what in rows.mistakes)
        self._sizes.append(size)
        sound = rows is not None and not rows.mistakes
        self._counts.append(len(rows.classes) if sound else 0)
        if not sound:
            self.unsound.append(index)
        else:
            self._classes += rows.classes
            self._shares += rows.shares
            self._decimals += rows.decimals

    def merged(self, good: np.ndarray, recalled: Known) -> Known:
        """All images, those that were recalled, good [n] bool, among these."""
        if good.all():
            return recalled
        sizes, counts = np.zeros((len(good), 2), np.int64), np.zeros(len(good), np.int64)
        sizes[good], counts[good] = recalled.sizes, recalled.counts
        sizes[~good], counts[~good] = np.array(self._sizes).reshape(-1, 2), self._counts
        image = np.repeat(np.arange(len(good)), counts)
        fresh = ~good[image]
        classes, boxes = np.zeros(len(image), np.int64), np.zeros((len(image), 4))
        classes[~fresh], boxes[~fresh] = recalled.classes, recalled.boxes
        classes[fresh] = self._classes
        shares = np.array(self._shares, np.float64).reshape(-1, 4)
        boxes[fresh] = pixel_boxes(shares, np.array(self._decimals, np.int64), sizes[image[fresh]])
        return Known(sizes, counts, classes, boxes)
