"""Built-in synthetic data: six kinds of shapes on textured ground, the same bits on every machine.

Each image is a pure function of (version, seed, split, index). The random bits are the raw stream of PCG64, which numpy
never changes; everything drawn from them is integer arithmetic, and the pixels are float32 sums and products that are
exact or in a fixed order, so that no release of a library and no instruction set can move a box or a pixel. The data is
frozen: another picture needs another ``VERSION``.

Shapes are filled by exact area accumulation: every crossing of a polygon's edge with a sub-row adds its signed coverage
to one buffer for all shapes of the image, and one cumulative sum turns that into opacities.
"""

import math
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch

from .columns import Column
from .errors import DataError
from .records import Records, make_objects
from .sample import IMAGENET, Sample

VERSION = 1
CLASSES = ("circle", "square", "triangle", "star", "cross", "ring")
SPLITS = ("train", "val")
MIN_SIZE = 128

_UNIT = 64  # sub-pixels in a pixel
_ROWS = 4  # sub-rows in a pixel
_ROW = _UNIT // _ROWS
_MAX_OBJECTS, _MAX_LINES, _TRIES = 8, 4, 24
_MAX_FIGURES = _MAX_OBJECTS + _MAX_LINES
# Sixteen equally likely object counts; their mean, 5.0, leaves room for the objects that find no place.
_COUNTS = (1, 2, 3, 3, 4, 4, 5, 5, 5, 6, 6, 6, 7, 7, 8, 8)
_PARAMETER_WORDS = 256  # of 64 bits, before those of the pixels' grain
_GRIDS = (4, 11)  # cells of the two octaves of ground texture


def _ngon(n: int, radius: float = 1.0, start: float = 0.25) -> list[tuple[float, float]]:
    """Corners of a regular polygon, ``start`` in turns."""
    angles = [2 * math.pi * (start + i / n) for i in range(n)]
    return [(radius * math.cos(a), radius * math.sin(a)) for a in angles]


