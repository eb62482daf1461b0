"""Which shapes the training batches take, so that a few CUDA graphs replay nearly all steps of a run.

Left alone, a batch takes the smallest canvas and bucket that hold it, and images of many sizes make hundreds of such
shapes: too many for a graph each. So some thousand images are drawn as training will draw them, without their pixels,
and the shapes of their batches are merged, always the two that cost least together, until there are few. From then on
a batch takes the cheapest shape that holds it. The choice depends on the data and the configuration alone.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from ..config import Config, DenoisingConfig
from .collate import TARGET_BUCKETS, canvas_bucket, target_bucket
from .order import Order, portraits

MOST_SHAPES = 64
"""CUDA graphs of one run."""
_MORE_PIXELS = 0.1  # as a share of all; beyond, rare shapes are better left without a graph
_FAR = 1.5  # nor does a batch go onto a canvas of more than so many times its own pixels
_QUERY = 100  # pixels that cost about as much as a denoising query: 20 MFLOP of a decoder against 0.2 of a backbone
_CAPTURE = 20  # steps that cost about as much as a shape's first step and its capture
_DRAWN = 3072  # images
_BATCHES = 8192  # made of those
_UNMERGED = 1024  # shapes; of more, those on about the same canvas are one from the start


class Drawn(Protocol):
    """What choosing asks of a data set."""

    sizes: Sequence[tuple[int, int]]
    """(height, width) of the originals."""

    def __len__(self) -> int: ...

    def extent(self, index: int, epoch: int = 0) -> tuple[int, int, int]:
        """Height, width and number of objects of the sample that epoch ``epoch`` sees, without its pixels."""


class BatchShape(NamedTuple):
    """Height and width of a canvas, and slots for the objects of an image."""

    height: int
    width: int
    slots: int


class BatchShapes(NamedTuple):
    """The shapes chosen for a run.

    full: slots up to which all denoising groups fit, so that a batch is the same with more of them; pixels_added,
    replayed: what is expected, as shares of the pixels and of the run's steps.
    """

    shapes: tuple[BatchShape, ...]
    full: int
    pixels_added: float
    replayed: float

    def shape_for(self, extents: Sequence[tuple[int, int, int]], multiple: int) -> BatchShape:
        """The shape of a batch of images (height, width, objects): of its own, as ever, where none chosen holds it."""
        own = _own_shape(np.array(extents), multiple)
        place = int(_places(np.array([own]), np.array(self.shapes), self.full)[0])
        return own if place < 0 else self.shapes[place]

    def __str__(self) -> str:
        heights, widths, slots = zip(*self.shapes, strict=True)
        room = ", ".join(str(number) for number in sorted(set(slots)))
        count = "1 shape" if len(self.shapes) == 1 else f"{len(self.shapes)} shapes"
        return (
            f"{count} of batches (heights {min(heights)} to {max(heights)}, widths {min(widths)} to "
            f"{max(widths)}, room for {room} objects): {self.pixels_added:.1%} more pixels, "
            f"{self.replayed:.1%} of the steps replay a CUDA graph"
        )


def choose_shapes(dataset: Drawn, config: Config, steps: int) -> BatchShapes:
    """Shapes for the training batches of a run of so many steps; of a data set whose images have no common canvas."""
    denoising = config.denoising
    if denoising.fill:  # a bucket decides the number of groups, so none may be exchanged for a larger one
        groups, full = 0, 0
    else:
        groups = denoising.groups * denoising.copies
        full = denoising.max_queries // max(groups, 1)
    batches = _draw_batches(dataset, config.batch_size, config.seed)
    own = np.array([_own_shape(extents, config.images.multiple) for extents in batches])
    largest = int((own[:, 0] * own[:, 1]).max())
    kinds = _counted(own, config.images.multiple, largest)
    merged, weights = _merge(*kinds, largest, groups, full, len(own) / steps)
    frequent = np.sort(np.argsort(-weights, kind="stable")[:MOST_SHAPES])
    # The cheapest first: a batch takes the first that holds it.
    shapes = merged[frequent[np.argsort(_cost(merged[frequent], groups), kind="stable")]]

    places, pixels = _places(own, shapes, full), own[:, 0] * own[:, 1]
    taken = np.where(places < 0, pixels, shapes[places, 0] * shapes[places, 1])
    visits = np.bincount(places[places >= 0], minlength=len(shapes)) * (steps / len(own))
    return BatchShapes(
        tuple(BatchShape(*shape) for shape in shapes.tolist()),
        full,
        float(taken.sum() / pixels.sum() - 1),
        float((visits - 1).clip(0).sum() / steps),  # the first step of a shape runs eagerly
    )


def largest_canvas(dataset: Drawn, config: Config) -> tuple[int, int]:
    """Height and width that hold every image as training draws it; of a data set without a common canvas."""
    if config.images.recipe == "original":
        sizes = np.asarray(dataset.sizes)
    else:
        sizes = np.concatenate(_draw(dataset, _DRAWN, config.seed)[1])[:, :2]
    return canvas_bucket([tuple(sizes.max(axis=0).tolist())], config.images.multiple)


def dearest_slots(objects: int, denoising: DenoisingConfig) -> int:
    """The slots with the most denoising queries, of all that batches with up to so many objects an image take."""
    most = min(max(objects, 1), TARGET_BUCKETS[-1])
    buckets = [bucket for bucket in TARGET_BUCKETS if bucket <= target_bucket(most)]
    taken = range(1, most + 1) if denoising.slots == "batch" else buckets
    return max(taken, key=lambda slots: (denoising.groups_for(slots) * slots, slots))


def _draw(dataset: Drawn, wanted: int, seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Numbers of some images, of all where they are not more than wanted, and their extents [n, 3] in some epochs."""
    images = np.arange(len(dataset))
    if len(images) > wanted:
        images = np.sort(np.random.default_rng((seed, len(images))).choice(images, wanted, replace=False))
    drawn = [
        np.array([dataset.extent(image, epoch) for image in images.tolist()])
        for epoch in range(max(1, wanted // len(images)))
    ]
    return images, drawn


def _draw_batches(dataset: Drawn, batch_size: int, seed: int) -> np.ndarray:
    """Batches as the loader makes them, of a share of a large data set -> their images' extents [n, batch_size, 3]."""
    images, drawn = _draw(dataset, max(_DRAWN, 8 * batch_size), seed)
    sampled = len(images) < len(dataset)
    portrait = portraits(dataset.sizes, None)[images]
    order = Order(portrait, batch_size, training=True, seed=seed)
    found = []
    for epoch in range(-(-_BATCHES // len(order))):
        batches = np.array(order.batches(epoch))
        if sampled:  # The one that mixes what is left over is one of far more in all of the data.
            tall = portrait[batches]
            batches = batches[(tall == tall[:, :1]).all(axis=1)]
        found.append(drawn[epoch % len(drawn)][batches])
    return np.concatenate(found)


def _own_shape(extents: np.ndarray, multiple: int) -> BatchShape:
    """The smallest shape that holds images [n, 3] of these heights, widths and numbers of objects."""
    height, width, objects = extents.max(axis=0).tolist()
    return BatchShape(*canvas_bucket([(height, width)], multiple), target_bucket(objects))


def _counted(own: np.ndarray, multiple: int, largest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Different shapes among those of batches [n, 3], how many batches each stands for, and the pixels of these.

    Where there are too many, neighbours are one shape; none of them has more than ``largest`` pixels.
    """
    cells, step = own, multiple
    while True:
        kinds, kind, counts = np.unique(cells, axis=0, return_inverse=True, return_counts=True)
        if len(kinds) <= _UNMERGED:
            break
        step *= 2
        cells = np.concatenate((-(-own[:, :2] // step), own[:, 2:]), axis=1)
    shapes, kind = np.zeros_like(kinds), kind.reshape(-1)
    np.maximum.at(shapes, kind, own)
    pixels = np.bincount(kind, weights=own[:, 0] * own[:, 1])
    areas = shapes[:, 0] * shapes[:, 1]
    fits = (areas <= largest) | (areas == areas.min())
    return shapes[fits], counts[fits], pixels[fits]


def _cost(shapes: np.ndarray, groups: int) -> np.ndarray:
    """What an image on shapes [..., 3] costs, in pixels."""
    return shapes[..., 0] * shapes[..., 1] + _QUERY * groups * shapes[..., 2]


def _places(own: np.ndarray, shapes: np.ndarray, full: int) -> np.ndarray:
    """For each of the shapes [n, 3] the number of the first of ``shapes`` that it may take, -1 where there is none."""
    holds = (own[:, None] <= shapes).all(axis=2)
    near = shapes[:, 0] * shapes[:, 1] <= _FAR * (own[:, :1] * own[:, 1:2])
    allowed = holds & near & ((shapes[:, 2] <= full) | (shapes[:, 2] == own[:, 2:]))
    return np.where(allowed.any(axis=1), allowed.argmax(axis=1), -1)


def _merge(
    shapes: np.ndarray, weights: np.ndarray, pixels: np.ndarray, largest: int, groups: int, full: int, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Joins shapes [n, 3] that ``weights`` [n] batches take, until there are few and another join does not pay.

    pixels [n]: of these batches as they are; scale: batches for a step of the run. No canvas becomes larger than the
    largest of a batch, which is what memory must hold.
    """
    shapes, weights, everyone = shapes.copy(), weights.copy(), np.arange(len(shapes))
    pixels, taken = pixels.sum(), weights @ (shapes[:, 0] * shapes[:, 1])
    capture = _CAPTURE * scale * np.average(_cost(shapes, groups), weights=weights)
    alive, left, added = np.ones(len(shapes), bool), len(shapes), taken - pixels

    def price(chosen: np.ndarray) -> np.ndarray:
        """What joining each of the ``chosen`` [m] with every shape costs [m, n]."""
        joint = np.maximum(shapes[chosen, None], shapes)
        alone = weights * _cost(shapes, groups)
        found = (weights[chosen, None] + weights) * _cost(joint, groups) - alone[chosen, None] - alone
        # With more slots than ``full`` a batch would lose denoising groups.
        fewer = (joint[..., 2] > full) & (shapes[chosen, None, 2] != shapes[:, 2])
        forbidden = fewer | (joint[..., 0] * joint[..., 1] > largest) | ~alive | (chosen[:, None] == everyone)
        return np.where(forbidden, np.inf, found)

    prices = price(everyone)
    partner = prices.argmin(axis=1)
    while left > 1:
        lowest = prices[everyone, partner]
        one = int(lowest.argmin())
        other = int(partner[one])
        joint, both = np.maximum(shapes[one], shapes[other]), weights[one] + weights[other]
        more = both * joint[0] * joint[1] - sum(weights[n] * shapes[n, 0] * shapes[n, 1] for n in (one, other))
        few = left <= MOST_SHAPES
        if not np.isfinite(lowest[one]) or added + more > _MORE_PIXELS * pixels or (few and lowest[one] > capture):
            break
        shapes[one], weights[one], alive[other] = joint, both, False
        left, added = left - 1, added + more
        prices[other] = prices[:, other] = np.inf
        prices[one] = prices[:, one] = price(np.array([one]))[0]
        stale = np.flatnonzero((partner == one) | (partner == other) | (everyone == one))
        partner[stale] = prices[stale].argmin(axis=1)
        partner[prices[:, one] < prices[everyone, partner]] = one
    return shapes[alive], weights[alive]
