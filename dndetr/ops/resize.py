"""Pictures resized with the bits of Pillow's bilinear filter, which is most of what preparing an image takes.

    out[i] = sum over j of w[i, j] in[j] / sum over j of w[i, j]        w[i, j] = max(0, 1 - |j + 1/2 - c[i]| / s)

with c[i] = start + (i + 1/2) scale, ``scale`` old pixels to a new one and s = max(scale, 1), along rows and then across
them. Weights are rounded to multiples of 2^-22 and sums to whole numbers after each direction, as Pillow does it, so
that pictures are the same whoever resizes them; the self-test asks for every bit. What becomes less tall is left to
Pillow, whose versions differ there in the direction that comes first.

Of the data's preparation alone: no graph sees it, and it runs on the thread that calls it.
"""

import numpy as np
from PIL import Image

from . import _backend

_GAP = 3.0  # pictures that shrink by more are first reduced by averaging whole pixels


def resize_reference(
    picture: Image.Image,
    box: tuple[float, float, float, float],
    size: tuple[int, int],
    hflip: bool = False,
    vflip: bool = False,
) -> np.ndarray:
    """What Pillow makes of it; arguments and result as :func:`resize`."""
    resized = picture.resize(size[::-1], Image.Resampling.BILINEAR, box=box, reducing_gap=_GAP)
    if hflip:  # by Pillow, whose pixels of four bytes move in one piece
        resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(resized)[:: -1 if vflip else 1]


def resize(
    picture: Image.Image,
    box: tuple[float, float, float, float],
    size: tuple[int, int],
    hflip: bool = False,
    vflip: bool = False,
    backend: str | None = None,
) -> np.ndarray:
    """A part of an RGB picture in another size, then mirrored.

    box (x0, y0, x1, y1) in pixels; size (height, width) of the result; hflip: left becomes right; vflip: top becomes
    bottom -> uint8 [height, width, 3], maybe read-only. ValueError for a box that is empty or leaves the picture.
    """
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= picture.width and 0 <= y0 < y1 <= picture.height):
        raise ValueError(f"resize: the box {box} is no part of a picture of {picture.width}x{picture.height} pixels")
    if picture.mode != "RGB" or min(size) < 1:
        raise ValueError(f"resize: pictures are RGB, sizes positive; got {picture.mode}, {size}")
    given = picture, box, size, hflip, vflip
    if _backend.choose("resize", backend, "cpu")[0] == "reference" or not _enlarges(picture, box, size):
        return resize_reference(*given)
    return _resize(*given)


def _enlarges(picture: Image.Image, box: tuple[float, float, float, float], size: tuple[int, int]) -> bool:
    """Whether all of Pillow's versions go along rows first, and none reduces before."""
    return size[0] >= picture.height and box[2] - box[0] < 2 * _GAP * size[1]


def _resize(picture, box, size, hflip, vflip) -> np.ndarray:
    pixels, out = np.asarray(picture), np.empty((*size, 3), np.uint8)
    addresses = pixels.ctypes.data, out.ctypes.data
    _backend.compiled().resize((*pixels.shape[:2], *size), box, (hflip, vflip), *addresses)
    return out


# name: (height and width of the picture, box, height and width of the result)
CASES = {
    "whole": ((24, 32), (0, 0, 32, 24), (40, 53)),
    "part": ((24, 32), (3.7, 1.2, 29.1, 22.9), (31, 70)),
    "narrower": ((24, 61), (0.5, 0, 60.25, 24), (30, 20)),
    "same-size": ((24, 32), (0, 0, 32, 24), (24, 32)),
    "moved": ((24, 32), (0.5, 0.25, 31.5, 23.75), (24, 32)),
    "one-pixel": ((1, 1), (0, 0, 1, 1), (5, 7)),
    "less-than-a-pixel": ((9, 8), (4.2, 3.1, 4.9, 3.3), (12, 9)),
    "to-one-column": ((5, 3), (0, 0, 3, 5), (8, 1)),
    "less-tall": ((48, 64), (0, 0, 64, 48), (24, 80)),
    "much-smaller": ((240, 320), (0, 0, 320, 240), (20, 30)),
    "coco": ((480, 640), (0, 0, 640, 480), (800, 1066)),
}


def make_case(name: str, seed: int = 0) -> tuple[Image.Image, tuple[float, float, float, float], tuple[int, int]]:
    """(picture, box, size) of a case."""
    shape, box, size = CASES[name]
    pixels = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
    return Image.fromarray(pixels), box, size


def _self_test(_: str) -> float:
    """The largest difference from Pillow's, in levels of 255."""
    errors = []
    for name in ("part", "narrower", "one-pixel"):
        given = *make_case(name), True, name == "part"
        errors.append(np.abs(_resize(*given).astype(int) - resize_reference(*given)).max())
    return _backend.worst(errors)


def _obstacle(device_type: str) -> str | None:
    return _backend.extension_obstacle("resize") if device_type == "cpu" else "pictures are resized on the CPU"


_backend.register("resize", _backend.Backend("cpp", ("cpu",), _obstacle, _self_test, tolerance=0.0))
