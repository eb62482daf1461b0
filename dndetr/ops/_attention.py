"""What both attention ops ask of their kernels and of plain torch: number formats, layouts, hidden keys, C++ calls."""

import math

import torch
from torch import Tensor

from . import _backend

PRECISIONS = ("torch", "tf32", "tf32x3", "ieee")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 128


def hidden_softmax(scores: Tensor, valid: Tensor | None) -> Tensor:
    """Softmax over the last dimension of scores [B, H, Q, S] with keys hidden where valid [B, S] is False.

    A row without any valid key becomes zeros, with zero gradients.
    """
    if valid is None:
        return scores.softmax(-1)
    valid = valid[:, None, None, :]
    blind = ~valid.any(-1, keepdim=True)
    # Filling a blind row with a finite number keeps its softmax, and so its gradient, free of NaN.
    return scores.masked_fill(~(valid | blind), -math.inf).softmax(-1).masked_fill(blind, 0)


def one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as autocast hands them to a matrix product; ValueError if their dtypes still differ."""
    device_type = tensors[0].device.type
    if torch.is_autocast_enabled(device_type) and tensors[0].dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        tensors = tuple(x.to(dtype) for x in tensors)
    if any(x.dtype != tensors[0].dtype for x in tensors):
        raise ValueError(f"attention: all inputs must have one dtype, got {', '.join(str(x.dtype) for x in tensors)}")
    return tensors


def choose(op: str, requested: str | None, device_type: str, dtype: torch.dtype, *widths: int) -> str:
    """The backend of a call: the reference where Triton does not take its heads, ValueError if it was asked for."""
    chosen, reason = _backend.choose(op, requested, device_type)
    if chosen != "triton" or (dtype in KERNEL_DTYPES and 0 < max(widths) <= WIDEST):
        return chosen
    if reason.startswith("asked for"):
        takes = f"float32, bfloat16 and float16 heads up to {WIDEST} wide"
        raise ValueError(f"{op}: triton takes {takes}, got {dtype}, {max(widths)} wide; leave the backend to auto")
    return "reference"


def checked_precision(precision: str | None) -> str:
    """The argument as the ops take it; ValueError if it is none of PRECISIONS."""
    if precision not in (None, *PRECISIONS):
        raise ValueError(f"unknown precision {precision!r}: choose one of {', '.join(PRECISIONS)}")
    return precision or PRECISIONS[0]


def has_tf32(device: torch.device) -> bool:
    """Whether Triton's products can be of TF32: not on AMD's GPUs, and on NVIDIA's from 8.0 on."""
    if device.type != "cuda":
        return True
    return not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 0)


def products(precision: str, q: Tensor, *widths: int) -> str:
    """How the kernels multiply. Half precision knows one way; of float32 "torch" follows
    ``torch.set_float32_matmul_precision``.

    Its default, "highest", becomes three TF32 products (plain float32 for heads over 64 wide, where those do not fit
    in registers), anything less a single one. GPUs without TF32 multiply plain float32, whatever is asked for.
    """
    if q.dtype.itemsize == 2 or not has_tf32(q.device):
        return "ieee"
    if precision == "torch":
        precision = "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "ieee" if precision == "tf32x3" and max(widths) > 64 else precision


def empty_heads(like: Tensor, width: int | None = None) -> Tensor:
    """Uninitialised [B, H, Q, D] whose memory is [B, Q, H, D], so that merging the heads is a view."""
    batch, heads, queries, own = like.shape
    return like.new_empty((batch, queries, heads, own if width is None else width)).transpose(1, 2)


def cpp_obstacle(device_type: str) -> str | None:
    """Why the compiled module cannot attend to tensors of this device type, or None."""
    return _backend.extension_obstacle("attention") if device_type == "cpu" else "it works on CPU tensors"


def precise(dtype: torch.dtype) -> torch.dtype:
    """What sums of exponentials are computed and kept in."""
    return torch.promote_types(dtype, torch.float32)


def _rows(x: Tensor) -> Tensor:
    """The tensor, or a copy, with contiguous rows."""
    return x if x.stride(3) == 1 else x.contiguous()


def _heads(x: Tensor) -> tuple[int, ...]:
    """A tensor [B, H, n, width] with contiguous rows as the compiled module takes it."""
    image, head, row, _ = x.stride()
    return x.data_ptr(), _backend.DTYPES[x.dtype], image, head, row, x.shape[3]


def _problem(module, q, k, v, scale, groups, slots, active, valid):
    """Inputs as the compiled module takes them -> (problem, the tensors to keep alive meanwhile)."""
    q, k, v = [_rows(x) for x in q], [_rows(x) for x in k], _rows(v)
    active = None if active is None else active.to(torch.int32).contiguous()
    valid = None if valid is None else valid.contiguous()
    flags = (0 if x is None else x.data_ptr() for x in (active, valid))
    sizes = (*q[0].shape[:3], v.shape[2], groups, slots)
    problem = module.Attention(sizes, [_heads(x) for x in q], [_heads(x) for x in k], _heads(v), scale, *flags)
    return problem, (q, k, v, active, valid)


def forward_cpp(q, k, v, scale, out, lse, groups=0, slots=0, active=None, valid=None) -> None:
    """Fill out and lse. q and k: parts whose products are added; the first groups * slots keys are groups."""
    module = _backend.compiled()
    problem, _alive = _problem(module, q, k, v, scale, groups, slots, active, valid)
    module.attention(problem, _heads(out), lse.data_ptr(), torch.get_num_threads())


def backward_cpp(grad_out, q, k, v, scale, out, lse, grads, groups=0, slots=0, active=None, valid=None) -> None:
    """Fill grads, one for each part of q, of k, and for v."""
    module = _backend.compiled()
    problem, _alive = _problem(module, q, k, v, scale, groups, slots, active, valid)
    grad_out = _rows(grad_out)
    *grad_q, grad_v = map(_heads, grads)
    grad_q, grad_k = grad_q[: len(q)], grad_q[len(q) :]
    threads = torch.get_num_threads()
    module.attention_backward(problem, _heads(grad_out), _heads(out), lse.data_ptr(), grad_q, grad_k, grad_v, threads)


def self_test_error(given: tuple[Tensor, ...], exact: tuple[Tensor, ...], dtype: torch.dtype) -> float:
    """The largest error of a self-test; half precision, which also rounds on the way, is allowed 5 % of the largest."""
    if dtype.itemsize > 2:
        return _backend.largest_error(given, exact)
    errors = [(a - b).abs().max() / b.abs().max() - 0.05 for a, b in zip(given, exact, strict=True)]
    return torch.stack(errors).max().clamp_min(0).item()


def gradients(attend, inputs, *rest) -> tuple[Tensor, ...]:
    """Output and gradients of the inputs under a fixed weighting of the output, in float64."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        out = attend(*leaves, *rest)
        weighting = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)
        return tuple(x.double() for x in (out, *torch.autograd.grad(out, leaves, weighting)))
