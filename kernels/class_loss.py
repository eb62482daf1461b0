"""Class losses and their slopes within a kernel; formulas and names of kinds are in dndetr/ops/class_loss.py."""

import triton
import triton.language as tl


@triton.jit
def logistic(z):
    """sigmoid(z), 1 - sigmoid(z) and softplus(z), neither overflowing nor losing digits."""
    e = tl.exp(-tl.abs(z))
    u = 1.0 + e
    above = u - 1.0  # what of e is left in u; the quotient corrects the logarithm for the rest
    log_u = tl.where(above == 0.0, e, tl.log(u) * (e / above))
    high, low = 1.0 / u, e / u
    return tl.where(z < 0.0, low, high), tl.where(z < 0.0, high, low), log_u + tl.where(z < 0.0, 0.0, z)


@triton.jit
def _beside_target(x, KIND: tl.constexpr, ALPHA: tl.constexpr):
    p, rest, softplus = logistic(x)
    if KIND == "mal":
        weight = p * tl.sqrt(p)
        loss, slope = weight * softplus, weight * p
    else:
        loss, slope = p * p * softplus, p * p * (2.0 * rest * softplus + p)
        if KIND != "iou":
            loss, slope = (1.0 - ALPHA) * loss, (1.0 - ALPHA) * slope
    return loss, slope


@triton.jit
def beside_target(x, matching, KIND: tl.constexpr, NOISED: tl.constexpr, ALPHA: tl.constexpr):
    """Loss and slope of logits of classes that are not the target's, of kind KIND where ``matching``, else NOISED."""
    loss, slope = _beside_target(x, KIND, ALPHA)
    if KIND != NOISED:
        other, other_slope = _beside_target(x, NOISED, ALPHA)
        loss, slope = tl.where(matching, loss, other), tl.where(matching, slope, other_slope)
    return loss, slope


@triton.jit
def _at_target(x, overlap, largest, KIND: tl.constexpr, ALPHA: tl.constexpr):
    low, high, tail = logistic(-tl.abs(x))
    below = x < 0.0
    p, rest = tl.where(below, low, high), tl.where(below, high, low)
    log_p = tl.where(below, x, 0.0) - tail  # which does not underflow
    if KIND == "focal":
        loss = -ALPHA * rest * rest * log_p
        slope = ALPHA * rest * rest * (2.0 * p * log_p - rest)
    else:
        if KIND == "iou":
            none: tl.constexpr = 1.0 if ALPHA == 1.0 else 0.0  # 0 to the power of 1 - alpha
            power = tl.where(overlap == 0.0, none, tl.exp((1.0 - ALPHA) * tl.log(overlap)))
            aim = tl.exp(ALPHA * log_p) * power
            aim = tl.where(aim < 0.01, 0.01, aim)
        elif KIND == "mal":
            aim = overlap * tl.sqrt(overlap)
        else:
            inverse = 1.0 / (largest + 1e-8)
            aim = overlap * overlap * tl.where(inverse < 1.0, 1.0, inverse)
        # softplus(x) - aim x and p - aim, by the side of 0 that x is on: no digits are lost.
        loss = tail + tl.where(below, -aim * x, (1.0 - aim) * x)
        slope = tl.where(below, p - aim, (1.0 - aim) - rest)
        if KIND == "position":
            square = slope * slope
            slope = ALPHA * slope * (2.0 * p * rest * loss + square)
            loss = ALPHA * square * loss
    return loss, slope


@triton.jit
def at_target(x, overlap, largest, matching, KIND: tl.constexpr, NOISED: tl.constexpr, ALPHA: tl.constexpr):
    """Loss and slope of the logit of the target's class, of kind KIND where ``matching``, else NOISED.

    overlap: the IoU with the target's box; largest: the largest squared one, where the kind is position.
    """
    loss, slope = _at_target(x, overlap, largest, KIND, ALPHA)
    if KIND != NOISED:
        other, other_slope = _at_target(x, overlap, largest, NOISED, ALPHA)
        loss, slope = tl.where(matching, loss, other), tl.where(matching, slope, other_slope)
    return loss, slope
