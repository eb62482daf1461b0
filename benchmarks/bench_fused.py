"""Few kernels of ours where torch needs many, or slow ones: what surrounds products and convolutions.

As bfloat16 training has them. ``pytest benchmarks/bench_fused.py -s --results FILE``, on a GPU only: the device's own
time, forward and both passes, with the bytes that have to move and the share of a copy's rate at which ours moves them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import ceilings
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dndetr.ops import (
    activated_product,
    activated_product_backward,
    add_norm,
    anchor_encoding,
    column_sums,
    frozen_norm,
    level_sums,
    pixel_encoding,
    prelu,
    prelu_column_sums,
    refine_boxes,
    relu_column_sums,
    stem,
)

BF16 = torch.bfloat16
EPS = 1e-5


class Contest(NamedTuple):
    """Functions without arguments by name, ours and another, and what of their inputs gets a gradient.

    forward, backward: bytes that passes move; operations: of the forward pass's products, where those matter.
    """

    functions: dict[str, Callable[[], Tensor | tuple[Tensor | None, ...]]]
    leaves: list[Tensor]
    forward: int
    backward: int
    operations: int = 0


def of_frozen_norm(shape, with_norm, device="cuda", backend="triton") -> Contest:
    """The end of a residual block, its shortcut maybe with a norm; scales are one: torch has them in its weights."""
    x, shortcut = (
        torch.randn(shape, device=device).to(BF16, memory_format=torch.channels_last).requires_grad_() for _ in range(2)
    )
    scale, shifts = torch.ones(shape[1], device=device), torch.randn(2, shape[1], device=device)
    own = (scale, shifts[1]) if with_norm else (None, None)
    bias, other = shifts.to(BF16)[:, :, None, None]
    functions = {
        "ours": lambda: frozen_norm(x, scale, shifts[0], shortcut, True, *own, backend),
        "torch": lambda: (x + bias).add_(shortcut + other if with_norm else shortcut).relu_(),
    }
    return Contest(functions, [x, shortcut], forward=3 * x.nbytes, backward=4 * x.nbytes)


def of_stem(shape, channels=64, dtype=BF16, device="cuda", backend="triton") -> Contest:
    """Images, which get no gradient, as a batch has them."""
    images = torch.randn(shape, device=device)
    weight = torch.randn(channels, 3, 7, 7, device=device).to(dtype) / 12
    scale, shift = torch.ones(channels, device=device), torch.randn(channels, device=device)
    bias, like_maps = shift.to(dtype)[:, None, None], weight.contiguous(memory_format=torch.channels_last)

    def plain():
        x = images.contiguous(memory_format=torch.channels_last).to(dtype)
        return F.max_pool2d(F.conv2d(x, like_maps, stride=2, padding=3).add_(bias).relu_(), 3, 2, 1)

    functions = {"ours": lambda: stem(images, weight, scale, shift, backend), "torch": plain}
    height, width = ((size + 1) // 2 for size in shape[2:])
    squares, convolved = (height + 3) * (width + 3) * 16, height * width * channels
    pooled = ((height + 1) // 2) * ((width + 1) // 2) * channels
    # Between its three kernels, squares of pixels and what was convolved are written and read.
    return Contest(functions, [], images.nbytes + shape[0] * dtype.itemsize * (2 * squares + 2 * convolved + pooled), 0)


def of_add_norm(shape, with_position, device="cuda", backend="triton") -> Contest:
    """The end of a block of the encoder; positions are fixed."""
    x, y = (torch.randn(shape, device=device).to(dtype).requires_grad_() for dtype in (torch.float32, BF16))
    position = torch.randn(shape, device=device) if with_position else None
    weight, bias = (values.requires_grad_() for values in torch.randn(2, shape[-1], device=device).unbind())

    def plain():
        out = F.layer_norm(x + y.float(), weight.shape, weight, bias, EPS)
        return out, out.to(BF16), None if position is None else (out + position).to(BF16)

    functions = {"ours": lambda: add_norm(x, y, weight, bias, EPS, position, backend), "torch": plain}
    full, low = x.nbytes, y.nbytes
    # Read and written are x, y, out, low and what a position adds; forward also writes the normed rows for backward.
    forward = 3 * full + 2 * low + with_position * (full + low)
    backward = 3 * full + 2 * low + with_position * low
    return Contest(functions, [x, y, weight, bias], forward, backward)


def of_column_sums(size, activation=None, device="cuda", backend="triton") -> Contest:
    """The gradient of a bias, behind an activation: itself part of backward, and not differentiable."""
    grad, out = (torch.randn(size, device=device).to(BF16) for _ in range(2))
    slope = torch.full((1,), 0.25, device=device)

    def masked_sums():
        masked = torch.ops.aten.threshold_backward(grad, out, 0)
        return masked, masked.sum(0)

    def sloped_sums():
        # As autograd has it under autocast.
        masked, of_slope = torch.ops.aten._prelu_kernel_backward(grad, out, slope.to(BF16).view(1, 1))
        return masked, masked.sum(0), of_slope.sum_to_size(1, 1).view(1).float()

    functions = {
        None: {"ours": lambda: column_sums(grad, backend), "torch": lambda: grad.sum(0)},
        "ReLU": {"ours": lambda: relu_column_sums(grad, out, backend), "torch": masked_sums},
        "PReLU": {"ours": lambda: prelu_column_sums(grad, out, slope, backend), "torch": sloped_sums},
    }
    return Contest(functions[activation], [], forward=(3 if activation else 1) * grad.nbytes, backward=0)


def of_level_sums(images, sizes, columns=256, device="cuda", backend="triton") -> Contest:
    """The gradient of the level embedding by one layer, and what it takes where positions have gradients."""
    grad = torch.randn(images, sum(sizes), columns, device=device).to(BF16)
    others = torch.zeros(grad.shape, device=device)

    def met():
        return torch.stack([level.sum((0, 1)) for level in (others + grad.float()).split(list(sizes), dim=1)])

    functions = {"ours": lambda: level_sums(grad, sizes, backend), "torch": met}
    return Contest(functions, [], forward=grad.nbytes, backward=0)


def of_prelu(size, device="cuda", backend="triton") -> Contest:
    """The activation of a feed-forward block; its gradient is one of column_sums' contests."""
    x, slope = torch.randn(size, device=device).to(BF16), torch.full((1,), 0.25, device=device)
    functions = {"ours": lambda: prelu(x, slope, backend), "torch": lambda: F.prelu(x, slope.to(BF16))}
    return Contest(functions, [], forward=2 * x.nbytes, backward=0)


