"""Boxes moved by corrections of their logits: a program takes a stretch of coordinates."""

import triton
import triton.language as tl

BLOCK = 512  # boxes are few: many small programs


@triton.jit
def _odds(value, eps):
    """x and 1 - x of x in [0, 1], both at least eps, and whether x itself is what they depend on; NaN passes."""
    x = tl.where(value < 0.0, 0.0, value)
    x = tl.where(x > 1.0, 1.0, x)
    rest = 1.0 - x
    return tl.where(x < eps, eps, x), tl.where(rest < eps, eps, rest), x < eps, rest < eps


@triton.jit
def refine_kernel(
    correction,  # [numbers]
    boxes,  # [numbers]
    out,  # [numbers]
    numbers,
    eps,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < numbers
    value = tl.load(boxes + place, mask=inside).to(tl.float32)
    above, below, _, _ = _odds(value, eps)
    logit = tl.load(correction + place, mask=inside).to(tl.float32) + tl.log(above / below)
    tl.store(out + place, 1.0 / (1.0 + tl.exp(-logit)), mask=inside)


@triton.jit
def refine_backward_kernel(
    grad,  # [numbers]
    out,  # [numbers]
    boxes,  # [numbers]
    grad_correction,  # [numbers], written where CORRECTION
    grad_boxes,  # [numbers], written where BOXES
    numbers,
    eps,
    CORRECTION: tl.constexpr,
    BOXES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < numbers
    y = tl.load(out + place, mask=inside)
    slope = tl.load(grad + place, mask=inside).to(tl.float32) * (1.0 - y) * y
    if CORRECTION:
        tl.store(grad_correction + place, slope.to(grad_correction.dtype.element_ty), mask=inside)
    if BOXES:
        value = tl.load(boxes + place, mask=inside).to(tl.float32)
        above, below, low, high = _odds(value, eps)
        through = tl.where(low, 0.0, slope / above) + tl.where(high, 0.0, slope / below)
        through = tl.where(value < 0.0, 0.0, tl.where(value > 1.0, 0.0, through))
        tl.store(grad_boxes + place, through.to(grad_boxes.dtype.element_ty), mask=inside)


def refine_boxes(correction, boxes, eps, out) -> None:
    """Write out float32; all contiguous, of one shape, not empty."""
    numbers = out.numel()
    grid = (triton.cdiv(numbers, BLOCK),)
    refine_kernel[grid](correction, boxes, out, numbers, eps, BLOCK=BLOCK, num_warps=4)


def refine_boxes_backward(grad, out, boxes, eps, grad_correction, grad_boxes) -> None:
    """Write both gradients, each None where it is not asked for."""
    numbers = out.numel()
    asked = grad_correction is not None, grad_boxes is not None
    written = [grad if each is None else each for each in (grad_correction, grad_boxes)]
    grid = (triton.cdiv(numbers, BLOCK),)
    refine_backward_kernel[grid](grad, out, boxes, *written, numbers, eps, *asked, BLOCK=BLOCK, num_warps=4)
