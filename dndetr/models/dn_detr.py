"""The detector: backbone, input projection, encoder, queries, decoder. All variants differ only in these parts."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..denoising import NoisedQueries
from ..ops.group_attention import GroupLayout
from ..ops.normalise import images_of
from .proposals import ProposalHead
from .queries import Queries
from .vector_queries import VectorQueries


class Predictions(NamedTuple):
    """Every decoder layer's logits [Y, B, Q, K] and boxes [Y, B, Q, 4] cxcywh, queries ordered as ``layout`` says.

    counted [B] int32: as of the noised queries. proposals: so many of the first layers are none of the decoder but the
    encoder's selected proposals, as matching queries, with zeros for denoising ones. tokens: logits [1, B, S, K] and
    boxes [1, B, S, 4] where the encoder's loss is of the proposals of all tokens. one_to_many: the decoder's layers
    of the second set, [Y, B, M, ...], in training.
    """

    logits: Tensor
    boxes: Tensor
    layout: GroupLayout
    counted: Tensor | None = None
    proposals: int = 0
    tokens: tuple[Tensor, Tensor] | None = None
    one_to_many: tuple[Tensor, Tensor] | None = None


class DNDETR(nn.Module):
    """A DETR whose decoder can be fed noised ground truth beside its own queries (arXiv 2203.01305).

    With ``proposals`` it has two stages: the encoder's proposals are where the queries start. ``one_to_many``: in
    training so many queries of a second set are decoded beside the others, for targets that are repeated, and neither
    sees the other (H-DETR, arXiv 2207.13080).
    """

    def __init__(
        self,
        backbone: nn.Module,
        projection: nn.Module,
        encoder: nn.Module,
        queries: Queries | VectorQueries,
        decoder: nn.Module,
        proposals: ProposalHead | None = None,
        one_to_many: int = 0,
    ):
        super().__init__()
        self.backbone = backbone
        self.projection = projection
        self.encoder = encoder
        self.queries = queries
        self.decoder = decoder
        self.proposals = proposals
        self.one_to_many = one_to_many

    def forward(self, images: Tensor, sizes: Tensor, noised: NoisedQueries | None = None) -> Predictions:
        """images [B, 3, H, W] on one canvas, sizes [B, 2] int64 valid (height, width) -> Predictions.

        ``noised`` only in training; without it the model is the plain detector and nothing of the method is left. Nor
        is a second set, outside of training mode.
        """
        maps = self.backbone(images)
        features = self.encoder(self.projection(maps, sizes, tuple(images.shape[-2:])))
        more = self.one_to_many if self.training else 0
        proposals = None if self.proposals is None else self.proposals(features, more=more)
        content, anchors = self.queries(images.shape[0], noised, proposals, both=more > 0)
        matching = self.queries.matching
        layout = GroupLayout(0, 0, matching) if noised is None else noised.layout(matching)
        active, counted = (None, None) if noised is None else (noised.active, noised.counted)
        logits, boxes = self.decoder(content, anchors, features, layout, active)
        tokens, one_to_many = None, None
        if more:
            sets = layout.queries, more
            logits, more_logits = zip(*(x.split(sets, dim=1) for x in logits), strict=True)
            boxes, more_boxes = zip(*(x.split(sets, dim=1) for x in boxes), strict=True)
            one_to_many = torch.stack(more_logits), torch.stack(more_boxes)
        if proposals is not None and self.proposals.objects:
            tokens = proposals.logits[None], proposals.boxes[None]
        elif proposals is not None:
            first = (0, 0, layout.denoising, 0)
            logits = [nn.functional.pad(proposals.logits, first), *logits]
            boxes = [nn.functional.pad(proposals.boxes, first), *boxes]
        selected = len(logits) - len(self.decoder.layers)
        return Predictions(torch.stack(logits), torch.stack(boxes), layout, counted, selected, tokens, one_to_many)

    @torch.no_grad()
    def predict(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """The last layer's logits [B, N, K] and boxes [B, N, 4] cxcywh."""
        predictions = self(images, sizes)
        return predictions.logits[-1], predictions.boxes[-1]

    @torch.no_grad()
    def infer(self, batch: Batch, precision: torch.dtype, noised: NoisedQueries | None = None) -> Predictions:
        """Predictions for a batch from anywhere, in float32 on the model's device, computed in ``precision``."""
        device = next(self.parameters()).device
        batch = batch.to(device)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            predictions = self(images_of(batch), batch.sizes, noised)
        return predictions._replace(logits=predictions.logits.float(), boxes=predictions.boxes.float())
