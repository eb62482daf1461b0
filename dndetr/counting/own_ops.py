"""What our ops cost on a GPU: kernels, bytes beside those of inputs and results, and time that neither predicts.

Kernels are those that ``ops/`` and ``kernels/`` launch. Times are an H200's (docs/ops.md), measured where nothing else
is said.
"""

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from .traffic import tensors_in, touched


class Own(NamedTuple):
    """kernels; scratch: bytes written and read between them; seconds: that an H200 takes whatever the bytes are."""

    kernels: int
    scratch: int = 0
    seconds: float = 0.0


_ONE_PASS = 4096  # rows whose sums are one kernel's (kernels/column_sums.py)
_BLOCK = 128  # rows of a product's tile, where there are many
_SHARES = 512  # at most, of what more rows are cut into

# Seconds of a kernel that does next to nothing, and of a sample of deformable attention, or a pair of query and key.
# The first two are predicted (docs/ops.md): on tensor cores they were never measured.
_DEFORMABLE = {
    "forward": (5e-6, 19e-12),
    "points": (10e-6, 24e-12),
    "tiles": (10e-6, 71e-12),
    "atomics": (1e-5, 27e-11),
}
_ATTENTION = {"forward": (17e-6, 0.73e-12), "backward": (25e-6, 2.3e-12), "group backward": (5e-6, 3e-12)}
_FEW_ROWS = 3.4e-6  # summed by programs that each go past all of them
_STEM_PIXEL = 0.2e-9  # of the convolution's result
_MATCHING = 40e-6  # the longest problem's, however many there are


def copied(*tensors: Tensor | None) -> Own:
    """What it takes to make those contiguous that are not."""
    wild = [tensor for tensor in tensors if tensor is not None and not tensor.is_contiguous()]
    return Own(len(wild), sum(touched(tensor) + _bytes(tensor) for tensor in wild))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _time(of: tuple[float, float], count: int) -> float:
    least, each = of
    return least + each * count


def _activated_product(x, weight, bias, slope, keep) -> Own:
    kernels, scratch, _ = copied(x, weight)
    return Own(1 + kernels, scratch)


