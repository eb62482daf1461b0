"""One training or validation example, on its way from a data set to a batch."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Sample:
    """An image, ready for the model, and its objects.

    image [3, h, w] float32 normalised; boxes_xyxy [n, 4] float32 pixels of ``image``; labels [n] int64 in [0, K);
    original_size (height, width) of the upright file.
    """

    image: Tensor
    boxes_xyxy: Tensor
    labels: Tensor
    image_id: int
    original_size: tuple[int, int]


_SCALE = np.array([1 / (255 * s) for s in STD], np.float32)[:, None, None]
_SHIFT = np.array([-m / s for m, s in zip(MEAN, STD, strict=True)], np.float32)[:, None, None]


def normalise(pixels: np.ndarray) -> Tensor:
    """ImageNet normalisation: uint8 pixels [3, h, w] -> float32 [3, h, w]."""
    # Not by torch, whose second thread has gone to sleep meanwhile: waking it takes longer than a small image.
    image = np.multiply(pixels, _SCALE, dtype=np.float32)
    image += _SHIFT
    return torch.from_numpy(image)


def denormalise(image: Tensor) -> np.ndarray:
    """The inverse of ``normalise``: [3, h, w] float -> uint8 [h, w, 3], clipped, ready to draw on."""
    pixels = (image.float().cpu().numpy() - _SHIFT) / _SCALE
    return np.ascontiguousarray(pixels.round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
