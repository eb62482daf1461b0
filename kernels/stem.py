"""The stem of a ResNet, three kernels: images laid out for it, its convolution as one product, the largest of 3 x 3.

A 7x7 convolution with stride 2 is a 4x4 one with stride 1 of an image whose squares of 2x2 pixels are its pixels, of
12 channels (16 with zeros). What an output pixel sees of a row of squares then is 64 numbers side by side, and nothing
needs a mask where the image has a margin of zeros.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

MARGIN, DEPTH = 3, 16  # squares that there are beyond the output's pixels, and their channels
_MOVED = {"BLOCK_M": 64, "num_warps": 4}  # pixels of a program that moves numbers
CONVOLUTION = {"BLOCK_M": 128, "num_warps": 4, "num_stages": 3}


@triton.jit
def stem_layout_kernel(
    images,  # [B, 3, H, W]
    squares,  # [B, h + 3, w + 3, 16]
    image_stride,
    colour_stride,
    row_stride,
    column_stride,
    height,
    width,
    rows,  # h + 3
    columns,  # w + 3
    BLOCK_M: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    square = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.arange(0, 16)
    row = (square // columns * 2 - 4)[:, None] + (channel // 6)[None, :]
    column = (square % columns * 2 - 4)[:, None] + (channel // 3 % 2)[None, :]
    seen = (row >= 0) & (row < height) & (column >= 0) & (column < width) & (channel < 12)[None, :]
    place = row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
    place += (channel % 3).to(tl.int64)[None, :] * colour_stride
    value = tl.load(images + image * image_stride + place, mask=seen, other=0.0)
    to = squares + image * rows * columns * 16 + square[:, None] * 16 + channel[None, :]
    tl.store(to, value.to(squares.dtype.element_ty), mask=(square < rows * columns)[:, None])


@triton.jit
def stem_convolution_kernel(
    squares,  # [B, h + 3, w + 3, 16]
    weight,  # [4, 64, N]
    scale,  # [N]
    shift,  # [N]
    out,  # [B, h, w, N]
    height,  # h
    width,  # w
    CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    pixel, last = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), height * width - 1
    k, n = tl.arange(0, 64), tl.arange(0, BLOCK_N)
    columns = width + 3
    seen = tl.minimum(pixel, last)  # what is beyond computes the last one again
    x = squares + image * (height + 3) * columns * 16
    x += ((seen // width * columns + seen % width) * 16)[:, None] + k[None, :]
    w = weight + k[:, None] * CHANNELS + n[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(4):
        total = tl.dot(tl.load(x), tl.load(w, mask=(n < CHANNELS)[None, :], other=0.0), total)
        x += columns * 16
        w += 64 * CHANNELS
    by = tl.load(scale + n, mask=n < CHANNELS, other=0.0).to(tl.float32)
    plus = tl.load(shift + n, mask=n < CHANNELS, other=0.0).to(tl.float32)
    total = total * by[None, :] + plus[None, :]
    total = tl.where(total < 0.0, 0.0, total)  # what is not a number stays so
    to = out + (image * height * width + pixel)[:, None] * CHANNELS + n[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=(pixel <= last)[:, None] & (n < CHANNELS)[None, :])


@triton.jit
def stem_pool_kernel(
    x,  # [B, H, W, N], nothing below zero
    out,  # [B, h, w, N]
    height,
    width,
    out_height,
    out_width,
    CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    pixel, n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    there = (pixel < out_height * out_width)[:, None] & (n < CHANNELS)[None, :]
    top, left = pixel // out_width * 2 - 1, pixel % out_width * 2 - 1
    x += image * height * width * CHANNELS
    largest = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for y in range(3):
        for z in tl.static_range(3):
            row, column = top + y, left + z
            inside = there & ((row >= 0) & (row < height) & (column >= 0) & (column < width))[:, None]
            place = (row * width + column)[:, None] * CHANNELS + n[None, :]
            seen = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, seen, propagate_nan=tl.PropagateNan.ALL)
    to = out + (image * out_height * out_width + pixel)[:, None] * CHANNELS + n[None, :]
    tl.store(to, largest.to(out.dtype.element_ty), mask=there)


def packed(weight: torch.Tensor) -> torch.Tensor:
    """Weights [N, 3, 7, 7] as the convolution of squares reads them: [4, 64, N]."""
    squares = F.pad(weight, (1, 0, 1, 0)).unflatten(3, (4, 2)).unflatten(2, (4, 2))  # [N, 3, 4, 2, 4, 2]
    channels = squares.permute(2, 4, 3, 5, 1, 0).flatten(2, 4)  # [4, 4, 12, N]
    return F.pad(channels, (0, 0, 0, DEPTH - channels.shape[2])).flatten(1, 2)


def lay_out(images, squares) -> None:
    """Write squares [B, h + 3, w + 3, 16], contiguous, of images [B, 3, H, W] of any strides."""
    _, rows, columns, _ = squares.shape
    grid = _programs(squares, _MOVED)
    stem_layout_kernel[grid](images, squares, *images.stride(), *images.shape[2:], rows, columns, **_MOVED)


def convolve(squares, weight, scale, shift, out) -> None:
    """Write out [B, h, w, N]: the convolution of squares with ``packed`` weights, its norm and ReLU; all contiguous."""
    _, height, width, channels = out.shape
    across = {"CHANNELS": channels, "BLOCK_N": max(triton.next_power_of_2(channels), 16)}
    grid = _programs(out, CONVOLUTION)
    stem_convolution_kernel[grid](squares, weight, scale, shift, out, height, width, **across, **CONVOLUTION)


def pool(x, out) -> None:
    """Write out [B, h, w, N], the largest of 3 x 3 with stride 2 in x [B, H, W, N], at least zero; all contiguous."""
    _, height, width, channels = out.shape
    across = {"CHANNELS": channels, "BLOCK_N": triton.next_power_of_2(channels)}
    stem_pool_kernel[_programs(out, _MOVED)](x, out, *x.shape[1:3], height, width, **across, **_MOVED)


def _programs(out: torch.Tensor, plan: dict[str, int]) -> tuple[int, int]:
    """Programs for the pixels of an image, and images, of which CUDA takes 65535."""
    return triton.cdiv(out.shape[1] * out.shape[2], plan["BLOCK_M"]), out.shape[0]
