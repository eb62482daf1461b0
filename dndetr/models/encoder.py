"""Encoders: dense self-attention over one level (DAB-DETR) and deformable attention over several (Deformable-DETR)."""

import math

import torch
from torch import Tensor, nn

from ..ops.conditional_attention import packed_attention
from ..ops.ms_deform_attn import ms_deform_attn_projected
from .features import Features, PositionGradient, token_centres
from .layers import (
    MLP,
    FeedForward,
    PackedProjections,
    Recomputable,
    ResidualNorm,
    Stream,
    merge_heads,
)
from .linear import Linear, half_precision, parallel_linear


class DenseEncoderLayer(Recomputable):
    """Post-norm self-attention and feed-forward block."""

    def __init__(self, width: int, heads: int, hidden: int, activation: str):
        super().__init__()
        self.self_attn = PackedProjections(width, heads)
        self.norm1 = ResidualNorm(width)
        self.ffn = FeedForward(width, hidden, activation)

    def forward(self, x: Stream, position: Tensor, valid: Tensor) -> Stream:
        both, v = self.self_attn.project(x.plus(position), x.low)
        # Never torch's own: with a mask, what it takes on recent GPUs (cuDNN) can have NaN as the gradient of sound
        # numbers.
        x = self.norm1(x, self.self_attn.out_proj(merge_heads(packed_attention(both, v, valid))))
        return self.ffn(x)


class DenseEncoder(nn.Module):
    """DAB-DETR's encoder: positions are scaled by an MLP of the content before every layer (arXiv 2201.12329)."""

    def __init__(self, width: int, heads: int, layers: int, hidden: int, activation: str):
        super().__init__()
        self.layers = nn.ModuleList(DenseEncoderLayer(width, heads, hidden, activation) for _ in range(layers))
        self.query_scale = MLP(width, width, width) if layers else None
        xavier(self)

    def forward(self, features: Features) -> Features:
        """Features -> Features with encoded tokens, as projections take them."""
        x = Stream.of(features.tokens)
        for layer in self.layers:
            x = layer(x, features.position * self.query_scale(x.low), features.valid)
        return features._replace(tokens=x.low)


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention with its four projections (arXiv 2010.04159)."""

    def __init__(self, width: int, heads: int, levels: int, points: int):
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = Linear(width, heads * levels * points * 2)
        self.attention_weights = Linear(width, heads * levels * points)
        self.value_proj, self.output_proj = Linear(width, width), Linear(width, width)
        self.initialise()

    def initialise(self) -> None:
        """Each head starts out looking in its own direction, point p at p + 1 pixels; all weights alike."""
        angle = torch.arange(self.heads, dtype=torch.float64) * (2 * math.pi / self.heads)
        direction = torch.stack((angle.cos(), angle.sin()), dim=-1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        reach = torch.arange(1, self.points + 1)
        bias = direction[:, None, None] * reach[:, None]  # [H, 1, P, 2]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.expand(-1, self.levels, -1, -1).flatten())
        for tensor in (self.sampling_offsets.weight, *self.attention_weights.parameters()):
            nn.init.zeros_(tensor)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, query: Tensor, reference_points: Tensor, features: Features) -> Tensor:
        """query [B, Q, C], reference_points [B, Q, L, 2 or 4] -> [B, Q, C]."""
        values = self.value_proj(features.tokens) if features.values is None else features.values
        value = values.unflatten(-1, (self.heads, -1))
        projected = parallel_linear(query, self.sampling_offsets, self.attention_weights)
        out = ms_deform_attn_projected(value, features.shapes, reference_points, projected, features.valid_sizes)
        return self.output_proj(out)


class DeformableEncoderLayer(Recomputable):
    """Post-norm deformable self-attention and feed-forward block."""

    def __init__(self, width: int, heads: int, hidden: int, levels: int, points: int, activation: str):
        super().__init__()
        self.self_attn = MSDeformAttn(width, heads, levels, points)
        self.norm1 = ResidualNorm(width)
        self.ffn = FeedForward(width, hidden, activation)

    def forward(self, x: Stream, reference_points: Tensor, features: Features, next_position: Tensor | None) -> Stream:
        """x with its position -> x, with ``next_position`` if there is one."""
        attended = self.self_attn(x.positioned, reference_points, features._replace(tokens=x.low))
        return self.ffn(self.norm1(x, attended), next_position)


class DeformableEncoder(nn.Module):
    """Deformable-DETR's encoder: every pixel of every level attends to a few points on all levels.

    directed: heads start with their own sampling directions only; otherwise the offsets also depend on the content from
    the start (what the official encoder-only variant does).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        layers: int,
        hidden: int,
        levels: int,
        points: int,
        activation: str = "relu",
        directed: bool = True,
    ):
        super().__init__()
        self.layers = nn.ModuleList(
            DeformableEncoderLayer(width, heads, hidden, levels, points, activation) for _ in range(layers)
        )
        xavier(self, directed)

    def forward(self, features: Features) -> Features:
        """Features -> Features with encoded tokens, as projections take them."""
        x, position = Stream.of(features.tokens), features.position
        # In half precision alone sums over pixels cost less than a position's gradient in float32.
        apart = features.level_embed is not None and half_precision(x.low, features.level_embed) is not None
        if apart:
            position = position.detach()
        if len(self.layers):
            reference_points = pixel_reference_points(features)
            x = x._replace(positioned=x.plus(position))
        for count, layer in enumerate(self.layers, 1):
            if apart:
                positioned = PositionGradient.apply(x.positioned, features.level_embed, features.shapes)
                x = x._replace(positioned=positioned)
            x = layer(x, reference_points, features, position if count < len(self.layers) else None)
        return features._replace(tokens=x.low)


def pixel_reference_points(features: Features) -> Tensor:
    """Centre of every token, relative to each level's full size: [B, S, L, 2] (x, y)."""
    dtype = features.position.dtype
    return token_centres(features, dtype)[:, :, None] * features.valid_ratios(dtype)[:, None]


def xavier(module: nn.Module, directed: bool = True) -> None:
    """The official initialisation: Xavier-uniform for every matrix, then (``directed``) deformable attention's own."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    for part in module.modules():
        if directed and isinstance(part, MSDeformAttn):
            part.initialise()
