"""How noised queries enter the decoder of each supported model, and where queries are in what it returns.

A decoder query is a content vector and a place. The content of a noised query is a learned embedding of its label, in
every family. The place is an anchor box in DAB-DETR, which the noised box replaces. Conditional DETR and Deformable
DETR have a position vector instead, made here from the noised box by a small MLP, and a reference point, which becomes
the noised box's centre (two-stage Deformable DETR: the whole box). DETR has the position vector alone. LW-DETR and
RF-DETR have a reference box, which the noised box replaces, and make the position vector of it themselves.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..boxes import inverse_sigmoid
from ..denoising import NoisedQueries
from ..models.layers import MLP
from ..ops.anchor_encoding import anchor_encoding
from ..transformers_installed import TESTED
from .losses import focal, quality, softmax
from .query_groups import LISTS, TABLES


class QueryEmbedding(nn.Module):
    """Label table, and where the family needs it the MLP from boxes to position vectors."""

    def __init__(self, classes: int, width: int, with_position: bool):
        super().__init__()
        self.label = nn.Embedding(classes, width)
        self.position = MLP(2 * width, width, width) if with_position else None


# Rows of noised queries, [B, G * S, width] with S slots in a group, for an argument of that width. Slots without an
# object get zeros.
Rows = Callable[[NoisedQueries, QueryEmbedding, int], Tensor]


def content(noised: NoisedQueries, embedding: QueryEmbedding, width: int) -> Tensor:
    """Label embeddings."""
    return (embedding.label(noised.labels) * noised.live[:, None, :, None]).flatten(1, 2)


def position(noised: NoisedQueries, embedding: QueryEmbedding, width: int) -> Tensor:
    """Position vectors made from the boxes."""
    boxes = noised.boxes.flatten(1, 2).to(embedding.label.weight.dtype)
    return embedding.position(anchor_encoding(boxes, width // 2))


def point(noised: NoisedQueries, embedding: QueryEmbedding, width: int) -> Tensor:
    """Boxes, or their centres where the width is 2."""
    return noised.boxes[..., :width].flatten(1, 2)


def point_logit(noised: NoisedQueries, embedding: QueryEmbedding, width: int) -> Tensor:
    """The same as logits."""
    return (inverse_sigmoid(noised.boxes[..., :width]) * noised.live[:, None, :, None]).flatten(1, 2)


@dataclass(frozen=True)
class Family:
    """One supported model class.

    enters: what the decoder's arguments get in front; joins: what outputs of the model without heads get that do not
    come from the decoder; replaced: submodules of the decoder whose first output rows are overwritten; leaves:
    dimensions of each output, where it is there, along which queries lie; loss: of noised queries (losses.py);
    query_groups: whether self-attention splits queries into groups, and takes no mask (query_groups.py).
    """

    enters: dict[str, Rows]
    leaves: dict[str, tuple[int, ...]]
    joins: dict[str, Rows] = field(default_factory=dict)
    replaced: dict[str, Rows] = field(default_factory=dict)
    loss: Callable = focal
    query_groups: bool = False

    @property
    def with_position(self) -> bool:
        """Whether the family needs position vectors."""
        return position in self.enters.values()

    def check(self, model: nn.Module) -> None:
        """Raise RuntimeError where the model is not built as the hooks expect."""
        decoder = model.model.decoder
        attends = {"hidden_states", "position_embeddings" if self.query_groups else "attention_mask"}
        expected = [
            (type(model), {"labels"}),
            (type(decoder), set(self.enters)),
            *((type(layer.self_attn), attends) for layer in decoder.layers),
        ]
        for kind, names in expected:
            if missing := names - set(inspect.signature(kind.forward).parameters):
                raise _misfit(f"{kind.__name__}.forward has no argument {', '.join(sorted(missing))}")
        parts = [(decoder, name) for name in self.replaced]
        if self.query_groups:
            parts += [(model.model, name) for name in LISTS + TABLES]
            projections = ("q_proj", "k_proj", "v_proj", "o_proj")
            parts += [(layer.self_attn, name) for layer in decoder.layers for name in projections]
        for module, name in parts:
            if not isinstance(getattr(module, name, None), nn.Module):
                raise _misfit(f"{type(module).__name__} has no {name}")


def _misfit(what: str) -> RuntimeError:
    return RuntimeError(
        f"dndetr.denoise does not fit this version of transformers: {what}; type pip install 'transformers=={TESTED}'"
    )


_LEAVES = {
    "logits": (1,),
    "pred_boxes": (1,),
    "last_hidden_state": (1,),
    "decoder_hidden_states": (1,),
    "decoder_attentions": (2, 3),
    "cross_attentions": (2,),
}
_IN_QUERY_GROUPS = Family(
    enters={"inputs_embeds": content, "reference_points": point},
    # Self-attention weights are the matching queries' own, and so are the initial reference points.
    leaves={
        "logits": (1,),
        "pred_boxes": (1,),
        "last_hidden_state": (1,),
        "intermediate_hidden_states": (2,),
        "intermediate_reference_points": (2,),
        "hidden_states": (1,),
        "cross_attentions": (1,),
    },
    loss=quality,
    query_groups=True,
)
FAMILIES = {
    "DabDetrForObjectDetection": Family(
        enters={"inputs_embeds": content, "query_position_embeddings": point_logit}, leaves=_LEAVES
    ),
    "ConditionalDetrForObjectDetection": Family(
        enters={"inputs_embeds": content, "object_queries_position_embeddings": position},
        leaves=_LEAVES,
        # Reference points are predicted from position vectors; for a noised query its centre is known.
        replaced={"ref_point_head": point_logit},
    ),
    "DeformableDetrForObjectDetection": Family(
        enters={"inputs_embeds": content, "object_queries_position_embeddings": position, "reference_points": point},
        leaves=_LEAVES
        | {
            "cross_attentions": (1,),
            "init_reference_points": (1,),
            "intermediate_hidden_states": (2,),
            "intermediate_reference_points": (2,),
        },
        joins={"init_reference_points": point},
    ),
    "DetrForObjectDetection": Family(
        enters={"inputs_embeds": content, "object_queries_position_embeddings": position}, leaves=_LEAVES, loss=softmax
    ),
    "LwDetrForObjectDetection": _IN_QUERY_GROUPS,
    "RfDetrForObjectDetection": _IN_QUERY_GROUPS,
}
