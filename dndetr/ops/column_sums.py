"""Gradient of a linear layer's bias: sums over the rows of the output's gradient, behind the activation that follows.

    sums[n] = sum over m of grad[m, n], with an activation of masked[m, n]

    ReLU of result out:         masked[m, n] = grad[m, n] where not out[m, n] <= 0, else 0
    PReLU of x, with a slope:   masked[m, n] = grad[m, n] where x[m, n] > 0, else grad[m, n] slope
                                grad_slope = sum over all x[m, n] that are not > 0 of grad[m, n] x[m, n]

One pass over the gradient gives all: what an activation hands on need not be read again for the sums. They are added in
float32, in an order that the shape decides, and rounded once.
"""

import torch
from torch import Tensor

from . import _backend


def column_sums_reference(grad: Tensor) -> Tensor:
    """The specification; arguments and result as :func:`column_sums`."""
    return grad.sum(0)


def relu_column_sums_reference(grad: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """The specification; arguments and results as :func:`relu_column_sums`."""
    masked = grad.masked_fill(out <= 0, 0)
    return masked, masked.sum(0)


def prelu_column_sums_reference(grad: Tensor, x: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The specification; arguments and results as :func:`prelu_column_sums`."""
    precise, above = grad.to(torch.promote_types(grad.dtype, torch.float32)), x > 0
    masked = torch.where(above, precise, precise * slope).to(grad.dtype)
    return masked, masked.sum(0), (precise * x).masked_fill(above, 0).sum().view(1).to(slope.dtype)


torch.library.define("dndetr::column_sums", "(Tensor grad) -> Tensor")
torch.library.define("dndetr::relu_column_sums", "(Tensor grad, Tensor out) -> (Tensor, Tensor)")
torch.library.define("dndetr::prelu_column_sums", "(Tensor grad, Tensor x, Tensor slope) -> (Tensor, Tensor, Tensor)")


@torch.library.impl("dndetr::column_sums", ("cpu", "cuda"))
def _column_sums(grad):
    from ..kernels.column_sums import column_sums

    sums = _column_sums_fake(grad)
    with torch.cuda.device_of(grad):
        column_sums(grad.contiguous(), None, None, None, sums, None)
    return sums


@torch.library.impl("dndetr::relu_column_sums", ("cpu", "cuda"))
def _relu_column_sums(grad, out):
    from ..kernels.column_sums import column_sums

    masked, sums = _relu_column_sums_fake(grad, out)
    with torch.cuda.device_of(grad):
        column_sums(grad.contiguous(), out.contiguous(), None, masked, sums, None)
    return masked, sums


@torch.library.impl("dndetr::prelu_column_sums", ("cpu", "cuda"))
def _prelu_column_sums(grad, x, slope):
    from ..kernels.column_sums import column_sums

    masked, sums, grad_slope = _prelu_column_sums_fake(grad, x, slope)
    with torch.cuda.device_of(grad):
        column_sums(grad.contiguous(), x.contiguous(), slope, masked, sums, grad_slope)
    return masked, sums, grad_slope


@torch.library.register_fake("dndetr::column_sums")
def _column_sums_fake(grad):
    return grad.new_empty(grad.shape[1])


@torch.library.register_fake("dndetr::relu_column_sums")
def _relu_column_sums_fake(grad, out):
    return grad.new_empty(grad.shape), grad.new_empty(grad.shape[1])


@torch.library.register_fake("dndetr::prelu_column_sums")
def _prelu_column_sums_fake(grad, x, slope):
    return *_relu_column_sums_fake(grad, x), slope.new_empty(1)


def column_sums(grad: Tensor, backend: str | None = None) -> Tensor:
    """grad [M, N] -> sums over its rows [N], in its dtype; not differentiable. ValueError for other shapes."""
    if grad.dim() != 2:
        raise ValueError(f"column_sums: grad must be [M, N], got {list(grad.shape)}")
    if not _is_taken(grad, backend):
        return column_sums_reference(grad)
    return torch.ops.dndetr.column_sums(grad)


def relu_column_sums(grad: Tensor, out: Tensor, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """What a ReLU hands on, and its sums; not differentiable.

    grad, out [M, N], gradient and result of a ReLU, of one dtype -> grad where ``out`` is above zero (or NaN) and zero
    elsewhere [M, N], and the sums over its rows [N]. ValueError for other shapes or dtypes.
    """
    _check_pair("relu_column_sums: grad and out", grad, out)
    if not _is_taken(grad, backend):
        return relu_column_sums_reference(grad, out)
    return torch.ops.dndetr.relu_column_sums(grad, out)


def prelu_column_sums(
    grad: Tensor, x: Tensor, slope: Tensor, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What a PReLU hands on, its sums, and the slope's gradient; not differentiable.

    grad, x [M, N], gradient of a PReLU's result and what it was given, of one dtype, slope [1] -> grad where ``x`` is
    above zero and elsewhere (NaN too) grad times slope [M, N], the sums over its rows [N], and the gradient of the
    slope [1] in its dtype. ValueError for other shapes or dtypes.
    """
    _check_pair("prelu_column_sums: grad and x", grad, x)
    if slope.shape != (1,):
        raise ValueError(f"prelu_column_sums: slope must be [1], got {list(slope.shape)}")
    if not _is_taken(grad, backend):
        return prelu_column_sums_reference(grad, x, slope)
    return torch.ops.dndetr.prelu_column_sums(grad, x, slope)


def _check_pair(names: str, grad: Tensor, other: Tensor) -> None:
    if grad.dim() != 2 or grad.shape != other.shape or grad.dtype != other.dtype:
        given = f"{grad.dtype} {list(grad.shape)}, {other.dtype} {list(other.shape)}"
        raise ValueError(f"{names} must be [M, N] of one dtype, got {given}")


def _is_taken(grad: Tensor, backend: str | None) -> bool:
    """Whether the kernel runs: for what it takes, where it can."""
    name, _ = _backend.choose("column_sums", backend, grad.device.type)
    return name == "triton" and grad.dtype in (torch.float32, torch.bfloat16, torch.float16) and grad.numel() > 0


# name: (rows, columns, dtype)
CASES = {
    "one": (1, 1, torch.float32),
    "nobody": (0, 24, torch.float32),
    "no-columns": (5, 0, torch.float32),
    "boxes": (300, 4, torch.bfloat16),
    "classes": (1030, 91, torch.float16),
    "queries": (2100, 256, torch.bfloat16),
    "two-passes": (4097, 31, torch.float32),
    "pixels": (4100, 128, torch.bfloat16),
    "many-boxes": (9000, 4, torch.bfloat16),
}


def make_case(name: str, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor]:
    """(grad, x) of a case; x as before an activation, with zeros."""
    rows, columns, dtype = CASES[name]
    draw = torch.Generator().manual_seed(seed)
    grad, x = (torch.randn(rows, columns, generator=draw) for _ in range(2))
    x.view(-1)[1::7] = 0
    return grad.to(device, dtype), x.to(device, dtype)


def _self_test(device_type: str) -> float:
    # In bfloat16 and of whole blocks of columns, in one pass and in two: kernels that training compiles.
    few, many = (make_case(name, device_type) for name in ("queries", "pixels"))
    slope = torch.full((1,), 0.3, device=device_type)
    found = [torch.ops.dndetr.column_sums(few[0]), *torch.ops.dndetr.relu_column_sums(*many)]
    exact = [column_sums_reference(few[0].double()), *relu_column_sums_reference(*(each.double() for each in many))]
    for pair in (few, many):
        found += torch.ops.dndetr.prelu_column_sums(*pair, slope)
        exact += prelu_column_sums_reference(*(each.double() for each in (*pair, slope)))
    return _backend.error_beyond_rounding(found, exact)


_backend.register(
    "column_sums", _backend.Backend("triton", ("cuda",), _backend.triton_obstacle, _self_test, tolerance=1e-5)
)
