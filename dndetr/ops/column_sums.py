"""Gradient of a linear layer's bias: sums over the rows of the output's gradient, behind a ReLU of its open part.

    sums[n] = sum over m of grad[m, n]
    masked[m, n] = grad[m, n] where not out[m, n] <= 0, else 0

A pass over the gradient gives both: the ReLU's own gradient is read there and need not be read again for the sums. They
are added in float32, in an order that the shape decides.
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


torch.library.define("dndetr::column_sums", "(Tensor grad) -> Tensor")
torch.library.define("dndetr::relu_column_sums", "(Tensor grad, Tensor out) -> (Tensor, Tensor)")


@torch.library.impl("dndetr::column_sums", ("cpu", "cuda"))
def _column_sums(grad):
    from ..kernels.column_sums import column_sums

    sums = _column_sums_fake(grad)
    with torch.cuda.device_of(grad):
        column_sums(grad.contiguous(), None, None, sums)
    return sums


@torch.library.impl("dndetr::relu_column_sums", ("cpu", "cuda"))
def _relu_column_sums(grad, out):
    from ..kernels.column_sums import column_sums

    masked, sums = _relu_column_sums_fake(grad, out)
    with torch.cuda.device_of(grad):
        column_sums(grad.contiguous(), out.contiguous(), masked, sums)
    return masked, sums


@torch.library.register_fake("dndetr::column_sums")
def _column_sums_fake(grad):
    return grad.new_empty(grad.shape[1])


@torch.library.register_fake("dndetr::relu_column_sums")
def _relu_column_sums_fake(grad, out):
    return grad.new_empty(grad.shape), grad.new_empty(grad.shape[1])


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
    if grad.dim() != 2 or grad.shape != out.shape or grad.dtype != out.dtype:
        given = f"{grad.dtype} {list(grad.shape)}, {out.dtype} {list(out.shape)}"
        raise ValueError(f"relu_column_sums: grad and out must be [M, N] of one dtype, got {given}")
    if not _is_taken(grad, backend):
        return relu_column_sums_reference(grad, out)
    return torch.ops.dndetr.relu_column_sums(grad, out)


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
    """(grad, out) of a case; out as after a ReLU, with zeros."""
    rows, columns, dtype = CASES[name]
    draw = torch.Generator().manual_seed(seed)
    grad, out = (torch.randn(rows, columns, generator=draw) for _ in range(2))
    return grad.to(device, dtype), out.relu().to(device, dtype)


def _self_test(device_type: str) -> float:
    # In bfloat16 and of whole blocks of columns, in one pass and in two: kernels that training compiles.
    few, _ = make_case("queries", device_type)
    many, out = make_case("pixels", device_type)
    found = torch.ops.dndetr.column_sums(few), *torch.ops.dndetr.relu_column_sums(many, out)
    exact = column_sums_reference(few.double()), *relu_column_sums_reference(many.double(), out)
    return _backend.error_beyond_rounding(found, exact)


_backend.register(
    "column_sums", _backend.Backend("triton", ("cuda",), _backend.triton_obstacle, _self_test, tolerance=1e-5)
)
