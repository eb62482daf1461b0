"""Residual sum and layer norm, and what the next layer's projections take of the result, in one pass each way.

    s = x + y,  n = (s - mean(s)) r,  r = 1 / sqrt(var(s) + eps),  out = n weight + bias

over the last dimension. Under autocast the residual stream x is float32 and what a layer adds to it has less precision;
so have the inputs of the next projections: ``low`` is out, ``positioned`` is out + position, both rounded to y's type.

With g the sum of the gradients of all three results and h = g weight:

    ds = r (h - mean(h) - n mean(h n)),  dweight = sum over rows of g n,  dbias = sum over rows of g

The Triton kernels (kernels/add_norm.py) work in float32, keep n and r, and add in an order that the shape decides.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _backend

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDEST = 1024  # columns: a row stays in the registers of one program


def add_norm_reference(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float, position: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The specification in plain torch; arguments and result as :func:`add_norm`."""
    precise = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    added = x.to(precise) + y.to(precise)
    normed = F.layer_norm(added, weight.shape, weight.to(precise), bias.to(precise), eps)
    out = normed.to(x.dtype)
    low = out if y.dtype == x.dtype else normed.to(y.dtype)
    return out, low, None if position is None else (normed + position).to(y.dtype)


# What is not there is an empty tensor: an op's results are tensors, no two of them the same.
torch.library.define(
    "dndetr::add_norm",
    "(Tensor x, Tensor y, Tensor weight, Tensor bias, Tensor? position, float eps, bool keep)"
    " -> (Tensor out, Tensor low, Tensor positioned, Tensor normalized, Tensor rstd)",
)
torch.library.define(
    "dndetr::add_norm_backward",
    "(Tensor? grad_out, Tensor? grad_low, Tensor? grad_positioned, Tensor normalized, Tensor rstd, Tensor weight,"
    " ScalarType x_dtype, ScalarType y_dtype) -> (Tensor grad_x, Tensor grad_y, Tensor grad_weight, Tensor grad_bias)",
)


@torch.library.impl("dndetr::add_norm", ("cpu", "cuda"))
def _forward(x, y, weight, bias, position, eps, keep):
    from ..kernels.add_norm import add_norm_forward

    results = _forward_fake(x, y, weight, bias, position, eps, keep)
    out, low, positioned, normalized, rstd = results
    x, y, weight, bias = (tensor.contiguous() for tensor in (x, y, weight, bias))
    low = None if y.dtype == x.dtype else low
    position, positioned = (None, None) if position is None else (position.contiguous(), positioned)
    normalized, rstd = (normalized, rstd) if keep else (None, None)
    with torch.cuda.device_of(x):
        add_norm_forward(x, y, weight, bias, position, eps, out, low, positioned, normalized, rstd)
    return results


@torch.library.impl("dndetr::add_norm_backward", ("cpu", "cuda"))
def _backward(grad_out, grad_low, grad_positioned, normalized, rstd, weight, x_dtype, y_dtype):
    from ..kernels.add_norm import add_norm_backward

    grads = _backward_fake(grad_out, grad_low, grad_positioned, normalized, rstd, weight, x_dtype, y_dtype)
    grad_x, grad_y, grad_weight, grad_bias = grads
    # torch.compile has a gradient, as empty, for a result that is not there.
    given = [
        grad.contiguous() if grad is not None and grad.numel() else None
        for grad in (grad_out, grad_low, grad_positioned)
    ]
    grad_y = None if y_dtype == x_dtype else grad_y
    with torch.cuda.device_of(normalized):
        add_norm_backward(*given, normalized, rstd, weight.contiguous(), grad_x, grad_y, grad_weight, grad_bias)
    return grads


@torch.library.register_fake("dndetr::add_norm")
def _forward_fake(x, y, weight, bias, position, eps, keep):
    nothing = (0,)
    return (
        x.new_empty(x.shape),
        y.new_empty(nothing if y.dtype == x.dtype else x.shape),
        y.new_empty(nothing if position is None else x.shape),
        x.new_empty(x.shape if keep else nothing, dtype=torch.float32),
        x.new_empty(x.shape[:-1] if keep else nothing, dtype=torch.float32),
    )


@torch.library.register_fake("dndetr::add_norm_backward")
def _backward_fake(grad_out, grad_low, grad_positioned, normalized, rstd, weight, x_dtype, y_dtype):
    return (
        normalized.new_empty(normalized.shape, dtype=x_dtype),
        normalized.new_empty((0,) if y_dtype == x_dtype else normalized.shape, dtype=y_dtype),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape),
    )


