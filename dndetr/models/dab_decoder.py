"""DAB-DETR's decoder (arXiv 2201.12329): anchors as boxes, refined layer by layer, with dense cross-attention."""

import torch
from torch import Tensor, nn

from ..boxes import EPS
from ..ops.anchor_encoding import anchor_encoding
from ..ops.conditional_attention import conditional_attention
from ..ops.group_attention import GroupLayout
from ..ops.refine_boxes import refine_boxes
from .encoder import xavier
from .features import Features
from .heads import box_head, class_head
from .layers import (
    MLP,
    FeedForward,
    Recomputable,
    ResidualNorm,
    Stream,
    lowered,
    merge_heads,
    query_attention,
    split_heads,
)
from .linear import Linear, linear_each


class DABDecoderLayer(Recomputable):
    """Self-attention over the query groups, conditional cross-attention, feed-forward; each post-norm.

    ``first``: this layer's cross-attention also adds the learned query position. ``levels`` > 1: one attention per
    feature level, mixed by a gate (softmax over levels) of the self-attention query.
    """

    def __init__(self, width: int, heads: int, hidden: int, activation: str, first: bool, levels: int):
        super().__init__()
        self.heads = heads
        for name in ("qcontent", "qpos", "kcontent", "kpos", "v", "out"):
            self.add_module(f"sa_{name}_proj", Linear(width, width))
        for name in ("qcontent", "kcontent", "kpos", "v", "qpos_sine", "out"):
            self.add_module(f"ca_{name}_proj", Linear(width, width))
        self.ca_qpos_proj = Linear(width, width) if first else None
        self.level_gate = Linear(width, levels) if levels > 1 else None
        self.norm1, self.norm2 = ResidualNorm(width), ResidualNorm(width)
        self.ffn = FeedForward(width, hidden, activation)

    def forward(
        self, x: Stream, position: Tensor, sine: Tensor, features: Features, layout: GroupLayout, active: Tensor | None
    ) -> Stream:
        """x, position, sine [B, Q, C] (content, learned position, anchor encoding) -> [B, Q, C]."""
        content = self.sa_qcontent_proj, self.sa_kcontent_proj, self.sa_v_proj
        q_content, k_content, values = linear_each(x.low, content)
        q_position, k_position = linear_each(position, (self.sa_qpos_proj, self.sa_kpos_proj))
        query = q_content + q_position
        q, k, v = (split_heads(part, self.heads) for part in (query, k_content + k_position, values))
        x = self.norm1(x, self.sa_out_proj(query_attention(q, k, v, layout, active)))
        gate = None if self.level_gate is None else self.level_gate(query).softmax(-1)
        x = self.norm2(x, self.ca_out_proj(self._cross_attention(x.low, position, sine, features, gate)))
        return self.ffn(x)

    def _cross_attention(
        self, x: Tensor, position: Tensor, sine: Tensor, features: Features, gate: Tensor | None
    ) -> Tensor:
        q_content = self.ca_qcontent_proj(x)
        k_content, values = linear_each(features.tokens, (self.ca_kcontent_proj, self.ca_v_proj))
        k_position = self.ca_kpos_proj(features.position)
        if self.ca_qpos_proj is not None:
            q_content = q_content + self.ca_qpos_proj(position)
            k_content = k_content + k_position
        queries = [split_heads(part, self.heads) for part in (q_content, self.ca_qpos_sine_proj(sine))]
        memory = [split_heads(part, self.heads) for part in (k_content, k_position, values)]
        if gate is None:
            return merge_heads(conditional_attention(*queries, *memory, features.valid))
        # The output projection is linear and the gate sums to one, so the levels are mixed before it.
        sizes = [h * w for h, w in features.shapes]
        keys = zip(*(part.split(sizes, dim=2) for part in memory), strict=True)
        mixed = 0
        for level, (parts, valid) in enumerate(zip(keys, features.valid.split(sizes, dim=1), strict=True)):
            attended = merge_heads(conditional_attention(*queries, *parts, valid))
            mixed = mixed + gate[..., level, None] * attended
        return mixed


class DABDecoder(nn.Module):
    """Decoder layers with anchor refinement and heads that all layers share.

    Each layer's head adds its box correction, from the normalised output, to the anchor that the previous layer left
    attached to the graph, so a layer's box loss also reaches the layer before it. eps: as of :func:`refine_boxes`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        layers: int,
        hidden: int,
        classes: int,
        activation: str = "prelu",
        levels: int = 1,
        eps: float = EPS,
    ):
        super().__init__()
        self.eps = eps
        self.layers = nn.ModuleList(
            DABDecoderLayer(width, heads, hidden, activation, first=index == 0, levels=levels)
            for index in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.query_scale = MLP(width, width, width)
        self.ref_point_head = MLP(2 * width, width, width)
        self.ref_anchor_head = MLP(width, width, 2)
        xavier(self)
        self.class_embed = class_head(width, classes)
        # The encoder-only variant is the one whose box head does not start at zero corrections.
        self.bbox_embed = box_head(width, zero=levels == 1)

    def forward(
        self, content: Tensor, anchors: Tensor, features: Features, layout: GroupLayout, active: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """content [B, Q, C], anchor logits [B, Q, 4] -> every layer's logits [B, Q, K], and its boxes [B, Q, 4].

        Queries behind those of ``layout`` are a second set.
        """
        x, half = Stream.of(content), content.shape[-1] // 2
        features = features._replace(tokens=lowered(features.tokens), position=lowered(features.position))
        reference = anchors.sigmoid()
        attached = reference
        logits, boxes = [], []
        for index, layer in enumerate(self.layers):
            encoding = anchor_encoding(reference, half)
            position = self.ref_point_head(encoding)
            sine = encoding[..., : 2 * half]
            if index:
                sine = sine * self.query_scale(x.low)
            # Modulated attention: the y and x halves are scaled by a learned reference size over the anchor's size.
            size = self.ref_anchor_head(x.low).sigmoid() / reference[..., 2:]
            sine = torch.cat((sine[..., :half] * size[..., 1:], sine[..., half:] * size[..., :1]), dim=-1)
            x = layer(x, position, sine, features, layout, active)
            out = self.norm(x.full)
            logits.append(self.class_embed(out))
            boxes.append(refine_boxes(self.bbox_embed(out), attached, eps=self.eps))
            if index + 1 < len(self.layers):
                attached = refine_boxes(self.bbox_embed(x.low), reference, eps=self.eps)
                reference = attached.detach()
        return logits, boxes
