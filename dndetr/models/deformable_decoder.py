"""The decoder of DAB-Deformable-DETR, Deformable DETR and DINO: deformable cross-attention around boxes or points."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..boxes import EPS
from ..ops.anchor_encoding import anchor_encoding
from ..ops.group_attention import GroupLayout
from ..ops.refine_boxes import refine_boxes
from .encoder import MSDeformAttn, xavier
from .features import Features
from .heads import box_head, class_head
from .layers import (
    MLP,
    FeedForward,
    PackedProjections,
    Recomputable,
    ResidualNorm,
    Stream,
    lowered,
    query_attention,
    split_heads,
)
from .linear import is_watched, linear_each, shared_half_precision


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
        """x, position [B, Q, C], reference_points [B, Q, L, 2 or 4] -> [B, Q, C]."""
        both, v = self.self_attn.project(x.plus(position), x.low)
        q, k = (split_heads(part, self.self_attn.heads) for part in both.chunk(2, dim=-1))
        x = self.norm2(x, self.self_attn.out_proj(query_attention(q, k, v, layout, active)), position)
        x = self.norm1(x, self.cross_attn(x.positioned, reference_points, features))
        return self.ffn(x)


class DeformableDecoder(nn.Module):
    """Decoder layers with anchor refinement; no gradient crosses the refined anchors that layers look at.

    size_bias: initial correction of w and h by the first layer's own head (-2 in the official code, for anchors of
    random size).
    In what follows DINO (arXiv 2203.03605) differs. query_scale: from the second layer on, positions are scaled by an
    MLP of the content; norm: the heads predict from normalised outputs, and refine from plain ones; shared_heads: one
    pair of heads for all layers; look_forward_twice: a layer's boxes are corrections of what the layer before has
    refined, with its gradient, so that their loss trains both.
    In what follows Deformable DETR (arXiv 2010.04159) differs. vectors: queries come with positions of their own, the
    same for all layers; points_first: where queries start is a point, not a box; refine: layers correct the boxes of
    the one before, and look at them, or all of them where queries start. eps: as of :func:`refine_boxes`.
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
        query_scale: bool = True,
        norm: bool = False,
        shared_heads: bool = False,
        look_forward_twice: bool = False,
        vectors: bool = False,
        points_first: bool = False,
        refine: bool = True,
        eps: float = EPS,
    ):
        super().__init__()
        self.look_forward_twice, self.points_first, self.refine, self.eps = (
            look_forward_twice,
            points_first,
            refine,
            eps,
        )
        self.layers = nn.ModuleList(
            DeformableDecoderLayer(width, heads, hidden, levels, points, activation) for _ in range(layers)
        )
        self.query_scale = MLP(width, width, width) if query_scale and not vectors else None
        self.ref_point_head = None if vectors else MLP(2 * width, width, width)
        self.norm = nn.LayerNorm(width) if norm else None
        xavier(self)
        if shared_heads:
            self.class_embed, self.bbox_embed = class_head(width, classes), box_head(width)
        else:
            self.class_embed = nn.ModuleList(class_head(width, classes) for _ in range(layers))
            self.bbox_embed = nn.ModuleList(
                box_head(width, size_bias=size_bias if index == 0 else 0.0) for index in range(layers)
            )

    def _heads(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Every layer's class and box head."""
        if isinstance(self.class_embed, nn.ModuleList):
            return zip(self.class_embed, self.bbox_embed, strict=True)
        return itertools.repeat((self.class_embed, self.bbox_embed), len(self.layers))

    def _values(self, tokens: Tensor) -> list[Tensor | None]:
        """What each layer's cross-attention projects tokens [B, S, C] to, where one step of the gradient makes them."""
        ours = all(type(layer) is DeformableDecoderLayer and not layer.recomputed for layer in self.layers)
        attentions = [layer.cross_attn for layer in self.layers] if ours and torch.is_grad_enabled() else []
        ours = all(type(attention) is MSDeformAttn and not is_watched(attention) for attention in attentions)
        projections = [attention.value_proj for attention in attentions] if ours else []
        if not projections or shared_half_precision(tokens, projections) is None:
            return [None] * len(self.layers)
        return linear_each(tokens, projections)

    def forward(
        self, content: Tensor, anchors: Tensor, features: Features, layout: GroupLayout, active: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """content [B, Q, C], anchor logits [B, Q, 4] -> every layer's logits [B, Q, K], and its boxes [B, Q, 4].

        With vectors, content is [B, Q, 2 C]: positions and content. Queries behind those of ``layout`` are a second
        set.
        """
        position = None
        if self.ref_point_head is None:
            position, content = content.chunk(2, dim=-1)
        x, half = Stream.of(content), content.shape[-1] // 2
        features = features._replace(tokens=lowered(features.tokens))
        values = self._values(features.tokens)
        reference = anchors.sigmoid()
        attached = reference
        ratios = features.valid_ratios(reference.dtype).repeat(1, 1, 2)  # [B, L, 4] (x, y, x, y)
        logits, boxes = [], []
        for index, (layer, (class_embed, bbox_embed)) in enumerate(zip(self.layers, self._heads(), strict=True)):
            reference_points = reference[:, :, None] * ratios[:, None]
            if self.ref_point_head is not None:
                position = self.ref_point_head(anchor_encoding(reference_points[:, :, 0], half))
                if index and self.query_scale is not None:
                    position = position * self.query_scale(x.low)
            if self.points_first and not (index and self.refine):
                reference_points = reference_points[..., :2]
            x = layer(x, position, reference_points, features._replace(values=values[index]), layout, active)
            out = x.low if self.norm is None else self.norm(x.full)
            logits.append(class_embed(out))
            correction = bbox_embed(out)
            boxes.append(refine_boxes(correction, attached, eps=self.eps))
            if not self.refine:
                continue
            if index + 1 == len(self.layers):
                break
            # Without a norm, refinement and prediction have the same correction, and mostly the same gradient too.
            if self.norm is not None:
                correction = bbox_embed(x.low)
            same = self.norm is None and attached is reference
            refined = boxes[-1] if same else refine_boxes(correction, reference, eps=self.eps)
            reference = refined.detach()
            attached = refined if self.look_forward_twice else reference
        return logits, boxes
