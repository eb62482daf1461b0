"""Queries as Deformable DETR has them: each with a vector for its position beside its content."""

import torch
from torch import Tensor, nn

from ..boxes import inverse_sigmoid
from ..denoising import NoisedQueries
from ..ops.anchor_encoding import anchor_encoding
from .layers import MLP
from .linear import Linear
from .proposals import Proposals
from .queries import QueryTable


class VectorQueries(nn.Module):
    """Embeds labels and boxes as queries of position and content (arXiv 2010.04159).

    Without ``proposed`` both are learned, and a query starts at a point that is made of its position. With it, both are
    made of the encoder's proposals, which is where queries start. A noised query's content is a row of the label table,
    its position is made of its box, and it starts at the box, or at its centre. A second set: as of ``Queries``.
    """

    def __init__(self, width: int, queries: int, classes: int, proposed: bool = False):
        super().__init__()
        self.classes, self.matching, self.proposed = classes, queries, proposed
        self.label_enc = nn.Embedding(classes + 1, width)
        self.position_head = MLP(2 * width, width, width)
        if proposed:
            self.pos_trans, self.pos_trans_norm = Linear(2 * width, 2 * width), nn.LayerNorm(2 * width)
            nn.init.xavier_uniform_(self.pos_trans.weight)
        else:
            self.position_embed = QueryTable(queries, width)
            self.tgt_embed = QueryTable(queries, width)
            self.reference_points = Linear(width, 2)
            nn.init.xavier_uniform_(self.reference_points.weight)
            nn.init.zeros_(self.reference_points.bias)

    def of_noise(self) -> list[Tensor]:
        """The weights that noised queries alone have a use for."""
        return [self.label_enc.weight, *self.position_head.parameters()]

    def forward(
        self, batch: int, noised: NoisedQueries | None, proposals: Proposals | None = None, both: bool = False
    ) -> tuple[Tensor, Tensor]:
        """-> position and content side by side [B, Q, 2 C], and anchor logits [B, Q, 4], ordered as in ``Queries``.

        Where queries start at points, the sizes of their anchors are 0: half of the image, to which layers add.
        """
        if proposals is None:
            position, content = self.position_embed.rows(both), self.tgt_embed.rows(both)
            places = nn.functional.pad(self.reference_points(position), (0, 2))
            vectors, places = (x.expand(batch, -1, -1) for x in (torch.cat((position, content), dim=-1), places))
        else:
            vectors, places = self._of_proposals(proposals.anchors), proposals.anchors
        if noised is None:
            return vectors, places
        live = noised.live[:, None, :, None]
        boxes = noised.boxes.flatten(1, 2)
        position = self.position_head(anchor_encoding(boxes, self.label_enc.embedding_dim // 2))
        content = (self.label_enc(noised.labels) * live).flatten(1, 2)
        noised_places = (inverse_sigmoid(noised.boxes).to(places.dtype) * live).flatten(1, 2)
        if not self.proposed:
            noised_places = nn.functional.pad(noised_places[..., :2], (0, 2))
        noised_vectors = torch.cat((position.to(content.dtype), content), dim=-1)
        return torch.cat((noised_vectors, vectors), dim=1), torch.cat((noised_places, places), dim=1)

    def _of_proposals(self, anchors: Tensor) -> Tensor:
        # The encoding puts y first, this model x. (Picked by a list they would wait for its copy on the device.)
        x, y, sides = anchors.sigmoid().split((1, 1, 2), dim=-1)
        encoding = anchor_encoding(torch.cat((y, x, sides), dim=-1), self.label_enc.embedding_dim // 2)
        return self.pos_trans_norm(self.pos_trans(encoding))