def _setup_context(ctx, inputs, output):
    x, y, weight, _bias, position, _eps, _keep = inputs
    _out, _low, _positioned, normalized, rstd = output
    ctx.mark_non_differentiable(normalized, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(normalized, rstd, weight)
    ctx.dtypes = x.dtype, y.dtype
    ctx.position_dtype = None if position is None else position.dtype


def _differentiate(ctx, grad_out, grad_low, grad_positioned, _grad_normalized, _grad_rstd):
    given = grad_out, grad_low, grad_positioned
    if all(grad is None for grad in given):
        return (None,) * 7
    grad_x, grad_y, *grads = torch.ops.dndetr.add_norm_backward(*given, *ctx.saved_tensors, *ctx.dtypes)
    x_dtype, y_dtype = ctx.dtypes
    asked = grad_positioned is not None and ctx.needs_input_grad[4]
    grad_position = grad_positioned.to(ctx.position_dtype) if asked else None
    return grad_x, grad_x if y_dtype == x_dtype else grad_y, *grads, grad_position, None, None


torch.library.register_autograd("dndetr::add_norm", _differentiate, setup_context=_setup_context)
_backend.differentiable_once("add_norm")


def add_norm(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    position: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The layer norm of x + y, its rounding to y's dtype, and that of its sum with ``position``.

    x, y, position [..., C], weight, bias [C] -> out in x's dtype, low and positioned in y's, all [..., C]; low is out
    itself where the dtypes are the same, positioned None without a position. Computed in float32, or float64. What the
    kernel does not take (float64, C above 1024) is torch's. ValueError for other shapes.
    """
    width = x.shape[-1:]
    shapes = {"y": (y, x.shape), "weight": (weight, width), "bias": (bias, width), "position": (position, x.shape)}
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"add_norm: {name} must be {list(shape)} with x {list(x.shape)}, got {list(tensor.shape)}")
    given = [tensor for tensor in (x, y, weight, bias, position) if tensor is not None]
    takes = all(tensor.dtype in _DTYPES for tensor in given) and 0 < width[0] <= _WIDEST
    if not takes or _backend.choose("add_norm", backend, x.device.type)[0] == "reference":
        return add_norm_reference(x, y, weight, bias, eps, position)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    out, low, positioned, _, _ = torch.ops.dndetr.add_norm(x, y, weight, bias, position, eps, keep)
    return out, out if y.dtype == x.dtype else low, None if position is None else positioned


# name: (shape of x, its dtype, the dtype of y, whether there is a position)
CASES = {
    "tiny": ((2, 5, 36), torch.float32, torch.float32, True),
    "nobody": ((2, 0, 64), torch.float32, torch.bfloat16, True),
    "one-row": ((1, 128), torch.float32, torch.bfloat16, True),
    "no-position": ((2, 9, 256), torch.float32, torch.bfloat16, False),
    "encoder": ((2, 9, 256), torch.float32, torch.bfloat16, True),
    "half": ((3, 7, 256), torch.float32, torch.float16, True),
    "all-low": ((2, 11, 128), torch.bfloat16, torch.bfloat16, True),
    "wide": ((3, 1000), torch.float32, torch.float32, True),
    "many-rows": ((4500, 256), torch.float32, torch.bfloat16, True),  # more than a round of the backward's programs
}


def make_case(name: str, device: str = "cpu", seed: int = 0) -> tuple:
    """(x, y, weight, bias, eps, position) of a case."""
    shape, x_dtype, y_dtype, positions = CASES[name]
    draw = torch.Generator().manual_seed(seed)
    x, y, position = (torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(3))
    weight, bias = torch.randn(2, shape[-1], generator=draw)
    position = position.to(device, torch.float32) if positions else None
    return (3 * x + 1).to(device, x_dtype), y.to(device, y_dtype), weight.to(device), bias.to(device), 1e-5, position


def _self_test(device_type: str) -> float:
    # A float32 stream with bfloat16 added to it, 256 wide: the kernels that training compiles.
    x, y, weight, bias, eps, position = make_case("encoder", device_type)
    exact = [tensor.double().requires_grad_() for tensor in (x, y, weight, bias)]
    slant = torch.linspace(-1, 2, y.numel(), device=y.device).view_as(y).to(y.dtype)
    slants = slant.to(x.dtype), 2 * slant, 4 * slant
    with torch.enable_grad():
        expected = add_norm_reference(*exact, eps, position.double())
    exact_grads = torch.autograd.grad(expected, exact, [each.double() for each in slants])
    *results, normalized, rstd = torch.ops.dndetr.add_norm(x, y, weight, bias, position, eps, True)
    grads = torch.ops.dndetr.add_norm_backward(*slants, normalized, rstd, weight, x.dtype, y.dtype)
    return _backend.error_beyond_rounding((*results, *grads), (*(each.detach() for each in expected), *exact_grads))


_backend.register(
    "add_norm", _backend.Backend("triton", ("cuda",), _backend.triton_obstacle, _self_test, tolerance=1e-4)
)
