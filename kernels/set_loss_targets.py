"""Targets of queries within the kernels of the set loss: which, their boxes, and losses of their classes."""

import triton
import triton.language as tl

from .class_loss import at_target
from .giou import iou_and_giou


@triton.jit
def targets_of(matches, place, q, sizes):
    """Per query: its target (-1: none), its class (-1: none), whether it counts."""
    target, labels, counts, counted = matches
    problem, layer, image = place
    queries, noised, objects, per_object, proposals = sizes
    inside, matching = q < queries, q >= noised
    slot = q % (objects * per_object)
    seen = inside & (matching | (slot < tl.where(layer < proposals, 0, tl.load(counted + image))))
    restored = slot // per_object
    restores = seen & (restored * per_object == slot) & (restored < tl.load(counts + image))
    found = tl.load(target + problem * (queries - noised) + q - noised, mask=inside & matching, other=-1)
    partner = tl.where(matching, tl.where(found < objects, found, -1), tl.where(restores, restored, -1))
    label = tl.load(labels + image * objects + partner, mask=partner >= 0, other=-1)
    return partner, label, seen


@triton.jit
def pairs_of(boxes, row, target_boxes, truth, paired, PRECISE: tl.constexpr):
    """Predicted boxes and their targets, x, y, w, h each; zeros where there is no pair."""
    a, b = boxes + row * 4, target_boxes + truth * 4
    ax, bx = tl.load(a, mask=paired, other=0.0).to(PRECISE), tl.load(b, mask=paired, other=0.0).to(PRECISE)
    ay, by = tl.load(a + 1, mask=paired, other=0.0).to(PRECISE), tl.load(b + 1, mask=paired, other=0.0).to(PRECISE)
    aw, bw = tl.load(a + 2, mask=paired, other=0.0).to(PRECISE), tl.load(b + 2, mask=paired, other=0.0).to(PRECISE)
    ah, bh = tl.load(a + 3, mask=paired, other=0.0).to(PRECISE), tl.load(b + 3, mask=paired, other=0.0).to(PRECISE)
    return ax, ay, aw, ah, bx, by, bw, bh


@triton.jit
def _overlaps(boxes, row, target_boxes, truth, paired, EPS: tl.constexpr, PRECISE: tl.constexpr):
    """IoU of every query's box and its target's, 0 without one."""
    ax, ay, aw, ah, bx, by, bw, bh = pairs_of(boxes, row, target_boxes, truth, paired, PRECISE)
    iou, _giou, _x, _y, _w, _h = iou_and_giou(ax, ay, aw, ah, bx, by, bw, bh, EPS)
    return tl.where(paired, iou, 0.0)


@triton.jit
def _larger(a, b):
    """The maximum, or whichever is not a number."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def _maximum(x):
    """Of a vector; the sum adds nothing but what is not a number, which a maximum alone may lose."""
    return tl.max(x, 0) + tl.sum(x * 0.0, 0)


@triton.jit
def _largest(boxes, target_boxes, matches, place, sizes, EPS: tl.constexpr, PRECISE: tl.constexpr):
    """The largest squared overlaps of the matching and of the denoising queries of one problem."""
    problem, _layer, image = place
    queries, noised, objects, _per_object, _proposals = sizes
    WIDE: tl.constexpr = 128  # a query for each thread, whatever the tile of logits
    of_matching, of_noised = tl.zeros([WIDE], PRECISE), tl.zeros([WIDE], PRECISE)
    for first in range(0, queries, WIDE):
        q = first + tl.arange(0, WIDE)
        partner, _label, _seen = targets_of(matches, place, q, sizes)
        truth = image * objects + partner
        overlap = _overlaps(boxes, problem * queries + q, target_boxes, truth, partner >= 0, EPS, PRECISE)
        square = overlap * overlap
        of_matching = _larger(of_matching, tl.where(q >= noised, square, 0.0))
        of_noised = _larger(of_noised, tl.where(q >= noised, 0.0, square))
    return _maximum(of_matching), _maximum(of_noised)


@triton.jit
def losses_at_targets(
    logits,
    boxes,
    target_boxes,
    matches,
    place,
    q,
    classes,
    sizes,
    KIND: tl.constexpr,
    NOISED: tl.constexpr,
    ALPHA: tl.constexpr,
    EPS: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """Per query: loss and slope of the logit of its target's class, where it has one."""
    problem, _layer, image = place
    queries, noised, objects, _per_object, _proposals = sizes
    row, matching = problem * queries + q, q >= noised
    partner, label, _seen = targets_of(matches, place, q, sizes)
    overlap = _overlaps(boxes, row, target_boxes, image * objects + partner, partner >= 0, EPS, PRECISE)
    largest = overlap
    if KIND == "position" or NOISED == "position":
        of_matching, of_noised = _largest(boxes, target_boxes, matches, place, sizes, EPS, PRECISE)
        largest = tl.where(matching, of_matching, of_noised)
    known = (label >= 0) & (label < classes)
    x = tl.load(logits + row * classes + label, mask=known, other=0.0).to(PRECISE)
    return at_target(x, overlap, largest, matching, KIND, NOISED, ALPHA)
