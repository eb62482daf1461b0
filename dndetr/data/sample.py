"""One training or validation example, on its way from a data set to a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..config import ImagesConfig

MEAN, STD = ImagesConfig.mean, ImagesConfig.std  # ImageNet's


@dataclass(frozen=True)
class Sample:
    """An image as a batch takes it, and its objects.

    pixels [h, w, 3] uint8 RGB, of any strides, maybe read-only; colours [3, 4] float32, the map from a pixel to what a
    model is shown; boxes_xyxy [n, 4] float32 pixels of the image; labels [n] int64 in [0, K); original_size (height,
    width) of the upright file; unverified [K] bool, as of ``Targets``, of federated annotations alone.
    """

    pixels: np.ndarray
    colours: Tensor
    boxes_xyxy: Tensor
    labels: Tensor
    image_id: int
    original_size: tuple[int, int]
    unverified: Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image."""
        return self.pixels.shape[:2]


def colour_map(
    matrix: np.ndarray | None = None, offset: float = 0.0, mean: Sequence[float] = MEAN, std: Sequence[float] = STD
) -> Tensor:
    """Normalisation, by default ImageNet's, after a linear map of the colours -> [3, 4] float32, the last column added.

    matrix [3, 3] and offset act on colours in [0, 255], the identity where there is none; mean, std: of colours in
    [0, 1].
    """
    std = 255 * np.array(std)
    scale = (np.eye(3) if matrix is None else matrix) / std[:, None]
    shift = (offset - 255 * np.array(mean)) / std
    return torch.from_numpy(np.column_stack((scale, shift))).float()


IMAGENET = colour_map()


def normalisation(images: ImagesConfig) -> Tensor:
    """The map [3, 4] of a run that normalises and nothing else."""
    return colour_map(mean=images.mean, std=images.std)


def denormalise(image: Tensor, colours: Tensor = IMAGENET) -> np.ndarray:
    """The pixels that ``colours``, no more than a normalisation, map to [3, h, w] float -> uint8 [h, w, 3], clipped."""
    scale, shift = colours.diagonal()[:, None, None], colours[:, 3, None, None]
    pixels = (image.float().cpu() - shift) / scale
    return pixels.round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()
