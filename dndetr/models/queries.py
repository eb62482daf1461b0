"""Content and anchors of the decoder's queries: learned matching queries and noised ground truth."""

import torch
from torch import Tensor, nn

from ..boxes import inverse_sigmoid
from ..denoising import NoisedQueries


class Queries(nn.Module):
    """Embeds labels and boxes as decoder queries.

    A query's content is a label embedding of width C - 1 and an indicator: 1 for denoising, 0 for matching queries.
    ``learned_content``: matching queries have content of their own (the deformable model) instead of the shared row
    "unknown", number K, of the label table. ``patterns`` > 0 repeats the anchors once per learned pattern vector,
    which is added to the content. anchors: "normal" (logits from N(0, 1)), "uniform" (centres uniform in the image) or
    "grid" (centres on a regular grid, sides 0.25).
    """

    def __init__(
        self, width: int, queries: int, classes: int, learned_content: bool, patterns: int = 0, anchors: str = "normal"
    ):
        super().__init__()
        self.classes = classes
        self.label_enc = nn.Embedding(classes + 1, width - 1)
        self.refpoint_embed = nn.Embedding(queries, 4)
        self.tgt_embed = nn.Embedding(queries, width - 1) if learned_content else None
        self.patterns = nn.Embedding(patterns, width) if patterns else None
        if patterns and learned_content:
            raise ValueError("patterns need queries that share their content; use --model.patterns 0")
        with torch.no_grad():
            self._place_anchors(anchors)

    def _place_anchors(self, kind: str) -> None:
        anchors = self.refpoint_embed.weight
        if kind == "uniform":
            anchors[:, :2] = inverse_sigmoid(torch.rand_like(anchors[:, :2]))
        elif kind == "grid":
            count = len(anchors)
            columns = round(count**0.5)
            rows = -(-count // columns)
            index = torch.arange(count)
            row, column = index // columns, index % columns
            in_row = torch.where(row == rows - 1, count - (rows - 1) * columns, columns)
            centres = torch.stack(((column + 0.5) / in_row, (row + 0.5) / rows), dim=-1)
            anchors.copy_(inverse_sigmoid(torch.cat((centres, torch.full_like(centres, 0.25)), dim=-1)))
        elif kind != "normal":
            raise ValueError(f"unknown anchors {kind!r}: choose normal, uniform or grid")

    @property
    def matching(self) -> int:
        """Number of matching queries."""
        return self.refpoint_embed.num_embeddings * (self.patterns.num_embeddings if self.patterns is not None else 1)

    def forward(self, batch: int, noised: NoisedQueries | None) -> tuple[Tensor, Tensor]:
        """-> content [B, Q, C] and anchor logits [B, Q, 4], denoising queries first."""
        anchors = self.refpoint_embed.weight
        if self.tgt_embed is not None:
            label = self.tgt_embed.weight
        else:
            label = self.label_enc.weight[self.classes].expand(len(anchors), -1)
        content = nn.functional.pad(label, (0, 1))
        if self.patterns is not None:
            content = (content + self.patterns.weight[:, None]).flatten(0, 1)
            anchors = anchors.repeat(self.patterns.num_embeddings, 1)
        content, anchors = content.expand(batch, -1, -1), anchors.expand(batch, -1, -1)
        if noised is None:
            return content, anchors
        live = noised.live[:, None, :, None]
        noised_content = nn.functional.pad(self.label_enc(noised.labels), (0, 1), value=1.0) * live
        noised_anchors = inverse_sigmoid(noised.boxes).to(anchors.dtype) * live
        content = torch.cat((noised_content.flatten(1, 2), content), dim=1)
        return content, torch.cat((noised_anchors.flatten(1, 2), anchors), dim=1)
