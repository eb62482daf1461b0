"""What travels from the data loader through the model to the criterion: one canvas, padded targets, nothing ragged."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


class _Movable:
    """Moves every tensor field of a frozen dataclass together."""

    def _map(self, move):
        changed = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = move(value)
            elif isinstance(value, _Movable):
                changed[field.name] = value._map(move)
        return replace(self, **changed)

    def to(self, device, non_blocking: bool = True):
        """The same fields on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def tensors(self) -> list[Tensor]:
        """Every tensor, in a fixed order."""
        found: list[Tensor] = []
        self._map(lambda tensor: found.append(tensor) or tensor)
        return found

    def with_tensors(self, tensors: Iterable[Tensor]):
        """The same fields with other tensors, in the order of ``tensors()``."""
        given = iter(tensors)
        return self._map(lambda _: next(given))


@dataclass(frozen=True)
class Targets(_Movable):
    """Ground truth of a batch, padded to T slots per image (T is a bucket size, never the data's maximum).

    labels [B, T] int64 in [0, K), 0 where padded; boxes [B, T, 4] cxcywh in [0, 1] of the valid image, 0 where padded;
    counts [B] int32; needed: slots that the batch would do with (None: all), for the host to know; unverified [B, K]
    bool: classes of which an image may show more than is annotated, None where every class of every image counts.
    """

    labels: Tensor
    boxes: Tensor
    counts: Tensor
    needed: int | None = None
    unverified: Tensor | None = None

    @property
    def valid(self) -> Tensor:
        """[B, T] bool, True where a slot holds an object."""
        return torch.arange(self.labels.shape[1], device=self.counts.device) < self.counts[:, None]


@dataclass(frozen=True)
class Batch(_Movable):
    """Images on one canvas, with their ground truth.

    pixels [B, H, W, 3] uint8 RGB; colours [B, 3, 4]: what a model is shown of a pixel is colours[:, :3] rgb +
    colours[:, 3] (``ops.images_of``); sizes [B, 2] int64 valid (height, width) on the canvas, beyond which a model is
    shown zeros whatever the bytes; original_sizes [B, 2] int64 (height, width) of the files; ids [B] int64 image ids;
    noise_seed: what its noise is drawn from (None: whatever comes next).
    """

    pixels: Tensor
    colours: Tensor
    sizes: Tensor
    targets: Targets
    original_sizes: Tensor
    ids: Tensor
    noise_seed: int | None = None

    @property
    def canvas(self) -> tuple[int, int]:
        """(height, width) that all images have room on."""
        return tuple(self.pixels.shape[1:3])


def blank_batch(images: int, canvas: tuple[int, int], slots: int, federated: int | None = None) -> Batch:
    """Black images that fill their canvas (height, width), each with objects, all alike, in all of its slots.

    federated: number of classes, none of them verified, where annotations are federated.
    """
    boxes = torch.tensor((0.5, 0.5, 0.25, 0.25)).repeat(images, slots, 1)
    targets = Targets(
        torch.zeros(images, slots, dtype=torch.int64),
        boxes,
        torch.full((images,), slots).int(),
        unverified=None if federated is None else torch.ones(images, federated, dtype=torch.bool),
    )
    sizes = torch.tensor([canvas]).repeat(images, 1)
    pixels, colours = torch.zeros(images, *canvas, 3, dtype=torch.uint8), torch.zeros(images, 3, 4)
    return Batch(pixels, colours, sizes, targets, sizes, torch.arange(images))