def _outlines() -> list[list[list[tuple[float, float]]]]:
    """Contours of each class, then of the distractor line, in a frame of radius 1; a hole runs the other way round."""
    arm = 0.33
    quarter = [(arm, 1.0), (arm, arm), (1.0, arm)]
    cross = []
    for cos, sin in ((1, 0), (0, -1), (-1, 0), (0, 1)):
        cross += [(cos * x - sin * y, sin * x + cos * y) for x, y in quarter]
    star = [p for pair in zip(_ngon(5, 1.15), _ngon(5, 0.48, 0.35), strict=True) for p in pair]
    return [
        [_ngon(32)],
        [_ngon(4, 1.2, 0.125)],
        [_ngon(3, 1.2)],
        [star],
        [cross[::-1]],
        [_ngon(32), _ngon(32, 0.55)[::-1]],
        [[(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]],
    ]


def _templates() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Corners [n, 2] in 1/1024 of the radius, and for each corner the number of the one that follows, per outline."""
    corners, following = [], []
    for contours in _outlines():
        corners.append(np.round(np.array([p for c in contours for p in c]) * 1024).astype(np.int64))
        numbers = np.split(np.arange(len(corners[-1])), np.cumsum([len(c) for c in contours])[:-1])
        following.append(np.concatenate([np.roll(contour, -1) for contour in numbers]))
    return corners, following


_CORNERS, _FOLLOWING = _templates()
_LINE = len(CLASSES)
_HEAD = np.array((len(_COUNTS), _MAX_LINES + 1, 32, 17))
_COS = np.round(np.cos(np.arange(1024) * (math.tau / 1024)) * 4096).astype(np.int64)
# Radius as a share of the side, log-uniform, in 2^-16 sub-pixels; stretch of one axis, 0.8 to 1.25 between the two.
_RADIUS = np.round(0.063 * (0.205 / 0.063) ** (np.arange(256) / 255) * _UNIT * 65536).astype(np.int64)
_STRETCH = np.round(4096 * 1.25 ** ((np.arange(256) - 127.5) / 255)).astype(np.int64)


@lru_cache(maxsize=8)
def _interpolation(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bilinear weights of each octave [size, cells], whole 32nds, and those of both [all cells, size]."""
    blocks = []
    for cells in _GRIDS:
        position = (2 * np.arange(size) + 1) * (cells - 1) * 32 // (2 * size)
        cell, fraction = position >> 5, position & 31
        weights = np.zeros((size, cells), np.float32)
        weights[np.arange(size), cell] = 32 - fraction
        weights[np.arange(size), cell + 1] = fraction
        blocks.append(weights / 32)
    return blocks[0], blocks[1], np.concatenate(blocks, axis=1).T.copy()


class _Draws:
    """Consecutive parts of one image's random bits."""

    def __init__(self, seed: int, split: str, index: int, size: int):
        stream = np.random.PCG64([VERSION, seed, SPLITS.index(split), index])
        words = stream.random_raw(_PARAMETER_WORDS + (3 * size * size + 7) // 8).astype("<u8", copy=False)
        self._numbers = words[:_PARAMETER_WORDS].view("<u2")
        self.noise = words[_PARAMETER_WORDS:].view(np.uint8)[: 3 * size * size].reshape(3, size, size)
        self._at = 0

    def __call__(self, count: int) -> np.ndarray:
        """The next ``count`` numbers, int64, uniform in [0, 65536)."""
        self._at += count
        return self._numbers[self._at - count : self._at].astype(np.int64)


def _ground(texture: np.ndarray, mean: np.ndarray, contrast: int, size: int) -> np.ndarray:
    """Two octaves of smooth colour noise about a mean colour.

    texture: whole numbers in [-32, 32), one for each cell and channel; mean [3] whole halves; contrast in [0, 32)
    -> float32 [3, size, size]. All sums are whole 2^-15ths below 2^9: exact in whatever order the products are taken.
    """
    coarse, fine, both = _interpolation(size)
    split = 3 * _GRIDS[0] ** 2
    large = texture[:split].reshape(3, _GRIDS[0], _GRIDS[0]) * (32 + contrast) / 32 + mean[:, None, None]
    small = texture[split:].reshape(3, _GRIDS[1], _GRIDS[1]) * (8 + contrast // 2) / 32
    return np.concatenate((coarse @ large.astype(np.float32), fine @ small.astype(np.float32)), axis=2) @ both


def _fill(corners: np.ndarray, following: np.ndarray, owner: np.ndarray, extent: np.ndarray) -> list[np.ndarray]:
    """Opacity of polygons, by accumulating the signed area to the right of every edge.

    corners [2, n] xy in sub-pixels, following [n] index of the next corner, owner [n] polygon number, ascending; extent
    [4, p] pixels x0, y0, x1, y1 of each polygon's patch on the image -> p arrays float32 [y1 - y0, x1 - x0] in [0, 1].
    """
    (x0, y0), (x1, y1) = corners, corners[:, following]
    low, high = np.minimum(y0, y1), np.maximum(y0, y1)
    # Sub-row s lies at sub-pixel _ROW * s + _ROW / 2; an edge owns those in [low, high).
    left, above, right, below = extent
    top, bottom = (above * _ROWS)[owner], (below * _ROWS)[owner]
    first = np.clip((low + _ROW // 2 - 1) // _ROW, top, bottom)
    count = np.clip((high + _ROW // 2 - 1) // _ROW, top, bottom) - first
    edge = np.repeat(np.arange(len(count)), count)
    row = np.arange(len(edge)) + np.repeat(first - (np.cumsum(count) - count), count)
    rise = (y1 - y0)[edge]
    x = x0[edge] + (x1 - x0)[edge] * (_ROW * row + _ROW // 2 - y0[edge]) // rise

    width, height = right - left, below - above
    stride = width + 2  # the two columns that a crossing at the right end may touch
    offset = np.cumsum(stride * height) - stride * height
    which = owner[edge]
    x = np.clip(x - (left * _UNIT)[which], 0, (width * _UNIT)[which])
    pixel = (offset - above * stride)[which] + (row // _ROWS) * stride[which] + x // _UNIT
    sign, fraction = np.sign(rise), x % _UNIT
    area = np.bincount(
        np.concatenate((pixel, pixel + 1)),
        np.concatenate((sign * (_UNIT - fraction), sign * fraction)),
        minlength=int(offset[-1] + stride[-1] * height[-1]),
    )
    # Every row closes to zero, so one sum over all patches does not leak from row to row.
    opacity = np.abs(np.cumsum(area.astype(np.float32), dtype=np.float32)) * np.float32(1 / (_UNIT * _ROWS))
    return [
        opacity[o : o + s * h].reshape(h, s)[:, :w]
        for o, s, h, w in zip(offset.tolist(), stride.tolist(), height.tolist(), width.tolist(), strict=True)
    ]


def _visible(outline: list[list[int]], x: int, y: int, side: int) -> tuple[int, int, int, int]:
    """Bounds of the part of a polygon that lies in the image, in sub-pixels.

    outline: x, y, next x, next y of each edge about the centre; the polygon reaches into the image and is
    smaller than it.
    """
    xs, ys = [], []
    for x0, y0, x1, y1 in outline:
        x0, y0, x1, y1 = x0 + x, y0 + y, x1 + x, y1 + y
        if 0 <= x0 <= side and 0 <= y0 <= side:
            xs.append(x0)
            ys.append(y0)
        for border in (0, side):
            if (x0 < border) != (x1 < border):
                at = y0 + (y1 - y0) * (border - x0) // (x1 - x0)
                if 0 <= at <= side:
                    xs.append(border)
                    ys.append(at)
            if (y0 < border) != (y1 < border):
                at = x0 + (x1 - x0) * (border - y0) // (y1 - y0)
                if 0 <= at <= side:
                    xs.append(at)
                    ys.append(border)
    return min(xs), min(ys), max(xs), max(ys)


def _place(
    bounds: list[list[int]], outlines: list[list[list[int]]], candidates: list[list[int]], side: int
) -> tuple[list[int], list[list[int]], list[tuple[int, int, int, int]]]:
    """Puts objects one after the other where their boxes share at most a quarter of the smaller one.

    bounds: x0, y0, x1, y1 about the centre; outlines as in ``_visible``; candidates: 16-bit x, y, ``_TRIES`` for each
    object; side in sub-pixels -> numbers of the objects that found a place (the first always does), their centres, and
    the boxes of their visible parts.
    """
    kept, centres, boxes = [], [], []
    for number, (left, top, right, bottom) in enumerate(bounds):
        margin = (right - left) // 4
        span = side - 2 * margin
        for x, y in candidates[number * _TRIES : (number + 1) * _TRIES]:
            x, y = margin + (x * span >> 16), margin + (y * span >> 16)
            box = (x + left, y + top, x + right, y + bottom)
            if min(box) < 0 or max(box) > side:
                box = _visible(outlines[number], x, y, side)
            area = (box[2] - box[0]) * (box[3] - box[1])
            for other in boxes:
                across = min(box[2], other[2]) - max(box[0], other[0])
                down = min(box[3], other[3]) - max(box[1], other[1])
                if across > 0 and down > 0:
                    smaller = min(area, (other[2] - other[0]) * (other[3] - other[1]))
                    if 4 * across * down > smaller:
                        break
            else:
                kept.append(number)
                centres.append([x, y])
                boxes.append(box)
                break
    return kept, centres, boxes


def render(split: str, index: int, size: int = MIN_SIZE, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws one image.

    -> pixels uint8 [3, size, size], boxes_xyxy float32 [n, 4] pixels (whole 64ths), labels int64 [n]. Boxes are the
    exact bounds of what the image holds of an outline, covered by a later object or not.
    """
    draw = _Draws(seed, split, index, size)
    objects, lines, contrast, grain = (draw(4) * _HEAD >> 16).tolist()
    objects = _COUNTS[objects]
    base = 48 + (draw(3) * 160 >> 16)  # the mean colour of the ground
    kinds = [_LINE] * lines + (draw(_MAX_OBJECTS) * len(CLASSES) >> 16)[:objects].tolist()
    radius, stretch, angle = draw(3 * _MAX_FIGURES).reshape(3, _MAX_FIGURES)[:, : len(kinds)]
    # At least 64 levels (of 256, around the clock) away from the ground's mean, in each channel.
    colours = (base + 64 + (draw(3 * _MAX_FIGURES).reshape(_MAX_FIGURES, 3) * 129 >> 16)) % 256
    line_centres = (draw(2 * _MAX_LINES) * (size * _UNIT) >> 16).reshape(_MAX_LINES, 2)[:lines]
    texture = (draw(3 * sum(cells * cells for cells in _GRIDS)) >> 10) - 32
    candidates = draw(2 * _TRIES * _MAX_OBJECTS).reshape(-1, 2)[: _TRIES * objects].tolist()

    # Outlines about their centres, in sub-pixels: stretched, then turned.
    stretch >>= 8
    axes = (size * _RADIUS[radius >> 8] >> 16) * np.stack((_STRETCH[stretch], _STRETCH[255 - stretch])) >> 12
    axes[0, :lines] = size * _UNIT * (6554 + (radius[:lines] >> 2)) >> 16  # half a length of 0.2 to 0.7 sides
    axes[1, :lines] = _UNIT // 2 + (stretch[:lines] * _UNIT >> 8)  # half of 1 to 3 pixels
    sizes = [len(_CORNERS[k]) for k in kinds]
    owner = np.repeat(np.arange(len(kinds)), sizes)
    starts = np.cumsum([0, *sizes[:-1]])
    x, y = axes[:, owner] * np.concatenate([_CORNERS[k] for k in kinds]).T >> 10
    cos, sin = _COS[angle >> 6][owner], _COS[(angle >> 6) - 256][owner]
    corners = np.stack((cos * x - sin * y, sin * x + cos * y)) >> 12
    bounds = np.concatenate([extreme.reduceat(corners, starts, axis=1) for extreme in (np.minimum, np.maximum)])
    following = np.concatenate([_FOLLOWING[k] for k in kinds]) + np.repeat(starts, sizes)
    edges = np.concatenate((corners, corners[:, following])).T.tolist()
    outlines = [edges[start : start + count] for start, count in zip(starts.tolist(), sizes, strict=True)]

    kept, places, boxes = _place(bounds.T[lines:].tolist(), outlines[lines:], candidates, size * _UNIT)
    kept = np.array(kept) + lines
    centres = np.zeros((2, len(kinds)), np.int64)
    centres[:, :lines], centres[:, kept] = line_centres.T, np.array(places).T
    corners += centres[:, owner]
    bounds = (bounds + np.concatenate((centres, centres))).clip(0, size * _UNIT)
    extent = np.concatenate((bounds[:2] // _UNIT, -(-bounds[2:] // _UNIT)))
    dropped = np.ones(len(kinds), bool)
    dropped[:lines] = dropped[kept] = False
    extent[:, dropped] = 0
    opacities = _fill(corners, following, owner, extent)

    # Grain of up to 4 to 20 levels either way comes last; its mean, and the half that makes the cast round, now.
    strength = 4 + grain
    shift = 0.5 - strength
    image = _ground(texture, base + shift, contrast, size)
    paints = (colours + shift).astype(np.float32)[:, :, None, None]
    for figure, (x0, y0, x1, y1) in enumerate(extent.T.tolist()):
        patch = image[:, y0:y1, x0:x1]
        patch += (paints[figure] - patch) * opacities[figure]
    image += draw.noise * np.float32(strength / 128)
    np.clip(image, 0, 255, out=image)
    boxes_xyxy = np.array(boxes, np.float32) / np.float32(_UNIT)
    return image.astype(np.uint8), boxes_xyxy, np.array(kinds)[kept]


class ShapesDataset:
    """The built-in data: ``length`` images an epoch, new ones each epoch of training, always the same ones otherwise.

    Image i of epoch e is image e * length + i of the training stream; the epoch has no effect on ``val``.
    """

    def __init__(self, split: str, length: int, size: int = MIN_SIZE, seed: int = 0, colours: torch.Tensor = IMAGENET):
        if split not in SPLITS:
            raise DataError(f"the built-in shapes have no split {split!r}: use train or val")
        if size < MIN_SIZE:
            raise DataError(f"the built-in shapes need a side of at least {MIN_SIZE} pixels, not {size}")
        self.split, self.length, self.size, self.seed, self.colours = split, length, size, seed, colours
        self.canvas = (size, size)
        self.sizes = Column(np.broadcast_to(np.array(self.canvas), (length, 2)))
        self.counts = Column(np.broadcast_to(np.array(_MAX_OBJECTS), length))  # at most
        self.classes = [(number, name) for number, name in enumerate(CLASSES, start=1)]

    def __len__(self) -> int:
        return self.length

    def sample(self, index: int, epoch: int = 0) -> Sample:
        """Image ``index`` of ``epoch``."""
        number = epoch * self.length + index if self.split == "train" else index
        pixels, boxes_xyxy, labels = render(self.split, number, self.size, self.seed)
        return Sample(
            np.stack(pixels, axis=-1),
            self.colours,
            torch.from_numpy(boxes_xyxy),
            torch.from_numpy(labels),
            index,
            (self.size, self.size),
        )

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return self.sample(index)

    @cached_property
    def records(self) -> Records:
        """Images and objects of epoch 0, with the file names that ``python -m dndetr.shapes`` writes."""
        drawn = [render(self.split, index, self.size, self.seed)[1:] for index in range(self.length)]
        boxes_xyxy, labels = zip(*drawn, strict=True)
        image = np.repeat(np.arange(self.length), [len(some) for some in labels])
        corners = np.concatenate(boxes_xyxy).astype(np.float64)
        boxes = np.concatenate((corners[:, :2], corners[:, 2:] - corners[:, :2]), axis=1)
        return Records(
            name=self.split,
            root=Path("shapes"),
            file=Path("shapes"),
            folder=Path("shapes") / self.split,
            classes=self.classes,
            names=[f"{index:06d}.png" for index in range(self.length)],
            ids=np.arange(self.length),
            sizes=np.full((self.length, 2), self.size),
            objects=make_objects(image, np.concatenate(labels), boxes),
        )

    def coco_dict(self) -> dict:
        """Its records in COCO's format, with where they come from."""
        return {
            "info": {"description": f"dndetr built-in shapes, version {VERSION}, seed {self.seed}, {self.split}"},
            **self.records.coco_dict(),
            "categories": [{"id": number, "name": name, "supercategory": "shape"} for number, name in self.classes],
        }
