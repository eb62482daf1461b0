"""Sine encodings of all levels' pixels: a program takes some pixels of an image, and the channels of one axis."""

import math

import triton
import triton.language as tl

from .sine_waves import TAU, waves

NUMBERS = 1024  # of a program


@triton.jit
def pixel_encoding_kernel(
    valid_sizes,  # [images, levels, 2] (height, width)
    sides,  # [levels, 2] (height, width)
    out,  # [images, pixels, 2 channels]
    levels,
    pixels,
    channels,  # of an axis
    octaves_y,
    octaves_x,
    shift,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
):
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    image, axis = tl.program_id(1).to(tl.int64), tl.program_id(2)
    # Places along the axis and the other one, and how far the image reaches: of the last level that begins before.
    place, across = tl.zeros([ROWS], tl.int32), tl.zeros([ROWS], tl.int32)
    extent, limit = tl.zeros([ROWS], tl.int32), tl.zeros([ROWS], tl.int32)
    start = 0
    for level in range(levels):
        height, width = tl.load(sides + 2 * level).to(tl.int32), tl.load(sides + 2 * level + 1).to(tl.int32)
        size = valid_sizes + (image * levels + level) * 2
        begun = pixel >= start
        row, column = (pixel - start) // width, (pixel - start) % width
        place = tl.where(begun, row + (column - row) * axis, place)
        across = tl.where(begun, column + (row - column) * axis, across)
        extent = tl.where(begun, tl.load(size + axis).to(tl.int32), extent)
        limit = tl.where(begun, tl.load(size + 1 - axis).to(tl.int32), limit)
        start += height * width
    reach = extent.to(tl.float32)
    count = tl.minimum((place + 1).to(tl.float32), reach)
    angle = (count - shift) / (reach + 1e-6) * TAU
    outside = (0.0 - shift) / 1e-6 * TAU
    angle = tl.where(across < limit, angle, outside)
    octaves = octaves_y + (octaves_x - octaves_y) * axis
    channel = tl.arange(0, 2 * PAIRS)
    target = out + (image * pixels + pixel.to(tl.int64)[:, None]) * 2 * channels + axis * channels + channel[None, :]
    inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    tl.store(target, waves(angle, octaves, channels, PAIRS), mask=inside)


def pixel_encoding(valid_sizes, sides, channels, temperature, shift, out) -> None:
    """Write out [B, S, channels] float32, not empty; valid_sizes [B, L, 2] and sides [L, 2] contiguous."""
    images, pixels, _ = out.shape
    pairs = triton.next_power_of_2(channels // 4)
    rows = max(1, NUMBERS // (2 * pairs))
    octaves = (math.log2(each) for each in temperature)
    pixel_encoding_kernel[(triton.cdiv(pixels, rows), images, 2)](
        valid_sizes, sides, out, len(sides), pixels, channels // 2, *octaves, shift, PAIRS=pairs, ROWS=rows, num_warps=4
    )
