"""Images that a caller hands over, without ground truth, as a data set for the loader."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import DataError
from .image import read_image, to_rgb
from .sample import Sample
from .transforms import Transform

ImageLike = str | Path | Image.Image | np.ndarray | Tensor
"""An image file, a picture, uint8 pixels [h, w, 3] RGB, or a tensor [3, h, w] RGB, uint8 or float in [0, 1]."""


class UserImages:
    """Images in memory or in files as a data set: no objects, no classes; ids are places in the list.

    Files are read when their sample is asked for.
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
        picture = read_image(image) if isinstance(image, Path) else to_rgb(image)
        size = picture.size[::-1]
        tensor = self._transform.tensor(self._transform.view(size, rng).picture(picture), rng)
        return Sample(tensor, torch.zeros(0, 4, dtype=torch.float32), torch.zeros(0, dtype=torch.int64), index, size)

    def coco_dict(self) -> dict:
        """There is none."""
        raise NotImplementedError("images alone have no ground truth")


def _checked(image: ImageLike, place: int) -> Path | Image.Image:
    """An image that can be read later, as a file or a picture."""
    if isinstance(image, str | Path):
        if not Path(image).is_file():
            raise DataError(f"{image}: no such image file")
        return Path(image)
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
        raise ValueError(f"image {place} is a {type(image).__name__}; give a path, a PIL image, an array or a tensor")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        found = f"{image.dtype} {list(image.shape)}"
        raise ValueError(f"image {place} is an array {found}; give uint8 [height, width, 3], RGB")
    return Image.fromarray(image)


def _size(image: Path | Image.Image) -> tuple[int, int]:
    """(height, width), of a file as it is when turned upright."""
    if isinstance(image, Image.Image):
        return image.size[::-1]
    try:
        with Image.open(image) as file:
            sideways = file.getexif().get(0x0112, 1) >= 5
            return file.size if sideways else file.size[::-1]
    except Exception:  # whatever this is, reading the whole file says it in one line
        return read_image(image).size[::-1]
