"""Images that a caller hands over, without ground truth, as a data set for the loader."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import DataError
from .image import read_header, read_image, to_rgb
from .records import Records
from .sample import Sample
from .transforms import Transform

ImageLike = str | os.PathLike | BinaryIO | Image.Image | np.ndarray | Tensor
"""An image file, by its path or open, a picture, uint8 pixels [h, w, 3] RGB, or a tensor [3, h, w] RGB, uint8 or float
in [0, 1]."""


def is_image(value: Any) -> bool:
    """Whether this is one image, not several; an open file, like others of these, can be iterated over as well."""
    return isinstance(value, str | os.PathLike | Image.Image | np.ndarray | Tensor) or hasattr(value, "read")


class _Content(io.BytesIO):
    """What was read from an open file, under a name for messages."""

    def __init__(self, content: bytes, name: str):
        super().__init__(content)
        self._name = name

    def __str__(self) -> str:
        return self._name


class UserImages:
    """Images in memory or in files as a data set: no objects, no classes; ids are places in the list.

    Files are read when their sample is asked for; open ones at once, from their beginning where they have one, and
    decoded then.
    """

    def __init__(self, images: Sequence[ImageLike], transform: Transform):
        self._images = [_checked(image, place) for place, image in enumerate(images)]
        self._transform = transform
        self.classes: list = []
        self.canvas = transform.canvas
        self.sizes = [_size(image) for image in self._images]
        self.counts = [0] * len(images)

    def __len__(self) -> int:
        return len(self._images)

    def sample(self, index: int, epoch: int = 0) -> Sample:
        """Image ``index``, upright, as the transform prepares it."""
        image, rng = self._images[index], np.random.default_rng(0)
        picture = read_image(image) if isinstance(image, Path | _Content) else to_rgb(image)
        size = picture.size[::-1]
        pixels = self._transform.view(size, rng).picture(picture)
        nothing = torch.zeros(0, 4, dtype=torch.float32), torch.zeros(0, dtype=torch.int64)
        return Sample(pixels, self._transform.colours(pixels, rng), *nothing, index, size)

    @property
    def records(self) -> Records:
        """There are none."""
        raise NotImplementedError("images alone have no ground truth")


def _checked(image: ImageLike, place: int) -> Path | _Content | Image.Image:
    """An image that can be read later, as a file or a picture."""
    if isinstance(image, str | os.PathLike):
        path = Path(os.fsdecode(image))
        if not path.is_file():
            raise DataError(f"{path}: no such image file")
        return path
    if hasattr(image, "read"):
        return _content(image, place)
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise ValueError(f"image {place} is a picture of {image.width}x{image.height} pixels")
        return image
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        if image.ndim != 3 or len(image) != 3 or not image.numel():
            raise ValueError(f"image {place} is a tensor of shape {list(image.shape)}; give [3, height, width], RGB")
        if image.is_floating_point():
            if not (image.min() >= 0 and image.max() <= 1):
                raise ValueError(
                    f"image {place} has values from {image.min():g} to {image.max():g}; give floats in [0, 1], not "
                    "normalised, or uint8"
                )
            image = (image * 255).round().byte()
        image = image.permute(1, 2, 0).numpy()
    if not isinstance(image, np.ndarray):
        raise ValueError(
            f"image {place} is a {type(image).__name__}; give a path, an open file, a PIL image, an array or a tensor"
        )
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        found = f"{image.dtype} {list(image.shape)}"
        raise ValueError(f"image {place} is an array {found}; give uint8 [height, width, 3], RGB")
    return Image.fromarray(image)


def _content(file: BinaryIO, place: int) -> _Content:
    if getattr(file, "closed", False):
        raise ValueError(f"image {place} is a closed file; hand it over while it is open")
    if getattr(file, "seekable", bool)():
        file.seek(0)  # whoever has just written a picture into it is at its end
    content = file.read()
    if not isinstance(content, bytes | bytearray | memoryview):
        kind = type(content).__name__
        raise ValueError(f"image {place} is an open file that gives {kind}, not bytes; open it with mode 'rb'")
    name = getattr(file, "name", None)
    return _Content(content, name if isinstance(name, str) else f"image {place}")


def _size(image: Path | _Content | Image.Image) -> tuple[int, int]:
    """(height, width), of a file as it is when turned upright."""
    return image.size[::-1] if isinstance(image, Image.Image) else read_header(image)
