"""Self-attention over G groups of denoising queries followed by N matching queries.

    out = softmax(scale * q k^T + hidden) v        hidden(i, j) = -inf where query i may not see key j, else 0

A denoising query sees its own group and the matching queries; a matching query sees only the matching queries, so
that nothing leaks from the ground truth into the predictions (arXiv 2203.01305, section 4.3). Slots at and beyond
``active`` are hidden from everyone and produce zeros. With p = softmax(...): dv = p^T dout,
ds = p * (dout v^T - rowsum(dout * out)), dq = scale * ds k, dk = scale * ds^T q; nothing flows through what is hidden.

The structure is two key ranges per query, so no [Q, Q] mask is ever needed: the matching queries are one small
attention, and each group is another over its own keys joined with the matching ones.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import _backend


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


def _attend(scores: Tensor, v: Tensor) -> Tensor:
    return scores.softmax(-1).to(v.dtype) @ v


def _group_attention_split(
    q: Tensor, k: Tensor, v: Tensor, layout: GroupLayout, active: Tensor | None, scale: float
) -> Tensor:
    """The matching part as one attention, each group as one over its own keys and the matching ones."""
    groups, slots, matching = layout
    noised = layout.denoising
    if noised == 0:
        return _attend(q @ (k * scale).transpose(-1, -2), v)
    batch, heads = q.shape[:2]
    k = k * scale

    def by_group(x):
        return x[:, :, :noised].reshape(batch, heads, groups, slots, -1)

    q_own, k_own, v_own = by_group(q), by_group(k), by_group(v)
    k_matching, v_matching = k[:, :, noised:], v[:, :, noised:]
    own = q_own @ k_own.transpose(-1, -2)
    if active is not None:
        slot = torch.arange(slots, device=active.device)
        own = own.masked_fill((slot >= active[:, None])[:, None, None, None, :], -math.inf)
    shared = q @ k_matching.transpose(-1, -2)
    both = torch.cat((own, by_group(shared)), dim=-1)
    if matching == 0:
        # A group without live slots has nothing at all to see.
        both = both.masked_fill((both == -math.inf).all(-1, keepdim=True), 0)
    weights = both.softmax(-1).to(v.dtype)
    from_own = (weights[..., :slots] @ v_own).reshape(batch, heads, noised, -1)
    from_matching = weights[..., slots:].reshape(batch, heads, noised, matching) @ v_matching
    out = torch.cat((from_own + from_matching, _attend(shared[:, :, noised:], v_matching)), dim=2)
    return out if active is None else _silence(out, layout, active)


def group_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: GroupLayout,
    active: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of denoising and matching queries in which no group sees another and matching queries see no group.

    q, k, v [B, H, Q, D] of any strides, Q = layout.queries; active [B] int32 live slots per group (None: all);
    scale defaults to 1 / sqrt(D) -> [B, H, Q, D]. Rows of inactive slots are zero and pass no gradient.
    """
    if q.shape[2] != layout.queries:
        raise ValueError(f"q has {q.shape[2]} queries, but {layout} describes {layout.queries}")
    if not (q.shape[:3] == k.shape[:3] == v.shape[:3]):
        raise ValueError(f"q, k, v must agree in [B, H, Q]: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    chosen, _ = _backend.choose("group_attention", backend, q.device.type)
    attend = group_attention_reference if chosen == "reference" else _group_attention_split
    return attend(q, k, v, layout, active, scale)


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


def _self_test(_device_type: str) -> float:
    q, k, v, layout, active = make_case("tiny")
    given = _group_attention_split(q, k, v, layout, active, 0.3)
    return (given - group_attention_reference(q, k, v, layout, active, 0.3)).abs().max().item()


_backend.register("group_attention", _backend.Backend("torch", (), lambda _: None, _self_test, tolerance=1e-5))
