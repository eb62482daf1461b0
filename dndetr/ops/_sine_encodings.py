"""Sine encodings of pixels and of anchor boxes, the specification (official code: even channels sine, odd cosine)."""

import math

import torch
from torch import Tensor


def pixel_encoding_reference(
    valid_sizes: Tensor,
    shapes: tuple[tuple[int, int], ...],
    channels: int,
    temperature: tuple[float, float],
    shift: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The specification in plain torch; arguments and result as ``pixel_encoding``."""
    levels = [
        _of_level(valid_sizes[:, level], shape, channels, temperature, shift, dtype)
        for level, shape in enumerate(shapes)
    ]
    return torch.cat(levels, dim=1)


def anchor_encoding_reference(boxes: Tensor, channels: int) -> Tensor:
    """The specification in plain torch; arguments and result as ``anchor_encoding``."""
    ordered = torch.cat((boxes[..., 1:2], boxes[..., :1], boxes[..., 2:]), dim=-1)
    return _interleaved(ordered * math.tau, channels, 10000.0).flatten(-2)


def _interleaved(angles: Tensor, channels: int, temperature: float) -> Tensor:
    """angles [...] -> [..., channels]: sin and cos of angle / temperature^(2k / channels) in channels 2k and 2k + 1."""
    pair = torch.arange(channels // 2, device=angles.device, dtype=angles.dtype)
    phase = angles[..., None] * temperature ** (-2 * pair / channels)
    return torch.stack((phase.sin(), phase.cos()), dim=-1).flatten(-2)


def _of_level(valid_size: Tensor, shape: tuple[int, int], channels: int, temperature, shift: float, dtype) -> Tensor:
    size = valid_size.to(dtype)
    halves = []
    for axis in (0, 1):
        extent = size[:, axis, None]
        count = torch.arange(1, shape[axis] + 1, device=size.device, dtype=dtype).minimum(extent)
        inside = _interleaved((count - shift) / (extent + 1e-6) * math.tau, channels // 2, temperature[axis])
        nothing = torch.zeros_like(extent[:, :, None])
        outside = _interleaved((nothing - shift) / 1e-6 * math.tau, channels // 2, temperature[axis])
        other = torch.arange(shape[1 - axis], device=size.device) < valid_size[:, 1 - axis, None]
        if axis == 0:
            halves.append(torch.where(other[:, None, :, None], inside[:, :, None], outside[:, 0, :, None]))
        else:
            halves.append(torch.where(other[:, :, None, None], inside[:, None], outside[:, :, 0, None]))
    return torch.cat(halves, dim=-1).flatten(1, 2)
