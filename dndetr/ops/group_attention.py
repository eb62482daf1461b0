"""Self-attention over G groups of denoising queries followed by N matching queries.

    out = softmax(scale * q k^T + hidden) v        hidden(i, j) = -inf where query i may not see key j, else 0

A denoising query sees its own group and the matching queries; a matching query sees only the matching queries, so
that nothing leaks from the ground truth into the predictions (arXiv 2203.01305, section 4.3). Slots at and beyond
``active`` are hidden from everyone and produce zeros. With p = softmax(...): dv = p^T dout,
ds = p * (dout v^T - rowsum(dout * out)), dq = scale * ds k, dk = scale * ds^T q; nothing flows through what is hidden.

The structure is two key ranges per query, so no [Q, Q] mask is ever needed: kernels (kernels/group_attention.py,
csrc/attention) take it as integers and skip what is hidden.
"""

import math
from functools import partial
from typing import NamedTuple

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
    one_dtype,
    precise,
    products,
    self_test_error,
)


class GroupLayout(NamedTuple):
    """Order of the queries: ``groups`` x ``slots`` denoising queries first, then ``matching`` queries (Python ints)."""

    groups: int
    slots: int
    matching: int

    @property
    def denoising(self) -> int:
        """Number of denoising queries, the first rows of every query tensor."""
        return self.groups * self.slots

    @property
    def queries(self) -> int:
        """Number of queries in all."""
        return self.denoising + self.matching

    def slot_alive(self, active: Tensor) -> Tensor:
        """active [B] int -> [B, groups * slots] bool, True where the slot's number is below its image's ``active``."""
        slot = torch.arange(self.slots, device=active.device).repeat(self.groups)
        return slot < active[:, None]

    def blocked(self, active: Tensor | None = None, device=None) -> Tensor:
        """Dense mask for references and tests: [Q, Q], or [B, Q, Q] given active [B]; True = may not be attended.

        Rows of inactive slots keep what their group may see; their output is zero whatever they see.
        """
        device = active.device if active is not None else device
        group = torch.arange(self.denoising, device=device) // max(self.slots, 1)
        group = torch.cat((group, torch.full((self.matching,), -1, device=device)))
        blocked = (group[:, None] != group) & (group >= 0)
        if active is None:
            return blocked
        hidden = torch.nn.functional.pad(~self.slot_alive(active), (0, self.matching))
        return blocked | hidden[:, None, :]


def group_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, layout: GroupLayout, active: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The specification, with a dense mask; arguments and result as :func:`group_attention`."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    blocked = layout.blocked(active, device=q.device)
    if active is not None:
        blocked = blocked[:, None]
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(blocked, -math.inf)
    blind = blocked.all(-1, keepdim=True)
    out = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0) @ v
    return out if active is None else _silence(out, layout, active)


