"""Images from bytes: a program maps the colours of one row, number by number as they lie in memory."""

import triton
import triton.language as tl

# BLOCK: numbers of a row at once. Products and sums are rounded apart, so that all devices give the same bits.
PLAN = {"BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _column(colour, map, number: tl.constexpr, PRECISE: tl.constexpr):
    """Of a map [3, 4], for each colour the factor, or what is added, of this column."""
    red, green, blue = (tl.load(map + number), tl.load(map + 4 + number), tl.load(map + 8 + number))
    return tl.where(colour == 0, red, tl.where(colour == 1, green, blue)).to(PRECISE)


@triton.jit
def normalise_kernel(
    pixels,  # [B, H, W, 3]
    colours,  # [B, 3, 4]
    sizes,  # [B, 2]
    images,  # [B, H, W, 3]
    height,
    width,
    PRECISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    end = tl.minimum(tl.load(sizes + image * 2 + 1), width).to(tl.int32) * 3
    end = tl.where(row < tl.load(sizes + image * 2), end, 0)
    start, map = (image * height + row) * width * 3, colours + image * 12
    for first in range(0, width * 3, BLOCK):
        n = first + tl.arange(0, BLOCK)
        valid, colour = n < end, n % 3
        red = pixels + start + n - colour
        y = tl.load(red, mask=valid, other=0).to(PRECISE) * _column(colour, map, 0, PRECISE)
        for number in tl.static_range(1, 3):
            y += tl.load(red + number, mask=valid, other=0).to(PRECISE) * _column(colour, map, number, PRECISE)
        y = tl.where(valid, y + _column(colour, map, 3, PRECISE), 0.0)
        tl.store(images + start + n, y.to(images.dtype.element_ty), mask=n < width * 3)


def normalise(pixels, colours, sizes, images) -> None:
    """Write images [B, 3, H, W], channels last in memory; the others are contiguous."""
    batch, height, width, _ = pixels.shape
    precise = tl.float64 if images.element_size() == 8 else tl.float32
    normalise_kernel[(height, batch)](pixels, colours, sizes, images, height, width, PRECISE=precise, **PLAN)
