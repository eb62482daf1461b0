"""Augmentation and resizing: first the geometry is drawn, then one resampling makes the picture and moves the boxes.

A transform is any of the dataclasses below. All randomness comes from the generator it is handed.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from ..ops import resize
from .sample import MEAN, STD, colour_map


class View(NamedTuple):
    """A region of the original, resized to ``size`` and then mirrored.

    region (x0, y0, x1, y1) in pixels of ``original`` (height, width); size (height, width). Boxes that keep less than
    ``min_visible`` of their area, or nothing, are dropped.
    """

    original: tuple[int, int]
    region: tuple[float, float, float, float]
    size: tuple[int, int]
    hflip: bool = False
    vflip: bool = False
    min_visible: float = 0.0

    @property
    def shrink(self) -> float:
        """How many pixels of the original, per side, make one of the result: the smaller of the two sides' ratios."""
        x0, y0, x1, y1 = self.region
        return min((y1 - y0) / self.size[0], (x1 - x0) / self.size[1])

    def picture(self, image: Image.Image) -> np.ndarray:
        """RGB picture of the original, or of it decoded at a smaller size -> uint8 [h, w, 3], maybe read-only."""
        fy, fx = image.height / self.original[0], image.width / self.original[1]
        x0, y0, x1, y1 = self.region
        box = (x0 * fx, y0 * fy, min(x1 * fx, image.width), min(y1 * fy, image.height))
        return resize(image, box, self.size, self.hflip, self.vflip)

    def boxes(self, boxes_xyxy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes [n, 4] of the original -> boxes_xyxy [m, 4] float32 of the result, and kept [n] bool, m times True."""
        x0, y0, x1, y1 = self.region
        boxes = boxes_xyxy.astype(np.float64)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        inside = boxes.clip((x0, y0, x0, y0), (x1, y1, x1, y1))
        visible = (inside[:, 2:] - inside[:, :2]).prod(axis=1)
        height, width = self.size
        scale = (width / (x1 - x0), height / (y1 - y0))
        moved = (inside - (x0, y0, x0, y0)) * (*scale, *scale)
        if self.hflip:
            moved[:, [0, 2]] = width - moved[:, [2, 0]]
        if self.vflip:
            moved[:, [1, 3]] = height - moved[:, [3, 1]]
        moved = moved.clip(0, (width, height, width, height)).astype(np.float32)
        kept = (visible >= self.min_visible * area) & (moved[:, 2:] > moved[:, :2]).all(axis=1)
        return moved[kept], kept


def short_side(size: tuple[int, int], side: int, longest: int | None) -> tuple[int, int]:
    """(height, width) resized so that the short side is ``side``, or less where the long one would pass ``longest``.

    The official rounding: the short side is rounded where ``longest`` binds, the long side is always cut off. Lines
    that would be thinner than a pixel are one pixel wide.
    """
    short, long = min(size), max(size)
    if longest is not None and long / short * side > longest:
        side = round(longest * short / long)
        if side == 0:
            return (1, longest) if size[0] < size[1] else (longest, 1)
    if short == side:
        return size
    height, width = size
    return (side, int(side * width / height)) if height < width else (int(side * height / width), side)


@dataclass(frozen=True, kw_only=True)
class _Normalising:
    """Every transform ends with a normalisation, by default ImageNet's: colours in [0, 1] minus mean, over std."""

    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD

    def colours(self, picture: np.ndarray, rng: np.random.Generator | None = None) -> Tensor:
        """uint8 [h, w, 3] -> the map [3, 4] of its colours to what a model is shown."""
        return colour_map(mean=self.mean, std=self.std)


@dataclass(frozen=True)
class Unresized(_Normalising):
    """Pictures at their own size, mirrored with probability ``hflip``."""

    hflip: float = 0.0
    canvas = None

    def view(self, size: tuple[int, int], rng: np.random.Generator) -> View:
        """Draws the geometry for an original of ``size`` (height, width)."""
        return View(size, (0, 0, size[1], size[0]), size, hflip=rng.random() < self.hflip)


@dataclass(frozen=True)
class OfficialTraining(_Normalising):
    """The training recipe of DETR and DN-DETR.

    Mirrored half of the time; then resized so that the short side is one of ``sides``, half of the time after a resize
    to one of ``crop_sides`` and a random crop with sides in [crop_min, crop_max]. The two resizes are one resampling.
    """

    sides: tuple[int, ...] = tuple(range(480, 801, 32))
    longest: int = 1333
    crop_sides: tuple[int, ...] = (400, 500, 600)
    crop_min: int = 384
    crop_max: int = 600
    hflip: float = 0.5
    canvas = None

    def view(self, size: tuple[int, int], rng: np.random.Generator) -> View:
        """Draws the geometry for an original of ``size`` (height, width)."""
        hflip = rng.random() < self.hflip
        height, width = size
        crop, region = size, (0, 0, width, height)
        if rng.random() >= 0.5:
            resized = short_side(size, int(rng.choice(self.crop_sides)), None)
            crop = tuple(int(rng.integers(min(self.crop_min, n), min(self.crop_max, n) + 1)) for n in resized)
            top, left = (int(rng.integers(0, n - c + 1)) for n, c in zip(resized, crop, strict=True))
            fy, fx = height / resized[0], width / resized[1]
            region = (left * fx, top * fy, min((left + crop[1]) * fx, width), min((top + crop[0]) * fy, height))
        return View(size, region, short_side(crop, int(rng.choice(self.sides)), self.longest), hflip)


@dataclass(frozen=True)
class OfficialEvaluation(_Normalising):
    """Resized to a short side of ``side``, the long one at most ``longest``."""

    side: int = 800
    longest: int = 1333
    canvas = None

    def view(self, size: tuple[int, int], rng: np.random.Generator | None = None) -> View:
        """The geometry for an original of ``size`` (height, width)."""
        return View(size, (0, 0, size[1], size[0]), short_side(size, self.side, self.longest))


@dataclass(frozen=True)
class FixedTraining(_Normalising):
    """Every picture on one canvas (height, width), stretched to fit: for small machines.

    A crop with each side a share of the original's, drawn from [crop_min, 1], with probability ``crop``; boxes that
    keep less than ``min_visible`` of their area are dropped. Mirrored; brightness, contrast and colour each changed by
    a factor from [1 - strength, 1 + strength].
    """

    canvas: tuple[int, int] = (240, 320)
    hflip: float = 0.5
    vflip: float = 0.5
    crop: float = 0.8
    crop_min: float = 0.6
    min_visible: float = 0.4
    brightness: float = 0.3
    contrast: float = 0.3
    colour: float = 0.3

    def view(self, size: tuple[int, int], rng: np.random.Generator) -> View:
        """Draws the geometry for an original of ``size`` (height, width)."""
        hflip, vflip, cropped = rng.random(3) < (self.hflip, self.vflip, self.crop)
        height, width = size
        region = (0, 0, width, height)
        if cropped:
            tall, wide = rng.uniform(self.crop_min, 1, 2) * size
            top, left = rng.random(2) * (height - tall, width - wide)
            region = (float(left), float(top), float(left + wide), float(top + tall))
        return View(size, region, self.canvas, bool(hflip), bool(vflip), self.min_visible)

    def colours(self, picture: np.ndarray, rng: np.random.Generator) -> Tensor:
        """uint8 [h, w, 3] -> the map [3, 4] that changes its colours and normalises them.

        Brightness scales, contrast moves away from the mean grey, colour away from each pixel's grey: all in one map.
        """
        strengths = np.array((self.brightness, self.contrast, self.colour))
        brightness, contrast, colour = 1 + strengths * rng.uniform(-1, 1, 3)
        grey = np.array((0.299, 0.587, 0.114))
        grey_mean = brightness * (picture[::4, ::4].reshape(-1, 3).mean(axis=0) @ grey)  # every 16th pixel is enough
        matrix = brightness * contrast * (colour * np.eye(3) + (1 - colour) * grey)
        return colour_map(matrix, (1 - contrast) * grey_mean, self.mean, self.std)


@dataclass(frozen=True)
class FixedEvaluation(_Normalising):
    """Every picture whole on one canvas (height, width), stretched to fit."""

    canvas: tuple[int, int] = (240, 320)

    def view(self, size: tuple[int, int], rng: np.random.Generator | None = None) -> View:
        """The geometry for an original of ``size`` (height, width)."""
        return View(size, (0, 0, size[1], size[0]), self.canvas)


Transform = Unresized | OfficialTraining | OfficialEvaluation | FixedTraining | FixedEvaluation