def _activated_product_backward(grad, weight, kept, slope) -> Own:
    # Sums over blocks of rows, which are added up; those of a slope, which are few.
    kernels, scratch, _ = copied(grad, kept)
    blocks = -(-len(grad) // _BLOCK)
    return Own(2 + kernels + (slope is not None), scratch + 2 * 4 * blocks * weight.shape[1], _FEW_ROWS)


def _add_norm(x, y, weight, bias, position, eps, keep) -> Own:
    kernels, scratch, _ = copied(x, y, position)
    return Own(1 + kernels, scratch)


def _add_norm_backward(grad_out, grad_low, grad_positioned, normalized, *_) -> Own:
    # The second adds up the parts of the gradients of weight and bias.
    kernels, scratch, _ = copied(grad_out, grad_low, grad_positioned)
    return Own(2 + kernels, scratch)


def _sums(rows: int, columns: int) -> Own:
    if rows <= _ONE_PASS:
        return Own(1, 0, _FEW_ROWS)
    return Own(2, 2 * 4 * columns * min(_SHARES, -(-rows // 32)), _FEW_ROWS)


def _pixel_encoding(valid_sizes, sides, *_) -> Own:
    kernels, scratch, _ = copied(valid_sizes, sides)
    return Own(1 + kernels, scratch)


def _anchor_encoding(boxes, channels) -> Own:
    # What a view of rows can be made of is read as it lies.
    try:
        rows = boxes.view(-1, boxes.shape[-1])
    except RuntimeError:
        rows = None
    kernels, scratch, _ = copied(boxes if rows is None or rows.stride(1) != 1 else None)
    return Own(1 + kernels, scratch)


def _anchor_encoding_backward(grad, boxes) -> Own:
    kernels, scratch, _ = copied(grad)
    own = _anchor_encoding(boxes, 0)
    return Own(own.kernels + kernels, own.scratch + scratch)


def _column_sums(grad, out=None) -> Own:
    kernels, scratch, _ = copied(grad, out)
    own = _sums(*grad.shape)
    return Own(own.kernels + kernels, own.scratch + scratch, own.seconds)


def _level_sums(grad, sizes) -> Own:
    # Parts of every level's sums, as many as of the largest level, and their sums.
    kernels, scratch, _ = copied(grad)
    shares = min(-(-len(grad) * max(sizes) // 16), _SHARES)
    parts = 2 * 4 * len(sizes) * shares * grad.shape[2] if shares > 1 else 0
    return Own(kernels + 1 + (shares > 1), scratch + parts)


def _prelu_column_sums(grad, x, slope) -> Own:
    own = _column_sums(grad, x)
    return own._replace(kernels=own.kernels + 1)  # parts of the slope's gradient, which are few


def _frozen_norm(x, scale, shift, shortcut, *_) -> Own:
    return _packed(x, shortcut)


def _frozen_norm_backward(grad_y, grad_twin, y, *_) -> Own:
    return _packed(grad_y, grad_twin, y)


def _packed(*maps: Tensor | None) -> Own:
    wild = [x for x in maps if x is not None and not x.is_contiguous(memory_format=torch.channels_last)]
    return Own(1 + len(wild), sum(2 * _bytes(x) for x in wild))


def _stem(images, weight, scale, shift) -> Own:
    # Layout, convolution, pool; two pads of the weights, which are a fill and a copy each, and what lays them out.
    batch, _, height, width = images.shape
    pixels = batch * -(-height // 2) * -(-width // 2)
    numbers = pixels * (16 + len(weight))  # squares of 2x2 pixels in 16 channels, and the convolution's result
    return Own(8, 2 * numbers * weight.element_size(), _STEM_PIXEL * pixels)


def _match(logits, boxes, labels, target_boxes, counts, *_) -> Own:
    precise = torch.promote_types(logits.dtype, torch.float32)
    casts = sum(tensor.dtype != precise for tensor in (boxes, target_boxes))
    kernels, scratch, _ = copied(boxes, labels, target_boxes, counts)
    return Own(1 + casts + kernels, scratch, _MATCHING)


def _refine_boxes(correction, boxes, *_) -> Own:
    kernels, scratch, _ = copied(correction, boxes)
    return Own(1 + kernels, scratch)


def _refine_boxes_backward(grad, out, boxes, *_) -> Own:
    return _refine_boxes(grad, boxes)


def _set_loss(logits, boxes, target, labels, target_boxes, counts, counted, *_) -> Own:
    # Sums of every tile, then their sums in order. Numbers are brought to int32 before.
    kernels, scratch, _ = copied(logits, boxes, target, labels, target_boxes, counts, counted)
    return Own(2 + kernels + sum(each.dtype != torch.int32 for each in (counts, counted)), scratch)


def _set_loss_backward(grad_total, grad_parts, *inputs) -> Own:
    return _set_loss(*inputs)._replace(kernels=_set_loss(*inputs).kernels - 1)


def _group_pairs(q, groups, slots, matching) -> int:
    batch, heads = q.shape[:2]
    return batch * heads * (matching**2 + groups * slots * (slots + matching))


def _group_attention(q, k, v, active, groups, slots, matching, *_) -> Own:
    return Own(1, 0, _time(_ATTENTION["forward"], _group_pairs(q, groups, slots, matching)))


def _group_attention_backward(grad_out, q, k, v, active, out, lse, groups, slots, matching, *_) -> Own:
    return Own(1, 0, _time(_ATTENTION["group backward"], _group_pairs(q, groups, slots, matching)))


def _conditional_attention(q_content, q_position, k_content, k_position, v, *_) -> Own:
    # Few queries and many keys would take one more, which joins parts of the keys.
    queries = v if k_content is None else q_content
    return Own(1, 0, _time(_ATTENTION["forward"], prod(queries.shape[:3]) * v.shape[2]))


def _conditional_attention_backward(grad_out, q_content, q_position, k_content, k_position, v, *_) -> Own:
    return Own(1, 0, _time(_ATTENTION["backward"], prod(grad_out.shape[:3]) * v.shape[2]))


def _samples(offsets, logits) -> int:
    """A projection that has both has three numbers for each."""
    return offsets.numel() // (3 if logits is None else 2)


def _deformable(value, shapes, reference_points, offsets, logits, valid_sizes) -> Own:
    return Own(1, 0, _time(_DEFORMABLE["forward"], _samples(offsets, logits)))


def _deformable_backward(grad_out, value, shapes, reference_points, offsets, logits, valid_sizes, wanted) -> Own:
    # Sums of value's gradient are float32: zeros first, rounded at the end. Where queries are pixels and numbers of
    # half precision, they have a kernel of their own. Gradients of reference points are added up over heads.
    samples = _samples(offsets, logits)
    half = value.element_size() == 2
    tiles = half and value.shape[3] == 32 and offsets.shape[1] == value.shape[1]
    names = ("points", "tiles") if tiles else ("atomics",)
    kernels = 1 + len(names) + half + wanted
    by_head = wanted * value.shape[2] * 4 * reference_points.numel() if wanted else 0
    scratch = (3 if half else 1) * 4 * value.numel() + 2 * by_head
    return Own(kernels, scratch, sum(_time(_DEFORMABLE[name], samples) for name in names))


OWN: dict[str, Callable[..., Own]] = {
    "activated_product": _activated_product,
    "activated_product_backward": _activated_product_backward,
    "add_norm": _add_norm,
    "add_norm_backward": _add_norm_backward,
    "anchor_encoding": _anchor_encoding,
    "anchor_encoding_backward": _anchor_encoding_backward,
    "column_sums": _column_sums,
    "conditional_attention": _conditional_attention,
    "conditional_attention_backward": _conditional_attention_backward,
    "frozen_norm": _frozen_norm,
    "frozen_norm_backward": _frozen_norm_backward,
    "group_attention": _group_attention,
    "group_attention_backward": _group_attention_backward,
    "level_sums": _level_sums,
    "match": _match,
    "ms_deform_attn": _deformable,
    "ms_deform_attn_backward": _deformable_backward,
    "normalise": lambda *_: Own(1),
    "pixel_encoding": _pixel_encoding,
    "prelu": lambda x, slope: Own(1, 0),
    "prelu_column_sums": _prelu_column_sums,
    "refine_boxes": _refine_boxes,
    "refine_boxes_backward": _refine_boxes_backward,
    "relu_column_sums": _column_sums,
    "set_loss": _set_loss,
    "set_loss_backward": _set_loss_backward,
    "stem": _stem,
}


def own_cost(name: str, args: tuple, kwargs: dict, result) -> tuple[Own, int]:
    """What an op of ours costs, and the bytes of its inputs and results; ValueError for one without an entry."""
    if name not in OWN:
        raise ValueError(
            f"{name} runs on no GPU, and is not counted: unset DNDETR_BACKEND and its like, where they are set (what a "
            "new op costs is to be said in dndetr/counting/own_ops.py)"
        )
    inputs = {id(tensor): touched(tensor) for tensor in tensors_in([*args, *kwargs.values()])}
    results = sum(map(touched, tensors_in(result)))
    return OWN[name](*args, **kwargs), sum(inputs.values()) + results
