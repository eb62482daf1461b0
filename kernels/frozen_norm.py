"""Scale, shift, shortcut and ReLU of a map: a program takes a tile of pixels and channels, every number once."""

import torch
import triton
import triton.language as tl

_TILE = 4096  # numbers of a tile: four vectors of 16 bytes in bfloat16 for each thread, of each map
_NUMBERS = ["rows", "packs"]  # no kernels of their own for some sizes


@triton.jit
def _place(rows, channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where the program's tile begins, its places from there, its channels, and what of both there is."""
    across = tl.cdiv(channels, BLOCK_C)
    first = (tl.program_id(0) // across).to(tl.int64) * BLOCK_R  # maps may have 2**31 numbers, a tile has not
    r = tl.arange(0, BLOCK_R)
    c = tl.program_id(0) % across * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (r < rows - first)[:, None] & (c < channels)[None, :]
    return first * channels, r[:, None] * channels + c[None, :], c, inside


@triton.jit
def _row(values, c, channels, PRECISE: tl.constexpr):
    """Values of the program's channels, for every pixel."""
    return tl.load(values + c, mask=c < channels, other=0.0).to(PRECISE)[None, :]


@triton.jit(do_not_specialize=_NUMBERS)
def frozen_norm_forward_kernel(
    x,  # [rows, channels], as all maps
    scale,  # [channels]
    shift,  # [channels]
    shortcut,  # or None
    shortcut_scale,  # [channels], or None: the shortcut has no norm
    shortcut_shift,  # the same
    y,
    rows,
    packs,  # channels / PACK
    RELU: tl.constexpr,
    PRECISE: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = packs * PACK
    start, place, c, inside = _place(rows, channels, BLOCK_R, BLOCK_C)
    value = tl.load(x + start + place, mask=inside, other=0.0).to(PRECISE)
    added = 0.0
    if shortcut is not None:
        added = tl.load(shortcut + start + place, mask=inside, other=0.0).to(PRECISE)
    plus = _row(shift, c, channels, PRECISE)
    if shortcut_scale is not None:
        added *= _row(shortcut_scale, c, channels, PRECISE)
        plus += _row(shortcut_shift, c, channels, PRECISE)  # both in one row: two of them spilled on 8.0
    value = value * _row(scale, c, channels, PRECISE) + plus + added
    if RELU:
        value = tl.where(value < 0.0, 0.0, value)  # what is not a number stays so
    tl.store(y + start + place, value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_NUMBERS)
def frozen_norm_backward_kernel(
    grad_y,  # [rows, channels], as all maps
    grad_twin,  # or None: y was taken once
    y,  # or None: there was no ReLU
    scale,  # [channels]
    shortcut_scale,  # [channels], or None: the shortcut has no norm
    grad_x,  # or None
    grad_shortcut,  # or None
    rows,
    packs,  # channels / PACK
    PRECISE: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = packs * PACK
    start, place, c, inside = _place(rows, channels, BLOCK_R, BLOCK_C)
    grad = tl.load(grad_y + start + place, mask=inside, other=0.0).to(PRECISE)
    if grad_twin is not None:
        grad += tl.load(grad_twin + start + place, mask=inside, other=0.0).to(PRECISE)
    if y is not None:
        result = tl.load(y + start + place, mask=inside, other=0.0).to(PRECISE)
        grad = tl.where(result <= 0.0, 0.0, grad)  # as torch's: none at zero, all of it at what is not a number
    if grad_x is not None:
        scaled = grad * _row(scale, c, channels, PRECISE)
        tl.store(grad_x + start + place, scaled.to(grad_x.dtype.element_ty), mask=inside)
    if grad_shortcut is not None:
        if shortcut_scale is not None:
            grad = grad * _row(shortcut_scale, c, channels, PRECISE)
        tl.store(grad_shortcut + start + place, grad.to(grad_shortcut.dtype.element_ty), mask=inside)


def _launch(kernel, like: torch.Tensor, *tensors, **constants) -> None:
    """Run ``kernel`` on maps of the shape and dtype of ``like``, [B, C, H, W] with their channels last in memory."""
    if like.numel() == 0:
        return
    channels = like.shape[1]
    rows, plan = like.numel() // channels, tile(channels)
    programs = triton.cdiv(rows, plan["BLOCK_R"]) * triton.cdiv(channels, plan["BLOCK_C"])
    precise = tl.float64 if like.dtype == torch.float64 else tl.float32
    kernel[(programs,)](*tensors, rows, channels // plan["PACK"], PRECISE=precise, **constants, **plan, num_warps=4)


def tile(channels: int) -> dict[str, int]:
    """How channels are read: in whole vectors where they divide by eight, and up to 64 of a pixel by one program.

    With more, scales and shifts would reach their threads by way of shared memory; 64 are a cache line or two.
    """
    block_c = min(triton.next_power_of_2(channels), 64)
    return {"PACK": min(channels & -channels, 16), "BLOCK_R": _TILE // block_c, "BLOCK_C": block_c}


def frozen_norm_forward(x, scale, shift, shortcut, shortcut_scale, shortcut_shift, relu, y) -> None:
    """Write y; maps [B, C, H, W] have their channels last in memory, the shortcut and its norm may be None."""
    of_shortcut = shortcut, shortcut_scale, shortcut_shift
    _launch(frozen_norm_forward_kernel, x, x, scale, shift, *of_shortcut, y, RELU=relu)


def frozen_norm_backward(grad_y, grad_twin, y, scale, shortcut_scale, grad_x, grad_shortcut) -> None:
    """Write grad_x and grad_shortcut, or the one that is not None.

    grad_twin is None where the result was taken once, y where there was no ReLU, shortcut_scale where the shortcut has
    no norm.
    """
    _launch(frozen_norm_backward_kernel, grad_y, grad_y, grad_twin, y, scale, shortcut_scale, grad_x, grad_shortcut)
