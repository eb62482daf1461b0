"""DAB-Deformable-DETR's decoder: anchors as boxes, refined layer by layer, with deformable cross-attention."""

import torch
from torch import Tensor, nn

from ..boxes import inverse_sigmoid
from ..ops.group_attention import GroupLayout, group_attention
from .encoder import MSDeformAttn, xavier
from .features import Features
from .heads import box_head, class_head
from .layers import MLP, FeedForward, PackedProjections, Recomputable, ResidualNorm, Stream, lowered, merge_heads
from .position import anchor_encoding


class DeformableDecoderLayer(Recomputable):
    """Self-attention over the query groups, deformable cross-attention, feed-forward; each post-norm."""

    def __init__(self, width: int, heads: int, hidden: int, levels: int, points: int, activation: str):
        super().__init__()
        self.self_attn = PackedProjections(width, heads)
        self.norm2 = ResidualNorm(width)
        self.cross_attn = MSDeformAttn(width, heads, levels, points)
        self.norm1 = ResidualNorm(width)
        self.ffn = FeedForward(width, hidden, activation)

    def forward(
        self,
        x: Stream,
        position: Tensor,
        reference_points: Tensor,
        features: Features,
        layout: GroupLayout,
        active: Tensor | None,
    ) -> Stream:
        """x, position [B, Q, C], reference_points [B, Q, L, 4] -> [B, Q, C]."""
        q, k, v = self.self_attn.project(x.plus(position), x.low)
        x = self.norm2(x, self.self_attn.out_proj(merge_heads(group_attention(q, k, v, layout, active))), position)
        x = self.norm1(x, self.cross_attn(x.positioned, reference_points, features))
        return self.ffn(x)


class DeformableDecoder(nn.Module):
    """Decoder layers with anchor refinement and heads of their own; no gradient crosses the refined anchors.

    size_bias: initial correction of w and h in the first layer (-2 in the official code, for anchors of random size).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        layers: int,
        hidden: int,
        classes: int,
        levels: int,
        points: int,
        activation: str = "relu",
        size_bias: float = -2.0,
    ):
        super().__init__()
        self.layers = nn.ModuleList(
            DeformableDecoderLayer(width, heads, hidden, levels, points, activation) for _ in range(layers)
        )
        self.query_scale = MLP(width, width, width)
        self.ref_point_head = MLP(2 * width, width, width)
        xavier(self)
        self.class_embed = nn.ModuleList(class_head(width, classes) for _ in range(layers))
        self.bbox_embed = nn.ModuleList(
            box_head(width, size_bias=size_bias if index == 0 else 0.0) for index in range(layers)
        )

    def forward(
        self, content: Tensor, anchors: Tensor, features: Features, layout: GroupLayout, active: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """content [B, Q, C], anchor logits [B, Q, 4] -> every layer's logits [Y, B, Q, K] and boxes [Y, B, Q, 4]."""
        x, half = Stream.of(content), content.shape[-1] // 2
        features = features._replace(tokens=lowered(features.tokens))
        reference = anchors.sigmoid()
        ratios = features.valid_ratios(reference.dtype).repeat(1, 1, 2)  # [B, L, 4] (x, y, x, y)
        logits, boxes = [], []
        for index, layer in enumerate(self.layers):
            reference_points = reference[:, :, None] * ratios[:, None]
            position = self.ref_point_head(anchor_encoding(reference_points[:, :, 0], half))
            if index:
                position = position * self.query_scale(x.low)
            x = layer(x, position, reference_points, features, layout, active)
            logits.append(self.class_embed[index](x.low))
            # Refinement and prediction are one and the same here: the head is evaluated once.
            boxes.append((self.bbox_embed[index](x.low) + inverse_sigmoid(reference)).sigmoid())
            reference = boxes[-1].detach()
        return torch.stack(logits), torch.stack(boxes)
