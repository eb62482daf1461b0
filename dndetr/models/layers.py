"""Pieces that encoders and decoders share: the residual stream, MLP, feed-forward block, dense attention."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops.add_norm import add_norm
from ..ops.group_attention import GroupLayout, group_attention
from .activations import PReLU, activation
from .linear import Linear, linear, linear_layers


class Recomputable(nn.Module):
    """A block that, once ``recomputed`` is set, keeps only its inputs for backward and computes the rest again there.

    For blocks without random numbers and running statistics, which would advance twice.
    """

    recomputed = False

    def __call__(self, *inputs, **named):
        if self.recomputed and torch.is_grad_enabled():
            return checkpoint(super().__call__, *inputs, use_reentrant=False, preserve_rng_state=False, **named)
        return super().__call__(*inputs, **named)


def lowered(x: Tensor) -> Tensor:
    """x as autocast has it for a projection: cast once, for all projections that take it."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class Stream(NamedTuple):
    """The residual stream, [..., C], in the forms that layers take it in.

    full: what is added to, float32 under autocast; low: the same for projections, rounded under autocast and otherwise
    ``full`` itself; positioned: with a position added, rounded as ``low``, where the norm before was given one.
    """

    full: Tensor
    low: Tensor
    positioned: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor) -> "Stream":
        """The stream that starts with ``x``."""
        return cls(x.float() if torch.is_autocast_enabled(x.device.type) else x, lowered(x))

    def plus(self, position: Tensor) -> Tensor:
        """The stream with ``position`` [..., C] added, for projections."""
        return (self.full + position).to(self.low.dtype)


class ResidualNorm(nn.LayerNorm):
    """The layer norm of the residual stream and what a block adds to it."""

    def forward(self, x: Stream, y: Tensor, position: Tensor | None = None) -> Stream:
        """x, y, position [..., C] -> norm(x + y), ``positioned`` where there is a position."""
        return Stream(*add_norm(x.full, y, self.weight, self.bias, self.eps, position))


class MLP(nn.Module):
    """Linear layers with ReLU between them; ``widths`` holds input, hidden and output widths."""

    def __init__(self, *widths: int):
        super().__init__()
        self.layers = nn.ModuleList(Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        return linear_layers(x, self.layers)


class FeedForward(nn.Module):
    """Residual two-layer block with a norm after it: norm(x + linear2(activation(linear1(x))))."""

    def __init__(self, width: int, hidden: int, activation_name: str):
        super().__init__()
        self.linear1, self.linear2 = Linear(width, hidden), Linear(hidden, width)
        self.activation = None if activation_name == "relu" else activation(activation_name)
        self.norm = ResidualNorm(width)

    def forward(self, x: Stream, position: Tensor | None = None) -> Stream:
        if self.activation is None or isinstance(self.activation, PReLU):
            slope = None if self.activation is None else self.activation.weight
            y = linear_layers(x.low, (self.linear1, self.linear2), slope)
        else:
            y = self.linear2(self.activation(self.linear1(x.low)))
        return self.norm(x, y, position)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, Q, C] -> [B, heads, Q, C / heads], without a copy."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, heads, Q, D] -> [B, Q, heads * D]."""
    return x.transpose(1, 2).flatten(2)


def query_attention(q: Tensor, k: Tensor, v: Tensor, layout: GroupLayout, active: Tensor | None) -> Tensor:
    """Self-attention of a decoder's queries, q, k, v [B, H, Q, D] -> [B, Q, H * D]; active: as of ``group_attention``.

    Queries behind those of ``layout`` are a second set: they see each other, and no others see them.
    """
    own, more = layout.queries, q.shape[2] - layout.queries
    if more <= 0:
        return merge_heads(group_attention(q, k, v, layout, active))
    first, second = zip(*(x.split((own, more), dim=2) for x in (q, k, v)), strict=True)
    attended = group_attention(*first, layout, active), group_attention(*second, GroupLayout(0, 0, more))
    return torch.cat([merge_heads(x) for x in attended], dim=1)


class PackedProjections(nn.Module):
    """The projections of multi-head attention in torch's packed form (``in_proj_weight``, ``out_proj``)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def project(self, positioned: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys from ``positioned``, values from ``x``, both [B, Q, C] -> [B, Q, 2 C] and [B, H, Q, D]."""
        width = x.shape[-1]
        # Slices would each have a gradient of full size, with zeros for the rest; that of a split is put together once.
        weights, biases = (packed.split((2 * width, width)) for packed in (self.in_proj_weight, self.in_proj_bias))
        both, v = map(linear, (positioned, x), weights, biases)
        return both, split_heads(v, self.heads)
