"""Two stages: every token of the encoder proposes a box, and the best proposals are where the decoder's queries start.

Scored by the best class, with the loss of those that are selected (DINO, arXiv 2203.03605), or for being an object of
any class, with the loss of all tokens (Deformable DETR, arXiv 2010.04159). How many are selected is fixed, so no shape
depends on the data.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .features import Features, token_centres
from .heads import box_head, class_head
from .linear import Linear

_BORDER = 0.01  # closer to the border, or smaller, a proposal has no sound logits


class Proposals(NamedTuple):
    """What the encoder proposes.

    index [B, N] int64: tokens of the N best, best first; content [B, N, C] and anchors [B, N, 4] box logits, where
    queries start, without gradients, N with the next best, where a second set starts; logits [B, n, K] and boxes
    [B, n, 4] cxcywh: what the loss is of, the best of the first set alone, or all S tokens.
    """

    index: Tensor
    content: Tensor
    anchors: Tensor
    logits: Tensor
    boxes: Tensor


def proposed_logits(features: Features, dtype: torch.dtype, size: float | Tensor = 0.05) -> tuple[Tensor, Tensor]:
    """A box around every token, in logits, before the encoder's head corrects it: [B, S, 4], and whether it is sound.

    size: of boxes on the finest level as a share of the image, or [2] (w, h); doubled on each next level. Outside the
    image, at its very border and where boxes have its size they are not sound [B, S] bool, and infinite: the whole
    image's.
    """
    centres = token_centres(features, dtype)
    levels = [centres.new_full((h * w, 1), 2.0**level) for level, (h, w) in enumerate(features.shapes)]
    sides = (torch.cat(levels) * size).expand(centres.shape)
    boxes = torch.cat((centres, sides), dim=-1)
    sound = ((boxes > _BORDER) & (boxes < 1 - _BORDER)).all(-1) & features.valid
    return (boxes / (1 - boxes)).log().masked_fill(~sound[..., None], torch.inf), sound


class ProposalHead(nn.Module):
    """Scores and corrects the encoder's proposals, and selects the best.

    count: how many; objects: score them for being an object (by the first class's logit) and give the loss all tokens;
    official: tokens without a sound proposal are scored like others, as in the official code, instead of being selected
    only when there are no others; size: of the boxes around tokens, as of ``proposed_logits``.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        count: int,
        objects: bool = False,
        official: bool = False,
        size: float = 0.05,
    ):
        super().__init__()
        self.count, self.objects, self.official, self.size = count, objects, official, size
        self.enc_output = Linear(width, width)
        nn.init.xavier_uniform_(self.enc_output.weight)
        self.enc_output_norm = nn.LayerNorm(width)
        self.class_embed = class_head(width, classes)
        self.bbox_embed = box_head(width)

    def forward(self, features: Features, more: int = 0) -> Proposals:
        """Features -> Proposals; more: so many of the next best for a second set of queries."""
        count = self.count + more
        dtype = torch.promote_types(features.tokens.dtype, torch.float32)
        places, sound = proposed_logits(features, dtype, self.size)
        tokens = features.tokens.masked_fill(~sound[..., None], 0)
        if (lacking := count - tokens.shape[1]) > 0:  # a tiny image
            tokens, sound = F.pad(tokens, (0, 0, 0, lacking)), F.pad(sound, (0, lacking))
            places = F.pad(places, (0, 0, 0, lacking), value=torch.inf)
        if self.objects:
            content, logits, corrected = self._heads(tokens, places)
            index = self._best(logits[..., 0].detach(), sound, count)
            anchors, selected = _rows(corrected, index), _rows(content, index)
        else:
            # Gradients reach the selected tokens only, so the others' heads need none, nor corrections.
            with torch.no_grad():
                scores = self.class_embed(self._content(tokens)).amax(-1)
            index = self._best(scores, sound, count)
            selected, logits, corrected = self._heads(_rows(tokens, index), _rows(places, index))
            anchors = corrected
            # Of the second set's none: with copies of the targets they would learn to propose an object several times.
            logits, corrected = logits[:, : self.count], corrected[:, : self.count]
        return Proposals(index, selected.detach(), anchors.detach(), logits, corrected.sigmoid())

    def _content(self, tokens: Tensor) -> Tensor:
        return self.enc_output_norm(self.enc_output(tokens))

    def _heads(self, tokens: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Content, class logits and box logits of tokens."""
        content = self._content(tokens)
        return content, self.class_embed(content), self.bbox_embed(content) + places

    def _best(self, scores: Tensor, sound: Tensor, count: int) -> Tensor:
        if not self.official:
            scores = scores.masked_fill(~sound, -torch.inf)
        return scores.topk(count, dim=1).indices


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x [B, S, C] at index [B, N] -> [B, N, C]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
