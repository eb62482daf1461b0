"""Sine encodings of anchors: a program takes some anchors and one coordinate of them."""

import triton
import triton.language as tl

from .sine_waves import TAU, rates, waves

NUMBERS = 512  # of a program
OCTAVES = tl.constexpr(13.287712379549449)  # of temperature 10000


@triton.jit
def _source(coordinate):
    """Which coordinate of a box comes at this place: y, x, and the others in their order."""
    return tl.where(coordinate < 2, 1 - coordinate, coordinate)


@triton.jit
def anchor_encoding_kernel(
    boxes,  # [anchors, coordinates], numbers of an anchor side by side
    out,  # [anchors, coordinates, channels]
    anchors,
    channels,
    stride,  # between anchors
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
):
    anchor = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    coordinate, coordinates = tl.program_id(1), tl.num_programs(1)
    angle = tl.load(boxes + anchor * stride + _source(coordinate), mask=anchor < anchors, other=0.0) * TAU
    channel = tl.arange(0, 2 * PAIRS)
    target = out + (anchor[:, None] * coordinates + coordinate) * channels + channel[None, :]
    inside = (anchor < anchors)[:, None] & (channel < channels)[None, :]
    tl.store(target, waves(angle, OCTAVES, channels, PAIRS), mask=inside)


@triton.jit
def anchor_encoding_backward_kernel(
    grad,  # [anchors, coordinates, channels]
    boxes,  # [anchors, coordinates], numbers of an anchor side by side
    grad_boxes,  # [anchors, coordinates]
    anchors,
    channels,
    stride,  # between anchors
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
):
    anchor = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    coordinate, coordinates = tl.program_id(1), tl.num_programs(1)
    source, there = _source(coordinate), anchor < anchors
    angle = tl.load(boxes + anchor * stride + source, mask=there, other=0.0) * TAU
    rate = rates(OCTAVES, channels, PAIRS)
    phase = angle[:, None] * rate[None, :]
    pair = tl.arange(0, PAIRS)
    inside = there[:, None] & (2 * pair < channels)[None, :]
    first = grad + (anchor[:, None] * coordinates + coordinate) * channels + 2 * pair[None, :]
    of_sine = tl.load(first, mask=inside, other=0.0)
    of_cosine = tl.load(first + 1, mask=inside, other=0.0)
    slope = tl.where(inside, (of_sine * tl.cos(phase) - of_cosine * tl.sin(phase)) * rate[None, :], 0.0)
    tl.store(grad_boxes + anchor * coordinates + source, tl.sum(slope, axis=1) * TAU, mask=there)


def _launch(kernel, tensors, boxes, channels) -> None:
    anchors, coordinates = boxes.shape
    pairs = triton.next_power_of_2(channels // 2)
    rows = max(1, NUMBERS // (2 * pairs))
    grid = (triton.cdiv(anchors, rows), coordinates)
    kernel[grid](*tensors, anchors, channels, boxes.stride(0), PAIRS=pairs, ROWS=rows, num_warps=4)


def anchor_encoding(boxes, channels, out) -> None:
    """Write out [anchors, coordinates * channels] of boxes [anchors, coordinates], float32 and not empty.

    The numbers of each anchor are side by side, anchors any stride apart; out is contiguous.
    """
    _launch(anchor_encoding_kernel, (boxes, out), boxes, channels)


def anchor_encoding_backward(grad, boxes, channels, grad_boxes) -> None:
    """Write grad_boxes, contiguous, of grad, contiguous, and what ``anchor_encoding`` was given."""
    _launch(anchor_encoding_backward_kernel, (grad, boxes, grad_boxes), boxes, channels)
