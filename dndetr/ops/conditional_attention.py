"""Cross-attention whose scores add a content and a position term (DAB-DETR, arXiv 2201.12329, section 3.3).

    out = softmax(scale * (q_content k_content^T + q_position k_position^T)) v

The official code concatenates content and position per head, which makes queries and keys twice as wide as values;
here the two products are summed instead and nothing is concatenated. Keys that are not valid are hidden. Gradients are
those of softmax attention, with ds multiplied into each of the four factors.
"""

import math
from functools import partial

import torch
from torch import Tensor

from . import _backend
from ._attention import (
    backward_cpp,
    checked_precision,
    choose,
    cpp_obstacle,
    empty_heads,
    forward_cpp,
    gradients,
    hidden_softmax,
    one_dtype,
    precise,
    products,
    self_test_error,
)


def conditional_attention_reference(
    q_content: Tensor,
    q_position: Tensor,
    k_content: Tensor,
    k_position: Tensor,
    v: Tensor,
    valid: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The specification, by concatenation as in the official code; arguments and result as below."""
    q = torch.cat((q_content, q_position), -1)
    k = torch.cat((k_content, k_position), -1)
    scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    return hidden_softmax(scores, valid).to(v.dtype) @ v


def packed_attention_reference(both: Tensor, v: Tensor, valid: Tensor | None = None) -> Tensor:
    """The specification; arguments and result as :func:`packed_attention`."""
    return conditional_attention_reference(*_halves(both, v.shape[1]), v, valid)


# Without k_content, q_content is what one projection makes of queries and keys, as :func:`packed_attention` takes it.
_INPUTS = "Tensor q_content, Tensor? q_position, Tensor? k_content, Tensor? k_position, Tensor v, Tensor? valid"
_SETTINGS = "float scale, str precision, str backend"
torch.library.define("dndetr::conditional_attention", f"({_INPUTS}, {_SETTINGS}) -> (Tensor, Tensor)")
torch.library.define(
    "dndetr::conditional_attention_backward",
    f"(Tensor grad_out, {_INPUTS}, Tensor out, Tensor lse, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _halves(both: Tensor, heads: int) -> tuple[Tensor, ...]:
    """both [B, S, 2 C] -> halves of queries' heads and of keys', all [B, H, S, .] in its memory."""
    # The scores have two terms: here each is half of the channels.
    q, k = both.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    return *q.tensor_split(2, dim=-1), *k.tensor_split(2, dim=-1)


def _factors(q_content, q_position, k_content, k_position, v) -> tuple[Tensor, ...]:
    """The four factors of the scores, given as they are or packed."""
    if k_content is None:
        return _halves(q_content, v.shape[1])
    return q_content, q_position, k_content, k_position


@torch.library.impl("dndetr::conditional_attention", ("cpu", "cuda"))
def _forward(q_content, q_position, k_content, k_position, v, valid, scale, precision, backend):
    out, lse = _forward_fake(q_content, q_position, k_content, k_position, v)
    q_content, q_position, k_content, k_position = _factors(q_content, q_position, k_content, k_position, v)
    if backend == "cpp":
        forward_cpp([q_content, q_position], [k_content, k_position], v, scale, out, lse, valid=valid)
    else:
        from ..kernels.conditional_attention import conditional_attention_forward

        precision = products(precision, q_content, q_content.shape[3], q_position.shape[3], v.shape[3])
        inputs = q_content, q_position, k_content, k_position, v, valid, scale, precision
        with torch.cuda.device_of(v):
            conditional_attention_forward(*inputs, out, lse)
    return out, lse


@torch.library.impl("dndetr::conditional_attention_backward", ("cpu", "cuda"))
def _backward(grad_out, q_content, q_position, k_content, k_position, v, valid, out, lse, scale, precision, backend):
    grads = made = _backward_fake(grad_out, q_content, q_position, k_content, k_position, v)
    if k_content is None:
        grads = *_halves(made[0], v.shape[1]), made[-1]
    q_content, q_position, k_content, k_position = _factors(q_content, q_position, k_content, k_position, v)
    if backend == "cpp":
        q, k = [q_content, q_position], [k_content, k_position]
        backward_cpp(grad_out, q, k, v, scale, out, lse, grads, valid=valid)
    else:
        from ..kernels.conditional_attention import conditional_attention_backward

        precision = products(precision, q_content, q_content.shape[3], q_position.shape[3], v.shape[3])
        inputs = grad_out, q_content, q_position, k_content, k_position, v, valid, out, lse, scale, precision
        with torch.cuda.device_of(v):
            conditional_attention_backward(*inputs, grads)
    return made


@torch.library.register_fake("dndetr::conditional_attention")
def _forward_fake(q_content, q_position, k_content, k_position, v, *_settings):
    queries = v.shape[:3] if k_content is None else q_content.shape[:3]
    like = v if k_content is None else q_content
    return empty_heads(like, v.shape[3]), v.new_empty(queries, dtype=precise(v.dtype))


@torch.library.register_fake("dndetr::conditional_attention_backward")
def _backward_fake(grad_out, q_content, q_position, k_content, k_position, v, *_settings):
    if k_content is None:
        # What is not there is an empty tensor: an op's results are tensors, no two of them the same.
        packed = torch.empty_like(q_content, memory_format=torch.contiguous_format)
        return packed, *(v.new_empty(0) for _ in range(3)), empty_heads(v)
    return tuple(empty_heads(x) for x in (q_content, q_position, k_content, k_position, v))


def _setup_context(ctx, inputs, output):
    *tensors, scale, precision, backend = inputs
    ctx.settings = scale, precision, backend
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # of lse they would be zeros that nobody reads
    ctx.save_for_backward(*tensors, out, lse)


def _differentiate(ctx, grad_out, _grad_lse):
    if grad_out is None:
        return (None,) * len(ctx.needs_input_grad)
    saved = ctx.saved_tensors  # once: where blocks are recomputed there is no second time
    grads = torch.ops.dndetr.conditional_attention_backward(grad_out, *saved, *ctx.settings)
    if saved[2] is None:
        grads = grads[0], None, None, None, grads[-1]
    return *grads, *(None,) * 4


torch.library.register_autograd("dndetr::conditional_attention", _differentiate, setup_context=_setup_context)
_backend.differentiable_once("conditional_attention")


def conditional_attention(
    q_content: Tensor,
    q_position: Tensor,
    k_content: Tensor,
    k_position: Tensor,
    v: Tensor,
    valid: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
    precision: str | None = None,
) -> Tensor:
    """Attention with separate content and position parts of queries and keys.

    q_content, q_position [B, H, Q, .], k_content, k_position, v [B, H, S, .] of any strides, each part of its own
    width; valid [B, S] bool, True = real key; scale defaults to 1 / sqrt(content + position width) -> [B, H, Q, width
    of v]. Rows with no valid key are zero. The kernels' results can be differentiated once. precision as in
    :func:`group_attention`.
    """
    keys, width = (*v.shape[:2], v.shape[2]), q_content.shape[3] + q_position.shape[3]
    if k_content.shape[:3] != keys or k_position.shape[:3] != keys:
        shapes = f"{tuple(k_content.shape)}, {tuple(k_position.shape)}, {tuple(v.shape)}"
        raise ValueError(f"keys and values must agree in [B, H, S]: {shapes}")
    for q, k, part in ((q_content, k_content, "content"), (q_position, k_position, "position")):
        if q.shape[:2] != k.shape[:2] or q.shape[2] != q_content.shape[2] or q.shape[3] != k.shape[3]:
            raise ValueError(f"{part} of queries {tuple(q.shape)} and keys {tuple(k.shape)} do not fit together")
    if valid is not None and (valid.shape != (keys[0], keys[2]) or valid.dtype != torch.bool):
        raise ValueError(f"valid must be bool [{keys[0]}, {keys[2]}], got {valid.dtype} {list(valid.shape)}")
    inputs = one_dtype(q_content, q_position, k_content, k_position, v)
    scale = 1 / math.sqrt(width) if scale is None else float(scale)
    widths = q_content.shape[3], q_position.shape[3], v.shape[3]
    chosen = choose("conditional_attention", backend, v.device.type, inputs[0].dtype, *widths)
    precision = checked_precision(precision)
    if chosen == "reference":
        return conditional_attention_reference(*inputs, valid, scale)
    return torch.ops.dndetr.conditional_attention(*inputs, valid, scale, precision, chosen)[0]


def packed_attention(
    both: Tensor, v: Tensor, valid: Tensor | None = None, backend: str | None = None, precision: str | None = None
) -> Tensor:
    """Plain self-attention, whose queries and keys one projection makes together.

    both [B, S, 2 C]: all heads' queries, then all heads' keys; its gradient is one tensor like it, so that nothing has
    to be put together. v [B, H, S, .], valid [B, S] bool, True = real key -> [B, H, S, width of v]. Scores are scaled
    by 1 / sqrt(C / H). Rows with no valid key are zero. precision as in :func:`group_attention`.
    """
    rows, heads = (v.shape[0], v.shape[2]), v.shape[1]
    if both.ndim != 3 or both.shape[:2] != rows or both.shape[2] == 0 or both.shape[2] % (2 * heads):
        raise ValueError(f"both {tuple(both.shape)} must hold queries and keys of the heads of v {tuple(v.shape)}")
    if valid is not None and (valid.shape != rows or valid.dtype != torch.bool):
        raise ValueError(f"valid must be bool {list(rows)}, got {valid.dtype} {list(valid.shape)}")
    both, v = one_dtype(both, v)
    width = both.shape[2] // (2 * heads)
    widths = width - width // 2, width // 2, v.shape[3]
    chosen = choose("conditional_attention", backend, v.device.type, v.dtype, *widths)
    settings = 1 / math.sqrt(width), checked_precision(precision), chosen
    if chosen == "reference":
        return packed_attention_reference(both, v, valid)
    return torch.ops.dndetr.conditional_attention(both, None, None, None, v, valid, *settings)[0]


# name: batch, heads, queries, keys, width, valid keys of each image (None: all)
CASES = {
    "tiny": (2, 2, 3, 5, 4, (5, 2)),
    "all-valid": (2, 2, 7, 9, 8, None),
    "nothing-valid": (2, 2, 3, 5, 4, (0, 4)),
    "no-queries": (1, 2, 0, 5, 4, (5,)),
    "one-key": (1, 2, 3, 1, 4, (1,)),
    "no-images": (0, 2, 3, 5, 4, ()),
    "c5": (2, 8, 100, 150, 32, (150, 120)),
}


def make_case(name: str, dtype: torch.dtype = torch.float32, seed: int = 0):
    """(q_content, q_position, k_content, k_position, v, valid) of a case, strided as projections leave them."""
    batch, heads, queries, keys, width, counts = CASES[name]
    draw = torch.Generator().manual_seed(seed)

    def heads_of(length: int) -> Tensor:
        x = torch.randn(batch, length, heads, width, generator=draw, dtype=torch.float64)
        return x.to(dtype).transpose(1, 2)

    valid = None if counts is None else torch.arange(keys) < torch.tensor(counts, dtype=torch.int64).view(-1, 1)
    return heads_of(queries), heads_of(queries), heads_of(keys), heads_of(keys), heads_of(keys), valid


def make_packed_case(name: str, dtype: torch.dtype = torch.float32, seed: int = 0):
    """(both, v, valid) of :func:`packed_attention` with the keys of a case."""
    *_, v, valid = make_case(name, dtype, seed)
    batch, heads, keys, width = v.shape
    draw = torch.Generator().manual_seed(seed + 1)
    return torch.randn(batch, keys, 2 * heads * width, generator=draw, dtype=torch.float64).to(dtype), v, valid


def _self_test(backend: str, device_type: str) -> float:
    cases = [("tiny", torch.float32)]
    if backend == "triton":
        cases.append(("c5", torch.bfloat16))  # what training runs
    return _backend.worst(_error(backend, *make_case(*case), device_type) for case in cases)


def _error(backend: str, *case) -> float:
    *tensors, device_type = case
    *inputs, valid = (x.to(device_type) for x in tensors)

    def attend(*inputs):
        return torch.ops.dndetr.conditional_attention(*inputs, valid, 0.3, "tf32x3", backend)[0]

    given = gradients(attend, inputs)
    exact = gradients(conditional_attention_reference, [x.double() for x in inputs], valid, 0.3)
    return self_test_error(given, exact, inputs[0].dtype)


_backend.register(
    "conditional_attention",
    _backend.Backend("triton", ("cuda",), _backend.triton_obstacle, partial(_self_test, "triton"), tolerance=1e-4),
    _backend.Backend("cpp", ("cpu",), cpp_obstacle, partial(_self_test, "cpp"), tolerance=1e-5),
)
