"""Sine encodings of the pixels of all levels, in one kernel.

    angle = 2 pi (min(i + 1, valid) - shift) / (valid + 1e-6)        along each axis, of its pixel i

    sin and cos of angle / temperature^(2k / D) in channels 2k and 2k + 1 of the axis' D = C / 2

Outside the valid part along the other axis the angle is -2 pi shift / 1e-6.
"""

import torch
from torch import Tensor

from . import _backend
from ._sine_encodings import pixel_encoding_reference

torch.library.define(
    "dndetr::pixel_encoding",
    "(Tensor valid_sizes, Tensor sides, SymInt pixels, int channels, float[2] temperature, float shift) -> Tensor",
)


@torch.library.impl("dndetr::pixel_encoding", ("cpu", "cuda"))
def _encoded(valid_sizes, sides, pixels, channels, temperature, shift):
    from ..kernels.pixel_encoding import pixel_encoding

    out = _encoded_fake(valid_sizes, sides, pixels, channels, temperature, shift)
    with torch.cuda.device_of(out):
        pixel_encoding(valid_sizes.contiguous(), sides.contiguous(), channels, temperature, shift, out)
    return out


@torch.library.register_fake("dndetr::pixel_encoding")
def _encoded_fake(valid_sizes, sides, pixels, channels, temperature, shift):
    return valid_sizes.new_empty((valid_sizes.shape[0], pixels, channels), dtype=torch.float32)


def pixel_encoding(
    valid_sizes: Tensor,
    shapes: tuple[tuple[int, int], ...],
    sides: Tensor,
    channels: int,
    temperature: tuple[float, float],
    shift: float = 0.0,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """Sine encoding of the pixels of feature maps, relative to each image's valid part.

    valid_sizes [B, L, 2] int64 (height, width) on maps of ``shapes`` ((h, w), ...), which are also in ``sides`` [L, 2]
    int64, on the device; ``temperature`` for (y, x); pixel i is at (i + 1 - shift) / valid -> [B, S, channels], first
    half from y, second from x. Pixels outside the valid part get the official code's values as well: the last valid row
    or column, and zero along the other axis. ValueError for other shapes.
    """
    if valid_sizes.shape[1:] != (len(shapes), 2) or sides.shape != (len(shapes), 2):
        wanted = f"valid_sizes must be [B, {len(shapes)}, 2] and sides [{len(shapes)}, 2]"
        raise ValueError(f"pixel_encoding: {wanted}, got {list(valid_sizes.shape)} and {list(sides.shape)}")
    takes = dtype == torch.float32 and channels % 4 == 0 and valid_sizes.shape[0] > 0
    if not takes or _backend.choose("pixel_encoding", backend, valid_sizes.device.type)[0] == "reference":
        return pixel_encoding_reference(valid_sizes, shapes, channels, temperature, shift, dtype)
    pixels = sum(h * w for h, w in shapes)
    return torch.ops.dndetr.pixel_encoding(valid_sizes, sides, pixels, channels, temperature, shift)


# name: (shapes, valid sizes of each image as shares of them, channels, temperature, shift)
CASES = {
    "one": (((1, 1),), ((1.0, 1.0),), 4, (20.0, 20.0), 0.0),
    "one-level": (((7, 9),), ((1.0, 1.0), (0.6, 0.4)), 64, (1000.0, 20.0), 0.0),
    "shifted": (((12, 21), (6, 11), (3, 6)), ((1.0, 0.7), (0.1, 1.0), (0.5, 0.5)), 32, (10000.0, 10000.0), 0.5),
    "four": (((12, 21), (6, 11), (3, 6), (2, 3)), ((1.0, 0.7), (0.01, 0.01)), 256, (20.0, 10000.0), 0.0),
    "uneven": (((5, 3), (2, 40)), ((0.9, 0.9),), 12, (20.0, 20.0), 0.0),
}


def make_case(name: str, device: str = "cpu") -> tuple:
    """(valid_sizes, shapes, sides, channels, temperature, shift) of a case."""
    shapes, shares, channels, temperature, shift = CASES[name]
    sides = torch.tensor(shapes)
    valid_sizes = (torch.tensor(shares)[:, None] * sides).ceil().long()
    return valid_sizes.to(device), shapes, sides.to(device), channels, temperature, shift


def _self_test(device_type: str) -> float:
    valid_sizes, shapes, sides, *how = make_case("four", device_type)
    pixels = sum(h * w for h, w in shapes)
    found = torch.ops.dndetr.pixel_encoding(valid_sizes, sides, pixels, *how)
    return _backend.error_beyond_rounding([found], [pixel_encoding_reference(valid_sizes, shapes, *how, torch.float64)])


_backend.register(
    "pixel_encoding",
    _backend.Backend("triton", ("cuda",), _backend.triton_obstacle, _self_test, tolerance=1e-5),
)