def of_refine_boxes(shape, device="cuda", backend="triton") -> Contest:
    """The end of a decoder layer, whose boxes have a gradient, too."""
    correction = torch.randn(shape, device=device).to(BF16).requires_grad_()
    boxes = (0.01 + 0.98 * torch.rand(shape, device=device)).requires_grad_()
    functions = {
        "ours": lambda: refine_boxes(correction, boxes, backend),
        "torch": lambda: (correction + torch.logit(boxes, 1e-3)).sigmoid(),
    }
    forward, backward = correction.nbytes + 2 * boxes.nbytes, correction.nbytes + 4 * boxes.nbytes
    return Contest(functions, [correction, boxes], forward, backward)


def of_pixel_encoding(images, canvas, levels, width=256, device="cuda", backend="triton") -> Contest:
    """Where tokens are, which nothing needs a gradient of; the levels halve from an eighth of the canvas on."""
    shapes = tuple(tuple(-(-side // 2 ** (3 + level)) for side in canvas) for level in range(levels))
    sides = torch.tensor(shapes, device=device)
    sizes = sides.expand(images, -1, -1).contiguous()
    given = (sizes, shapes, sides, width, (20.0, 20.0), 0.0, torch.float32)
    functions = {
        "ours": lambda: pixel_encoding(*given, backend),
        "torch": lambda: pixel_encoding(*given, "reference"),
    }
    return Contest(functions, [], images * sum(h * w for h, w in shapes) * width * 4, 0)


def of_anchor_encoding(shape, channels=128, device="cuda", backend="triton") -> Contest:
    """What a decoder layer's positions are made from, with a gradient as the first layer's anchors have."""
    boxes = torch.rand(shape, device=device).requires_grad_()
    functions = {
        "ours": lambda: anchor_encoding(boxes, channels, backend),
        "torch": lambda: anchor_encoding(boxes, channels, "reference"),
    }
    encoded = channels * boxes.nbytes
    return Contest(functions, [boxes], boxes.nbytes + encoded, 2 * boxes.nbytes + encoded)


def of_activated_product(size, activation, backward, device="cuda", backend="triton", dtype=BF16) -> Contest:
    """The first product of a feed-forward block, or the one that gives the gradient of what its activation was given.

    size: rows, terms, hidden width. Against product and pass, the latter also of our own kernels.
    """
    rows, terms, columns = size
    x, weight, bias, kept = (
        torch.randn(*shape, device=device).to(dtype)
        for shape in ((rows, terms), (columns, terms), (columns,), (rows, columns))
    )
    slope = torch.full((1,), 0.25, device=device) if activation == "PReLU" else None
    after = weight.t().contiguous()

    def taken(backend):
        if backward:
            return lambda: activated_product_backward(x, after, kept, slope, backend)
        return lambda: activated_product(x, weight, bias, slope, True, backend)

    results = 2 if backward or slope is not None else 1  # one of them is read, backward
    moved = x.nbytes + weight.nbytes + results * kept.nbytes
    operations = 2 * rows * terms * columns
    return Contest({"ours": taken(backend), "two steps": taken("reference")}, [], moved, 0, operations)


CONTESTS = {
    **{
        f"pixel_encoding, {images} x {levels} levels": partial(of_pixel_encoding, images, (800, 1333), levels)
        for images, levels in ((2, 4), (16, 1))
    },
    **{f"anchor_encoding, {shape}": partial(of_anchor_encoding, shape) for shape in ((2, 460, 4), (16, 1092, 4))},
    **{f"refine_boxes, {shape}": partial(of_refine_boxes, shape) for shape in ((2, 460, 4), (16, 1092, 4))},
    **{f"stem, {shape}": partial(of_stem, shape) for shape in ((2, 3, 800, 1333), (16, 3, 800, 1333))},
    **{
        f"frozen_norm{', of the shortcut, too' * normed}, {layer} {shape}": partial(of_frozen_norm, shape, normed)
        for layer, shape, normed in (
            ("layer1", (2, 256, 200, 334), False),
            ("layer3", (16, 1024, 50, 84), False),
            ("layer3", (16, 1024, 50, 84), True),
        )
    },
    **{
        f"add_norm{', with position' * position}, {shape}": partial(of_add_norm, shape, position)
        for shape in ((2, 22223, 256), (16, 1050, 256))
        for position in (False, True)
    },
    **{
        f"column_sums{', behind a ReLU' * bool(activation)}, {size}": partial(of_column_sums, size, activation)
        for size in ((2100, 256), (44446, 256), (44446, 2048))
        for activation in (None, "ReLU")
    },
    **{f"level_sums, {n}": partial(of_level_sums, n, (16700, 4200, 1050, 273)) for n in (2, 16)},
    **{
        f"{name}, {size}": contest
        for size in ((2100, 2048), (16800, 2048))
        for name, contest in (
            ("column_sums, behind a PReLU", partial(of_column_sums, size, "PReLU")),
            ("prelu", partial(of_prelu, size)),
        )
    },
    **{
        f"activated_product{'_backward' * backward}, {activation}, {size}": partial(
            of_activated_product, size, activation, backward
        )
        for size, activation in (
            ((44446, 256, 2048), "ReLU"),  # encoder and decoder of the deformable detector, 2 images
            ((1000, 256, 2048), "ReLU"),
            ((16800, 256, 2048), "PReLU"),  # of the dense one, 16 images
            ((8000, 256, 2048), "PReLU"),
            ((1000, 256, 256), "ReLU"),  # an MLP
            ((44446, 1024, 2048), "ReLU"),  # more terms than the kernel is taken for
        )
        for backward in (False, True)
    },
}


def results(function: Callable) -> list[Tensor]:
    """What a function returns, without what is not there."""
    found = function()
    return [found] if isinstance(found, Tensor) else [result for result in found if result is not None]


def gradients(function: Callable, leaves: Sequence[Tensor], weighting: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of the results, each weighted."""
    return torch.autograd.grad(results(function), leaves, weighting)


def compete(record: Callable, name: str, contest: Contest, copy: float) -> None:
    """Record and print the passes of a contest; copy: bytes per second of one."""
    passes = {"forward": (contest.forward, contest.functions)}
    if contest.leaves:
        weighting = [torch.randn_like(result) for result in results(contest.functions["ours"])]
        both = {who: partial(gradients, f, contest.leaves, weighting) for who, f in contest.functions.items()}
        passes["forward and backward"] = contest.forward + contest.backward, both
    for which, (moved, functions) in passes.items():
        seconds = {who: ceilings.gpu_seconds(function) for who, function in functions.items()}
        told = {"bytes": moved, "share_of_copy": moved / seconds["ours"] / copy}
        if contest.operations:
            told["operations_per_second"] = contest.operations / seconds["ours"]
        record(f"{name}, {which}", seconds, **told, detail=True)
        (other,) = seconds.keys() - {"ours"}
        ratio, share = seconds[other] / seconds["ours"], told["share_of_copy"]
        print(
            f"\n{name}, {which}: ours {seconds['ours'] * 1e6:.1f} us, {other} {ratio:.2f}x that; {share:.0%} of a copy"
        )


@pytest.fixture(scope="module")
def copy():
    """Bytes per second of a large copy, read and written."""
    return ceilings.gpu_copy()


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONTESTS)
def bench_fused(record, copy, name):
    compete(record, name, CONTESTS[name](), copy)
