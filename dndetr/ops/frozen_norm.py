"""What follows a convolution under a frozen batch norm, in one pass: scale, shift, shortcut and ReLU.

    y = x scale + shift + shortcut shortcut_scale + shortcut_shift        with ``relu`` its positive part

    g = grad y, with ``relu`` where y > 0, so nothing at y = 0
    grad x = g scale        grad shortcut = g shortcut_scale

A shortcut has a norm of its own where a convolution made it, otherwise it is added as it is. Scales and shifts are
fixed and get no gradient. Both passes compute in at least float32 and round once. Backward keeps of the maps y alone,
and that only for a ReLU: the convolution that reads y keeps it, too. Where y is taken twice grad y is the sum of two,
added on the way.
"""

import torch
from torch import Tensor

from . import _backend


def frozen_norm_reference(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    shortcut: Tensor | None = None,
    relu: bool = False,
    shortcut_scale: Tensor | None = None,
    shortcut_shift: Tensor | None = None,
) -> Tensor:
    """The specification in plain torch; arguments and result as :func:`frozen_norm`."""
    y = _normed(x, scale, shift)
    if shortcut is not None:
        y = y + (shortcut if shortcut_scale is None else _normed(shortcut, shortcut_scale, shortcut_shift))
    return (torch.where(y <= 0, 0, y) if relu else y).to(x.dtype)


