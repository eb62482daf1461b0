"""The compiled op ``torch.ops.dndetr.ms_deform_attn``: its schema, its C++ and CUDA implementations, and its gradient.

All forms of :mod:`dndetr.ops.ms_deform_attn` are this one op. What the compiled code cannot take as it is, for its
strides or its alignment, is copied here.
"""

import math

import torch
from torch import Tensor

from . import _backend

# One op for all forms: without reference points, offsets are locations and logits are weights; without logits, offsets
# are a projection [B, Q, C] that has both, all heads' offsets first. ``shapes`` is flat.
_INPUTS = "Tensor value, int[] shapes, Tensor? reference_points, Tensor offsets, Tensor? logits, Tensor? valid_sizes"
torch.library.define("dndetr::ms_deform_attn", f"({_INPUTS}) -> Tensor")
torch.library.define(
    "dndetr::ms_deform_attn_backward",
    f"(Tensor grad_out, {_INPUTS}, bool reference_grad) -> (Tensor, Tensor, Tensor, Tensor)",
)

_ABSENT = (0, 0)
_pointer = _backend.pointer


def parts(projected: Tensor, heads: int, levels: int) -> tuple[Tensor, Tensor]:
    """Views of a projection [B, Q, H * L * P * 3]: offsets [B, Q, H, L, P, 2] and logits [B, Q, H, L * P]."""
    samples = projected.shape[2] // (3 * heads)
    offsets, logits = projected.split([heads * samples * 2, heads * samples], dim=2)
    return offsets.unflatten(2, (heads, levels, samples // levels, 2)), logits.unflatten(2, (heads, samples))


def _given(value, shapes, offsets, logits):
    """Offsets and logits, apart."""
    return parts(offsets, value.shape[2], len(shapes) // 2) if logits is None else (offsets, logits)


def _made(offsets, logits):
    """Memory for the gradients of offsets and logits, for that of a projection where there are no logits."""
    if logits is not None:
        return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (offsets, logits))
    batch, queries, columns = offsets.shape
    # Every row starts with a whole pair.
    return offsets.new_empty((batch, queries, columns + columns % 2))[..., :columns], offsets.new_empty(0)


def _rows(tensor):
    """A tensor [B, Q, ...], or a copy, as rows [B * Q, ...] of elements that lie together."""
    rows = tensor.flatten(2).flatten(0, 1)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _pointer_to_rows(rows):
    return _pointer(rows), rows.stride(0)


def _pointers_to_made(value, shapes, made, logits):
    """What ``_made`` returned, as the compiled module takes it."""
    offsets, apart = made
    return [_pointer_to_rows(_rows(x)) for x in _given(value, shapes, offsets, None if logits is None else apart)]


def _problem(module, value, shapes, reference_points, offsets, logits, valid_sizes):
    """Inputs as the compiled module takes them -> (problem, the tensors to keep alive meanwhile)."""
    if value.shape[1] >= 2**31:
        raise ValueError(f"ms_deform_attn: value has {value.shape[1]} pixels, compiled code takes less than 2**31")
    reference_points = None if reference_points is None else reference_points.contiguous()
    valid_sizes = None if valid_sizes is None else valid_sizes.contiguous()
    batch, queries, heads, _, points, _ = offsets.shape
    rows = _rows(offsets), _rows(logits)
    problem = module.DeformAttn(
        (batch, queries, heads, value.shape[3], points, 0 if reference_points is None else reference_points.shape[3]),
        shapes,
        _pointer(value),
        value.stride()[:3],
        _ABSENT if reference_points is None else _pointer(reference_points),
        *map(_pointer_to_rows, rows),
        0 if valid_sizes is None else valid_sizes.data_ptr(),
    )
    return problem, (value, reference_points, rows, valid_sizes)


def _reference_grad_by_head(value, reference_points, wanted):
    """Memory for the gradient of the reference points, each head's part apart: [B, H, Q, L, 2 or 4], or empty."""
    if not wanted:
        return value.new_empty(0)
    batch, queries, levels, form = reference_points.shape
    precise = torch.promote_types(value.dtype, torch.float32)
    return value.new_empty((batch, value.shape[2], queries, levels, form), dtype=precise)


@torch.library.impl("dndetr::ms_deform_attn", "cpu")
def _forward_cpp(value, shapes, reference_points, offsets, logits, valid_sizes):
    module = _backend.compiled()
    value = value if value.stride(-1) == 1 else value.contiguous()
    out = _forward_fake(value, shapes, reference_points, offsets, logits, valid_sizes)
    given = _given(value, shapes, offsets, logits)
    problem, _alive = _problem(module, value, shapes, reference_points, *given, valid_sizes)
    module.ms_deform_attn(problem, _pointer(out), torch.get_num_threads())
    return out


@torch.library.impl("dndetr::ms_deform_attn_backward", "cpu")
def _backward_cpp(grad_out, value, shapes, reference_points, offsets, logits, valid_sizes, reference_grad):
    module = _backend.compiled()
    value = value if value.stride(-1) == 1 else value.contiguous()
    grad_out = grad_out.contiguous()
    grad_value = torch.empty_like(value, memory_format=torch.contiguous_format)
    made = _made(offsets, logits)
    by_head = _reference_grad_by_head(value, reference_points, reference_grad)
    given = _given(value, shapes, offsets, logits)
    problem, _alive = _problem(module, value, shapes, reference_points, *given, valid_sizes)
    module.ms_deform_attn_backward(
        problem,
        _pointer(grad_out),
        _pointer(grad_value),
        _pointer(by_head) if reference_grad else _ABSENT,
        *_pointers_to_made(value, shapes, made, logits),
        torch.get_num_threads(),
    )
    grad_reference = by_head.sum(1).to(reference_points.dtype) if reference_grad else by_head
    return grad_value, grad_reference, *made


def _aligned(tensor: Tensor | None) -> Tensor | None:
    """The tensor, or a copy, with every row of its last dimension where the kernels' widest loads may start."""
    if tensor is None:
        return None
    unit = math.gcd(16, tensor.shape[-1] * tensor.element_size())
    places = (tensor.data_ptr(), *(stride * tensor.element_size() for stride in tensor.stride()[:-1]))
    if tensor.stride(-1) == 1 and all(place % unit == 0 for place in places):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _forward_cuda(value, shapes, reference_points, offsets, logits, valid_sizes):
    module = _backend.compiled()
    out = _forward_fake(value, shapes, reference_points, offsets, logits, valid_sizes)
    value = _aligned(value)
    points = map(_aligned, (reference_points, *_given(value, shapes, offsets, logits)))
    problem, _alive = _problem(module, value, shapes, *points, valid_sizes)
    module.ms_deform_attn_cuda(problem, _pointer(out), _backend.cuda_stream(value))
    return out


def _backward_cuda(grad_out, value, shapes, reference_points, offsets, logits, valid_sizes, reference_grad):
    module = _backend.compiled()
    value = _aligned(value.contiguous())
    grad_out = _aligned(grad_out.contiguous().view(*offsets.shape[:2], *value.shape[2:]))
    made = _made(offsets, logits)
    by_head = _reference_grad_by_head(value, reference_points, reference_grad)
    fixed_point = None
    if torch.are_deterministic_algorithms_enabled():
        fixed_point = _fixed_point(grad_out, logits if reference_points is None else None)
    grad_value = torch.zeros(
        value.shape, dtype=torch.float32 if fixed_point is None else torch.int64, device=value.device
    )
    points = map(_aligned, (reference_points, *_given(value, shapes, offsets, logits)))
    problem, _alive = _problem(module, value, shapes, *points, valid_sizes)
    module.ms_deform_attn_backward_cuda(
        problem,
        _pointer(grad_out),
        (grad_value.data_ptr(), _backend.DTYPES[torch.float32]),
        _pointer(by_head) if reference_grad else _ABSENT,
        *_pointers_to_made(value, shapes, made, logits),
        0 if fixed_point is None else fixed_point.data_ptr(),
        _backend.cuda_stream(value),
    )
    if fixed_point is not None:
        grad_value = grad_value.double() / fixed_point.double()
    grad_reference = by_head.sum(1).to(reference_points.dtype) if reference_grad else by_head
    return grad_value.to(value.dtype), grad_reference, *made


torch.library.impl("dndetr::ms_deform_attn", "cuda", _forward_cuda)
torch.library.impl("dndetr::ms_deform_attn_backward", "cuda", _backward_cuda)


def _fixed_point(grad_out: Tensor, weights: Tensor | None) -> Tensor:
    """What one is worth in 64-bit sums of grad_value, as a float32 scalar: a power of two at which no sum overflows.

    A pixel gets at most |grad_out| * |weight| from every query and sample; a softmax's weights sum to one. Where
    grad_out or a weight is not finite neither is the result, and all of grad_value becomes NaN.
    """
    bound = grad_out.abs().amax().float() if grad_out.numel() else grad_out.new_zeros((), dtype=torch.float32)
    most = max(grad_out.shape[1], 1)
    if weights is not None and weights.numel():
        bound = bound * weights.abs().amax().float()
        most *= math.prod(weights.shape[3:])
    exponent = (61 - math.ceil(math.log2(most)) - torch.frexp(bound).exponent).clamp(-126, 126)
    return torch.where(bound.isfinite(), torch.ldexp(torch.ones_like(bound), exponent), bound - bound)


@torch.library.register_fake("dndetr::ms_deform_attn")
def _forward_fake(value, shapes, reference_points, offsets, logits, valid_sizes):
    return value.new_empty((*offsets.shape[:2], value.shape[2] * value.shape[3]))


@torch.library.register_fake("dndetr::ms_deform_attn_backward")
def _backward_fake(grad_out, value, shapes, reference_points, offsets, logits, valid_sizes, reference_grad):
    like = (value, reference_points if reference_grad else value.new_empty(0))
    grads = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in like)
    return *grads, *_made(offsets, logits)


def _setup_context(ctx, inputs, output):
    value, ctx.shapes, *rest = inputs
    ctx.save_for_backward(value, *rest)


def _differentiate(ctx, grad_out):
    value, reference_points, offsets, logits, valid_sizes = ctx.saved_tensors
    reference_grad = ctx.needs_input_grad[2]
    grad_value, grad_reference, grad_offsets, grad_logits = torch.ops.dndetr.ms_deform_attn_backward(
        grad_out, value, ctx.shapes, reference_points, offsets, logits, valid_sizes, reference_grad
    )
    grad_logits = None if logits is None else grad_logits
    return grad_value, None, grad_reference if reference_grad else None, grad_offsets, grad_logits, None


torch.library.register_autograd("dndetr::ms_deform_attn", _differentiate, setup_context=_setup_context)
_backend.differentiable_once("ms_deform_attn")
