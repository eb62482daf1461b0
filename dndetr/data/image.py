"""Reading image files of any kind as upright RGB pictures."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from .errors import DataError, UnreadableImage

TURNED, KEPT, UNDECIDED = "turned", "kept", "undecided"

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BACK = _UPRIGHT | {6: _UPRIGHT[8], 8: _UPRIGHT[6]}  # each of the others undoes itself
_SWAPS_SIDES = (5, 6, 7, 8)  # orientations that lay the picture on its side
_OVERSAMPLING = 1.5  # a reduced JPEG keeps this many times the pixels, per side, that its reader asks for

# Pillow doubts large pictures that it decodes all the same, and metadata that are not needed here, without the file's
# name. Once for the process: filters within a block are not safe in threads.
for _category in (Image.DecompressionBombWarning, UserWarning):
    warnings.filterwarnings("ignore", category=_category, module=r"PIL\.")


def read_image(path: Path | BinaryIO, size: tuple[int, int] | None = None, shrink: float = 1.0) -> Image.Image:
    """An image file as an upright RGB picture; what is transparent becomes white, 16 bits become 8.

    path: the file, or an open one, which messages call what ``str`` makes of it;
    size: the (height, width) that the annotations state. A file with an EXIF orientation is turned upright, unless the
    stated size is only that of the pixels as stored; any other size is an error. shrink: how many times larger than
    needed the picture is, per side; a JPEG may then be decoded at a half, a quarter or an eighth of its size.
    Raises UnreadableImage for what cannot be decoded.
    """
    return read_turned(path, size, shrink)[0]


def read_turned(path: Path, size: tuple[int, int] | None = None, shrink: float = 1.0) -> tuple[Image.Image, str | None]:
    """``read_image``, and what became of the file's orientation: TURNED, KEPT as stored, or None where it has none.

    UNDECIDED: turned, though the stated size is that of the pixels either way.
    """
    with _opened(path, size) as (image, frame):
        if shrink > _OVERSAMPLING:
            factor = _OVERSAMPLING / shrink
            image.draft(image.mode, (int(image.width * factor) + 1, int(image.height * factor) + 1))
        image.load()
        kept, turned = frame.turn == KEPT, _turns_itself(image)
        if kept and turned:
            image = image.transpose(_BACK[frame.orientation])
        elif frame.orientation in _UPRIGHT and not kept and not turned:
            image = image.transpose(_UPRIGHT[frame.orientation])
        return to_rgb(image), frame.turn


def read_header(path: Path, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """(height, width) of the upright file; raises what ``read_image`` would raise before it decodes."""
    with _opened(path, size) as (_, frame):
        return frame.upright


@cache
def image_endings() -> frozenset[str]:
    """Endings of files that can be read, in lower case: ".jpg"."""
    Image.init()
    # Pillow opens MPO as JPEG; others, such as PDF, it only writes, and of MPEG it knows no more than the size.
    kinds = Image.EXTENSION.items()
    return frozenset(end for end, kind in kinds if (kind in Image.OPEN or kind == "MPO") and kind != "MPEG")


def is_image_name(name: str) -> bool:
    """Whether a file's name says that it is an image."""
    _, point, ending = name.rpartition(".")
    # macOS keeps what other disks cannot hold of a.jpg in ._a.jpg.
    return point + ending.lower() in image_endings() and not name.rpartition(os.sep)[2].startswith("._")


class _Frame(NamedTuple):
    """How a file lies: its upright (height, width), its orientation, 1 where there is none, and what becomes of it."""

    upright: tuple[int, int]
    orientation: int
    turn: str | None


@contextmanager
def _opened(path: Path | BinaryIO, size: tuple[int, int] | None) -> Iterator[tuple[Image.Image, _Frame]]:
    """The open file, and how it lies; what goes wrong until it is closed is a DataError."""
    try:
        with Image.open(path) as image:
            yield image, _frame(image, path, size)
    except (DataError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such image file; put it there or remove it from the annotations") from error
    except UnidentifiedImageError as error:
        raise UnreadableImage(f"{path}: not an image that can be read; replace it") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"{path}: cannot be decoded ({error}); cut it into tiles or replace it") from error
    except Exception as error:  # Pillow's plugins raise whatever comes up in them
        said = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(f"{path}: cannot be decoded ({said}); replace it") from error


def _frame(image: Image.Image, path: Path, size: tuple[int, int] | None) -> _Frame:
    if image.format == "PNG":
        image.load()  # its metadata may lie behind the pixels
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # metadata that cannot be read do not turn a picture that can
        orientation = 1
    if orientation not in _UPRIGHT:
        orientation = 1
    image.info.pop("xmp", None)  # Pillow reads it once more where it turns a picture itself, and fails if it is odd
    width, height = (image.tag_v2[0x100], image.tag_v2[0x101]) if _turns_itself(image) else image.size
    stored = height, width
    upright = stored[::-1] if orientation in _SWAPS_SIDES else stored
    if size is not None and size not in (stored, upright):
        raise DataError(
            f"{path}: the file is {upright[1]}x{upright[0]} pixels, its annotation says {size[1]}x{size[0]}; "
            "correct width and height (and the boxes) or replace the file"
        )
    if orientation == 1:
        return _Frame(upright, 1, None)
    turn = UNDECIDED if stored == upright else KEPT if size == stored else TURNED
    return _Frame(upright, orientation, turn)


def _turns_itself(image: Image.Image) -> bool:
    """Whether Pillow turns the picture upright as it decodes it: it does so with TIFF, and with nothing else."""
    return hasattr(image, "tag_v2")


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as 8-bit RGB, on white where it is transparent; raises ValueError on floating point."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        # 16-bit grey; Pillow's own conversion clips at 255 instead of scaling.
        return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; convert the file to 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