def _normed(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    scale, shift = (each.detach()[:, None, None] for each in (scale, shift))
    return x.to(torch.promote_types(x.dtype, torch.float32)) * scale + shift


torch.library.define(
    "dndetr::frozen_norm",
    "(Tensor x, Tensor scale, Tensor shift, Tensor? shortcut, bool relu,"
    " Tensor? shortcut_scale, Tensor? shortcut_shift) -> Tensor",
)
torch.library.define(
    "dndetr::frozen_norm_backward",
    "(Tensor grad_y, Tensor? grad_twin, Tensor? y, Tensor scale, Tensor? shortcut_scale, bool needs_x,"
    " bool needs_shortcut) -> (Tensor, Tensor)",
)


@torch.library.impl("dndetr::frozen_norm", ("cpu", "cuda"))
def _forward(x, scale, shift, shortcut, relu, shortcut_scale, shortcut_shift):
    from ..kernels.frozen_norm import frozen_norm_forward

    y = _forward_fake(x, scale, shift, shortcut, relu, shortcut_scale, shortcut_shift)
    scale, shift, *of_shortcut = map(_dense, (scale, shift, shortcut_scale, shortcut_shift))
    with torch.cuda.device_of(x):
        frozen_norm_forward(_packed(x), scale, shift, _packed(shortcut), *of_shortcut, relu, y)
    return y


@torch.library.impl("dndetr::frozen_norm_backward", ("cpu", "cuda"))
def _backward(grad_y, grad_twin, y, scale, shortcut_scale, needs_x, needs_shortcut):
    from ..kernels.frozen_norm import frozen_norm_backward

    grads = grad_x, grad_shortcut = _backward_fake(grad_y, grad_twin, y, scale, shortcut_scale, needs_x, needs_shortcut)
    maps = map(_packed, (grad_y, grad_twin, y))
    asked = grad_x if needs_x else None, grad_shortcut if needs_shortcut else None
    with torch.cuda.device_of(grad_y):
        frozen_norm_backward(*maps, _dense(scale), _dense(shortcut_scale), *asked)
    return grads


def _dense(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def _packed(x: Tensor | None) -> Tensor | None:
    """The map, or a copy, with its channels last in memory."""
    return None if x is None else x.contiguous(memory_format=torch.channels_last)


@torch.library.register_fake("dndetr::frozen_norm")
def _forward_fake(x, scale, shift, shortcut, relu, shortcut_scale, shortcut_shift):
    return torch.empty_like(x, memory_format=torch.channels_last)


@torch.library.register_fake("dndetr::frozen_norm_backward")
def _backward_fake(grad_y, grad_twin, y, scale, shortcut_scale, needs_x, needs_shortcut):
    return tuple(
        torch.empty_like(grad_y, memory_format=torch.channels_last) if needed else grad_y.new_empty(0)
        for needed in (needs_x, needs_shortcut)
    )


def _setup_context(ctx, inputs, output):
    _, scale, _, _, ctx.relu, shortcut_scale, _ = inputs
    ctx.save_for_backward(scale, shortcut_scale, output if ctx.relu else None)


def _differentiate(ctx, grad_y, grad_twin=None):
    scale, shortcut_scale, y = ctx.saved_tensors
    needs_x, _, _, needs_shortcut, *_ = ctx.needs_input_grad
    # Otherwise the shortcut's gradient is there already.
    changes = ctx.relu or shortcut_scale is not None or grad_twin is not None
    writes_shortcut = needs_shortcut and changes
    grad_x, grad_shortcut = None, grad_y if needs_shortcut else None
    if needs_x or writes_shortcut:
        given = grad_y, grad_twin, y, scale, shortcut_scale
        written = torch.ops.dndetr.frozen_norm_backward(*given, needs_x, writes_shortcut)
        grad_x = written[0] if needs_x else None
        grad_shortcut = written[1] if writes_shortcut else grad_shortcut
    return grad_x, None, None, grad_shortcut, None, None, None


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        y = torch.ops.dndetr.frozen_norm(*inputs)
        ctx.set_materialize_grads(False)
        _setup_context(ctx, inputs, y)
        return y, y.view_as(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        given = [grad for grad in grads if grad is not None]
        return _differentiate(ctx, *given) if given else (None,) * 7


torch.library.register_autograd("dndetr::frozen_norm", _differentiate, setup_context=_setup_context)
_backend.differentiable_once("frozen_norm")


def frozen_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    shortcut: Tensor | None = None,
    relu: bool = False,
    shortcut_scale: Tensor | None = None,
    shortcut_shift: Tensor | None = None,
    backend: str | None = None,
    twice: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scale and shift of each channel, the sum with a shortcut, which may have its own, and its positive part.

    x [B, C, H, W], scale, shift, shortcut_scale, shortcut_shift [C], which get no gradient, shortcut like x ->
    [B, C, H, W] of x's dtype. The kernel's results have their channels last in memory and can be differentiated once.
    With ``twice`` the result and itself again, for two that take it: their gradients are added in the same pass.
    ValueError for other shapes, and for one of shortcut_scale and shortcut_shift without the other or a shortcut.
    """
    if x.dim() != 4 or not scale.shape == shift.shape == x.shape[1:2]:
        shapes = f"{list(x.shape)}, {list(scale.shape)}, {list(shift.shape)}"
        raise ValueError(f"frozen_norm: x must be [B, C, H, W], scale and shift [C]; got {shapes}")
    if shortcut is not None and (shortcut.shape, shortcut.dtype) != (x.shape, x.dtype):
        wanted, given = (f"{list(tensor.shape)} of {tensor.dtype}" for tensor in (x, shortcut))
        raise ValueError(f"frozen_norm: shortcut must be {wanted} as x is, got {given}")
    norm = [None if each is None else list(each.shape) for each in (shortcut_scale, shortcut_shift)]
    if norm != [None, None] and (shortcut is None or norm != [[x.shape[1]]] * 2):
        wanted = "shortcut_scale and shortcut_shift must be [C] and come together, with a shortcut"
        raise ValueError(f"frozen_norm: {wanted}; got {norm[0]}, {norm[1]}{' without one' * (shortcut is None)}")
    given = x, scale, shift, shortcut, relu, shortcut_scale, shortcut_shift
    if _backend.choose("frozen_norm", backend, x.device.type)[0] == "reference":
        y = frozen_norm_reference(*given)
        return (y, y) if twice else y
    if twice and not torch.compiler.is_compiling():
        return _Twice.apply(*given)
    y = torch.ops.dndetr.frozen_norm(*given)
    return (y, y) if twice else y


# name: (B, C, H, W, dtype)
CASES = {
    "tiny": (2, 3, 2, 3, torch.float32),
    "f64": (2, 12, 3, 4, torch.float64),
    "bf16": (2, 64, 9, 7, torch.bfloat16),
    "f16": (2, 64, 9, 7, torch.float16),
    "eights": (1, 24, 14, 15, torch.bfloat16),
    "uneven": (2, 91, 11, 5, torch.float32),
    "tiles-of-channels": (1, 300, 5, 4, torch.bfloat16),
    "many-pixels": (2, 8, 31, 33, torch.float32),
    "one-channel": (2, 1, 3, 5, torch.float32),
    "one-pixel": (3, 64, 1, 1, torch.bfloat16),
    "no-images": (0, 64, 4, 4, torch.bfloat16),
    "no-pixels": (2, 64, 0, 4, torch.float32),
    "resnet": (2, 1024, 25, 42, torch.bfloat16),
}


def make_case(name: str, device: str = "cpu", seed: int = 0) -> tuple[Tensor, ...]:
    """(x, scale, shift, shortcut, shortcut_scale, shortcut_shift), maps with their channels last in memory."""
    *shape, dtype = CASES[name]
    draw = torch.Generator().manual_seed(seed)
    precise = torch.promote_types(dtype, torch.float32)
    x, shortcut = (
        torch.randn(shape, generator=draw, dtype=precise).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    scale, shift, *norm = (torch.randn(shape[1], generator=draw, dtype=precise).to(device) for _ in range(4))
    return x.to(device, dtype), scale, shift, shortcut.to(device, dtype), *norm


def _self_test(device_type: str) -> float:
    # In bfloat16 and of 64 channels: the kernels that training compiles.
    x, scale, shift, shortcut, *own = make_case("bf16", device_type)
    exact = [each.double().requires_grad_() for each in (x, shortcut)]
    weighting = torch.linspace(-1, 1, x.numel(), device=device_type).view(x.shape).to(x.dtype)
    found, expected = [], []
    for norm in ((None, None), own):
        in_double = [None if each is None else each.double() for each in norm]
        with torch.enable_grad():
            result = frozen_norm_reference(exact[0], scale.double(), shift.double(), exact[1], True, *in_double)
        grads = weighting.double() * (1 if norm[0] is None else 2)
        expected += result.detach(), *torch.autograd.grad(result, exact, grads)
        y = torch.ops.dndetr.frozen_norm(x, scale, shift, shortcut, True, *norm)
        grads = weighting, None if norm[0] is None else weighting
        found += y, *torch.ops.dndetr.frozen_norm_backward(*grads, y, scale, norm[0], True, True)
    return _backend.error_beyond_rounding(found, expected)


_backend.register(
    "frozen_norm",
    _backend.Backend("triton", ("cuda",), _backend.triton_obstacle, _self_test, tolerance=1e-5),
)
