"""Several tensors in one buffer, so that a batch reaches the device in one copy."""

from collections.abc import Sequence
from functools import cached_property
from math import prod

import torch
from torch import Tensor

_ALIGNMENT = 256  # bytes; every kernel may read its tensor in the widest words

Layout = tuple[tuple[torch.dtype, tuple[int, ...]], ...]
"""Dtype and shape of each tensor in a buffer."""


def layout_of(tensors: Sequence[Tensor]) -> Layout:
    """What ``unpack`` needs to know of the tensors, and all that a captured step depends on."""
    return tuple((tensor.dtype, tuple(tensor.shape)) for tensor in tensors)


def pack(tensors: Sequence[Tensor], pinned: bool = False) -> Tensor:
    """Copies of tensors on the host, one after the other in a buffer of bytes, page-locked if ``pinned``."""
    layout = layout_of(tensors)
    size = _places(layout)[-1]
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    for view, tensor in zip(unpack(buffer, layout), tensors, strict=True):
        view.copy_(tensor)
    return buffer


def unpack(buffer: Tensor, layout: Layout) -> list[Tensor]:
    """Views of the tensors in a buffer, wherever it lies."""
    return [
        buffer[start : start + _bytes(dtype, shape)].view(dtype).view(shape)
        for (dtype, shape), start in zip(layout, _places(layout), strict=False)
    ]


class Transfer:
    """Brings tensors to the device in one copy, which on a GPU runs beside what is being computed there."""

    def __init__(self, device: torch.device):
        self.device = device

    @cached_property
    def _copies(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors on the host -> their buffer on the device, ready for whatever is launched from now on."""
        if self.device.type != "cuda":
            return pack(tensors).to(self.device)
        with torch.cuda.stream(self._copies):
            buffer = pack(tensors, pinned=True).to(self.device, non_blocking=True)
        present = torch.cuda.current_stream(self.device)
        present.wait_stream(self._copies)
        buffer.record_stream(present)
        return buffer


def _bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * prod(shape)


def _places(layout: Layout) -> list[int]:
    """Where each tensor starts, and where the last one ends."""
    places, end = [], 0
    for dtype, shape in layout:
        places.append(end)
        end += -(-_bytes(dtype, shape) // _ALIGNMENT) * _ALIGNMENT
    return [*places, end]
