"""The detector: backbone, input projection, encoder, queries, decoder. All variants differ only in these parts."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..denoising import NoisedQueries
from ..ops.group_attention import GroupLayout
from .queries import Queries


class Predictions(NamedTuple):
    """Every decoder layer's logits [Y, B, Q, K] and boxes [Y, B, Q, 4] cxcywh, queries ordered as ``layout`` says."""

    logits: Tensor
    boxes: Tensor
    layout: GroupLayout


class DNDETR(nn.Module):
    """A DETR whose decoder can be fed noised ground truth beside its own queries (arXiv 2203.01305)."""

    def __init__(
        self, backbone: nn.Module, projection: nn.Module, encoder: nn.Module, queries: Queries, decoder: nn.Module
    ):
        super().__init__()
        self.backbone = backbone
        self.projection = projection
        self.encoder = encoder
        self.queries = queries
        self.decoder = decoder

    def forward(self, images: Tensor, sizes: Tensor, noised: NoisedQueries | None = None) -> Predictions:
        """images [B, 3, H, W] on one canvas, sizes [B, 2] int64 valid (height, width) -> Predictions.

        ``noised`` only in training; without it the model is the plain detector and nothing of the method is left.
        """
        maps = self.backbone(images)
        features = self.encoder(self.projection(maps, sizes, tuple(images.shape[-2:])))
        content, anchors = self.queries(images.shape[0], noised)
        matching = self.queries.matching
        layout = GroupLayout(0, 0, matching) if noised is None else noised.layout(matching)
        active = None if noised is None else noised.active
        logits, boxes = self.decoder(content, anchors, features, layout, active)
        return Predictions(logits, boxes, layout)

    @torch.no_grad()
    def predict(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """The last layer's logits [B, N, K] and boxes [B, N, 4] cxcywh."""
        logits, boxes, _ = self(images, sizes)
        return logits[-1], boxes[-1]

    @torch.no_grad()
    def infer(self, batch: Batch, precision: torch.dtype, noised: NoisedQueries | None = None) -> Predictions:
        """Predictions for a batch from anywhere, in float32 on the model's device, computed in ``precision``."""
        device = next(self.parameters()).device
        batch = batch.to(device)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            logits, boxes, layout = self(batch.images, batch.sizes, noised)
        return Predictions(logits.float(), boxes.float(), layout)
