"""Content and anchors of the decoder's queries: learned ones, for matching or one-to-many, and noised ground truth."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..boxes import inverse_sigmoid
from ..denoising import NoisedQueries
from .proposals import Proposals


class QueryTable(nn.Embedding):
    """What each matching query has learned, [N, C], and each query of a second set, [M, C], where there is one.

    The second set has a parameter of its own, ``many``, so that the detector without it has the same others.
    """

    def __init__(self, queries: int, width: int):
        super().__init__(queries, width)
        self.register_parameter("many", None)
        self._place: Callable[[Tensor], object] | None = None

    def start_at(self, place: Callable[[Tensor], object]) -> None:
        """Let ``place`` change what rows start from, N(0, 1), also of a second set."""
        self._place = place
        place(self.weight)

    def add_second_set(self, count: int) -> None:
        """So many more rows, in ``many``."""
        self.many = nn.Parameter(torch.randn(count, self.embedding_dim))
        if self._place is not None:
            self._place(self.many)

    def rows(self, both: bool) -> Tensor:
        """[N, C] of the matching queries, or [N + M, C] of both sets."""
        return torch.cat((self.weight, self.many)) if both else self.weight


class Queries(nn.Module):
    """Embeds labels and boxes as decoder queries.

    A query's content is a label embedding of width C - 1 and an indicator: 1 for denoising, 0 for matching queries;
    without ``indicator`` (DINO) the embedding alone, of width C.
    ``learned_content``: matching queries have content of their own (the deformable model) instead of the shared row
    "unknown", number K, of the label table. ``patterns`` > 0 repeats the anchors once per learned pattern vector,
    which is added to the content. anchors: "normal" (logits from N(0, 1)), "uniform" (centres uniform in the image) or
    "grid" (centres on a regular grid, sides 0.25).
    ``proposed``: the anchors are the encoder's proposals instead; so is the content where it is not learned, and where
    it is (mixed query selection), the i-th belongs to the i-th best, and has no indicator.
    A second set (``QueryTable.add_second_set``) is behind all others, and there where a caller asks for it.
    """

    def __init__(
        self,
        width: int,
        queries: int,
        classes: int,
        learned_content: bool,
        patterns: int = 0,
        anchors: str = "normal",
        indicator: bool = True,
        proposed: bool = False,
    ):
        super().__init__()
        if patterns and (learned_content or proposed):
            raise ValueError("patterns need queries that share their content; use --model.patterns 0")
        self.classes, self.indicator, self.count = classes, indicator, queries
        self.label_enc = nn.Embedding(classes + 1, width - indicator)
        self.refpoint_embed = None if proposed else QueryTable(queries, 4)
        content = width - (indicator and not proposed)
        self.tgt_embed = QueryTable(queries, content) if learned_content else None
        self.patterns = nn.Embedding(patterns, width) if patterns else None
        if not proposed:
            self.refpoint_embed.start_at(partial(_place_anchors, kind=anchors))
        elif learned_content:
            self.tgt_embed.start_at(nn.init.xavier_uniform_)

    @property
    def matching(self) -> int:
        """Number of matching queries."""
        return self.count * (self.patterns.num_embeddings if self.patterns is not None else 1)

    def of_noise(self) -> list[Tensor]:
        """The weights that noised queries alone have a use for."""
        return [self.label_enc.weight]

    def forward(
        self, batch: int, noised: NoisedQueries | None, proposals: Proposals | None = None, both: bool = False
    ) -> tuple[Tensor, Tensor]:
        """-> content [B, Q, C] and anchor logits [B, Q, 4], denoising queries first; both: and the second set last."""
        content, anchors = self._learned(proposals, both)
        content, anchors = content.expand(batch, -1, -1), anchors.expand(batch, -1, -1)
        if noised is None:
            return content, anchors
        live = noised.live[:, None, :, None]
        noised_content = self._padded(self.label_enc(noised.labels), 1.0) * live
        noised_anchors = inverse_sigmoid(noised.boxes).to(anchors.dtype) * live
        content = torch.cat((noised_content.flatten(1, 2), content), dim=1)
        return content, torch.cat((noised_anchors.flatten(1, 2), anchors), dim=1)

    def _learned(self, proposals: Proposals | None, both: bool) -> tuple[Tensor, Tensor]:
        """Content [N, C] and anchors [N, 4] of the matching queries, or both sets, or of each image [B, N, ...]."""
        if proposals is not None:
            return proposals.content if self.tgt_embed is None else self.tgt_embed.rows(both)[None], proposals.anchors
        anchors = self.refpoint_embed.rows(both)
        if self.tgt_embed is not None:
            label = self.tgt_embed.rows(both)
        else:
            label = self.label_enc.weight[self.classes].expand(len(anchors), -1)
        content = self._padded(label, 0.0)
        if self.patterns is None:
            return content, anchors
        content = (content + self.patterns.weight[:, None]).flatten(0, 1)
        return content, anchors.repeat(self.patterns.num_embeddings, 1)

    def _padded(self, label: Tensor, value: float) -> Tensor:
        return nn.functional.pad(label, (0, 1), value=value) if self.indicator else label


@torch.no_grad()
def _place_anchors(anchors: Tensor, kind: str) -> None:
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
