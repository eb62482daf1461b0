"""Reading image files of any kind as upright RGB pictures."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import DataError, UnreadableImage

_ORIENTATION = 0x0112
_SWAPS_SIDES = (5, 6, 7, 8)  # orientations that lay the picture on its side
_OVERSAMPLING = 1.5  # a reduced JPEG keeps this many times the pixels, per side, that its reader asks for


def read_image(path: Path | BinaryIO, size: tuple[int, int] | None = None, shrink: float = 1.0) -> Image.Image:
    """An image file as an upright RGB picture; what is transparent becomes white, 16 bits become 8.

    path: the file, or an open one, which messages call what ``str`` makes of it;
    size: the (height, width) that the annotations state. A file with an EXIF orientation is turned upright, unless the
    stated size is only that of the pixels as stored; any other size is an error. shrink: how many times larger than
    needed the picture is, per side; a JPEG may then be decoded at a half, a quarter or an eighth of its size.
    Raises UnreadableImage for what cannot be decoded.
    """
    with _opened(path, size) as (image, turned):
        if shrink > _OVERSAMPLING:
            factor = _OVERSAMPLING / shrink
            image.draft(image.mode, (int(image.width * factor) + 1, int(image.height * factor) + 1))
        image.load()
        return to_rgb(ImageOps.exif_transpose(image) if turned else image)


def read_header(path: Path, size: tuple[int, int]) -> None:
    """Raises what ``read_image`` would raise before it decodes: not an image, or not of the stated (height, width)."""
    with _opened(path, size):
        pass


@contextmanager
def _opened(path: Path | BinaryIO, size: tuple[int, int] | None) -> Iterator[tuple[Image.Image, bool]]:
    """The open file, and whether it is to be turned upright; what goes wrong until it is closed is a DataError."""
    try:
        with Image.open(path) as image:
            orientation = image.getexif().get(_ORIENTATION, 1)
            width, height = image.size[::-1] if orientation in _SWAPS_SIDES else image.size
            as_stored = size is not None and size != (height, width)
            if as_stored and size != image.size[::-1]:
                raise DataError(
                    f"{path}: the file is {width}x{height} pixels, its annotation says {size[1]}x{size[0]}; "
                    "correct width and height (and the boxes) or replace the file"
                )
            yield image, orientation != 1 and not as_stored
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such image file; put it there or remove it from the annotations") from error
    except UnidentifiedImageError as error:
        raise UnreadableImage(f"{path}: not an image that can be read; replace it") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableImage(f"{path}: cannot be decoded ({error}); replace it") from error


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