def _silence(out: Tensor, layout: GroupLayout, active: Tensor) -> Tensor:
    alive = torch.nn.functional.pad(layout.slot_alive(active), (0, layout.matching), value=True)
    return out.masked_fill(~alive[:, None, :, None], 0)


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? active"
_SETTINGS = "int groups, int slots, int matching, float scale, str precision, str backend"
torch.library.define("dndetr::group_attention", f"({_INPUTS}, {_SETTINGS}) -> (Tensor, Tensor)")
torch.library.define(
    "dndetr::group_attention_backward",
    f"(Tensor grad_out, {_INPUTS}, Tensor out, Tensor lse, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("dndetr::group_attention", ("cpu", "cuda"))
def _forward(q, k, v, active, groups, slots, matching, scale, precision, backend):
    out, lse = _forward_fake(q, k, v)
    if backend == "cpp":
        forward_cpp([q], [k], v, scale, out, lse, groups, slots, active)
    else:
        from ..kernels.group_attention import group_attention_forward

        precision = products(precision, q, q.shape[3], v.shape[3])
        with torch.cuda.device_of(q):
            group_attention_forward(q, k, v, active, groups, slots, matching, scale, precision, out, lse)
    return out, lse


@torch.library.impl("dndetr::group_attention_backward", ("cpu", "cuda"))
def _backward(grad_out, q, k, v, active, out, lse, groups, slots, matching, scale, precision, backend):
    grads = _backward_fake(grad_out, q, k, v)
    if backend == "cpp":
        backward_cpp(grad_out, [q], [k], v, scale, out, lse, grads, groups, slots, active)
    else:
        from ..kernels.group_attention import group_attention_backward

        precision = products(precision, q, q.shape[3], v.shape[3])
        given = grad_out, q, k, v, active, out, lse, groups, slots, matching, scale, precision
        with torch.cuda.device_of(q):
            group_attention_backward(*given, *grads)
    return grads


@torch.library.register_fake("dndetr::group_attention")
def _forward_fake(q, k, v, *_settings):
    return empty_heads(v), q.new_empty(q.shape[:3], dtype=precise(q.dtype))


@torch.library.register_fake("dndetr::group_attention_backward")
def _backward_fake(grad_out, q, k, v, *_settings):
    return empty_heads(q), empty_heads(k), empty_heads(v)


def _setup_context(ctx, inputs, output):
    q, k, v, active, *ctx.settings = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # of lse they would be zeros that nobody reads
    ctx.save_for_backward(q, k, v, active, out, lse)


def _differentiate(ctx, grad_out, _grad_lse):
    if grad_out is None:
        return (None,) * len(ctx.needs_input_grad)
    grads = torch.ops.dndetr.group_attention_backward(grad_out, *ctx.saved_tensors, *ctx.settings)
    return *grads, *(None,) * 7


torch.library.register_autograd("dndetr::group_attention", _differentiate, setup_context=_setup_context)
_backend.differentiable_once("group_attention")


def group_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: GroupLayout,
    active: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
    precision: str | None = None,
) -> Tensor:
    """Attention of denoising and matching queries in which no group sees another and matching queries see no group.

    q, k [B, H, Q, D], v [B, H, Q, D'] of any strides, Q = layout.queries; active [B] int32 live slots per group (None:
    all); scale defaults to 1 / sqrt(D) -> [B, H, Q, D']. Rows of inactive slots are zero and pass no gradient.
    The kernels' results can be differentiated once.
    precision: float32 products of the Triton kernels, "tf32", "tf32x3", "ieee" or "torch" (the default: as
    its float32 matmul precision).
    """
    if q.shape[2] != layout.queries:
        raise ValueError(f"q has {q.shape[2]} queries, but {layout} describes {layout.queries}")
    if not (q.shape[:3] == k.shape[:3] == v.shape[:3]) or q.shape[3] != k.shape[3]:
        shapes = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        raise ValueError(f"q, k, v must agree in [B, H, Q], q and k also in D: {shapes}")
    if active is not None and (active.shape != q.shape[:1] or active.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"active must be integers [{q.shape[0]}], got {active.dtype} {list(active.shape)}")
    q, k, v = one_dtype(q, k, v)
    active = None if active is None else active.contiguous()  # kernels take its address alone
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    chosen = choose("group_attention", backend, q.device.type, q.dtype, q.shape[3], v.shape[3])
    precision = checked_precision(precision)
    if chosen == "reference":
        return group_attention_reference(q, k, v, layout, active, scale)
    return torch.ops.dndetr.group_attention(q, k, v, active, *layout, scale, precision, chosen)[0]


# name: (groups, slots, matching), live slots of each image (None: all), heads, head width
CASES = {
    "tiny": ((2, 3, 4), (3, 1), 2, 8),
    "no-groups": ((0, 0, 5), None, 2, 8),
    "no-groups-but-slots": ((0, 8, 5), (3, 0), 2, 8),
    "one-group": ((1, 8, 6), (8, 2), 2, 8),
    "nothing-live": ((3, 4, 6), (0, 0), 2, 8),
    "all-live": ((3, 4, 6), None, 2, 8),
    "one-matching-query": ((2, 3, 1), (2, 3), 2, 8),
    "no-matching-queries": ((2, 3, 0), (2, 0), 2, 8),
    "demo": ((5, 8, 30), (8, 5, 0, 1), 4, 32),
}


def make_case(name: str, dtype: torch.dtype = torch.float32, seed: int = 0):
    """(q, k, v, layout, active) of a case; q, k, v are strided views of one packed projection."""
    layout, live, heads, width = CASES[name]
    layout = GroupLayout(*layout)
    batch = 2 if live is None else len(live)
    draw = torch.Generator().manual_seed(seed)
    packed = torch.randn(batch, layout.queries, 3, heads, width, generator=draw, dtype=torch.float64).to(dtype)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    return q, k, v, layout, None if live is None else torch.tensor(live, dtype=torch.int32)


def _self_test(backend: str, device_type: str) -> float:
    cases = [("tiny", torch.float32)]
    if backend == "triton":
        cases.append(("demo", torch.bfloat16))  # what training runs
    return _backend.worst(_error(backend, *make_case(*case), device_type) for case in cases)


def _error(backend: str, q, k, v, layout, active, device_type: str) -> float:
    q, k, v, active = (x.to(device_type) for x in (q, k, v, active))

    def attend(q, k, v):
        return torch.ops.dndetr.group_attention(q, k, v, active, *layout, 0.3, "tf32x3", backend)[0]

    given = gradients(attend, (q, k, v))
    exact = gradients(group_attention_reference, (q.double(), k.double(), v.double()), layout, active, 0.3)
    return self_test_error(given, exact, q.dtype)


_backend.register(
    "group_attention",
    _backend.Backend("triton", ("cuda",), _backend.triton_obstacle, partial(_self_test, "triton"), tolerance=1e-4),
    _backend.Backend("cpp", ("cpu",), cpp_obstacle, partial(_self_test, "cpp"), tolerance=1e-5),
)
