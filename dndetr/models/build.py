"""Builds a detector from its configuration."""

from torch import nn

from ..model_config import BackboneConfig, ModelConfig
from .backbone import BLOCKS, ResNet
from .dab_decoder import DABDecoder
from .deformable_decoder import DeformableDecoder
from .dn_detr import DNDETR
from .encoder import DeformableEncoder, DenseEncoder
from .features import InputProjection
from .layers import Recomputable
from .proposals import ProposalHead
from .queries import Queries, QueryTable
from .transformers_backbone import TransformersBackbone
from .vector_queries import VectorQueries


def build_backbone(config: BackboneConfig) -> ResNet | TransformersBackbone:
    """A ResNet of a published depth or of ``config.blocks``, or the backbone of transformers in ``config.settings``."""
    if config.kind == "transformers":
        return TransformersBackbone(config.settings, config.outputs, config.frozen, config.norm)
    blocks = config.blocks or BLOCKS[config.depth]
    bottleneck = config.depth >= 50 if config.bottleneck is None else config.bottleneck
    return ResNet(
        blocks=blocks,
        planes=config.planes,
        expansion=4 if bottleneck else 1,
        stem=config.stem,
        norm=config.norm,
        dilate_last=config.dilation,
        frozen=config.frozen,
        outputs=config.outputs,
    )


def build_model(config: ModelConfig, classes: int) -> DNDETR:
    """The detector that ``config`` describes, for ``classes`` classes."""
    backbone = build_backbone(config.backbone)
    deformable_decoder = config.variant == "dn-deformable-detr"
    dense = config.encoder == "dense"
    levels, width = config.levels, config.width
    positions = config.encoder_layers > 0 or not deformable_decoder  # deformable decoders know them by their anchors
    projection = InputProjection(
        backbone.widths,
        width,
        levels,
        norm=config.variant != "dn-detr",
        level_embedding=positions and config.variant != "dn-detr",
        temperature=config.temperature if positions else None,
        shift=config.position_shift,
    )
    shape = {"width": width, "heads": config.heads, "hidden": config.hidden}
    if dense:
        encoder = DenseEncoder(**shape, layers=config.encoder_layers, activation=config.activation)
    else:
        encoder = DeformableEncoder(
            **shape,
            layers=config.encoder_layers,
            levels=levels,
            points=config.encoder_points,
            activation=config.activation,
            directed=deformable_decoder,
        )
    proposed, vectors = config.proposals != "none", config.query_positions == "vectors"
    if vectors:
        queries = VectorQueries(width, config.queries, classes, proposed)
    else:
        queries = Queries(
            width,
            config.queries,
            classes,
            learned_content=deformable_decoder and config.content == "learned",
            patterns=config.patterns,
            anchors=config.anchors,
            indicator=config.label_indicator,
            proposed=proposed,
        )
    proposals = None
    if proposed:
        proposals = ProposalHead(
            width,
            classes,
            config.queries,
            objects=config.proposals == "objects",
            official=config.proposal_padding == "official",
            size=config.proposal_size,
        )
    shape |= {"layers": config.decoder_layers, "classes": classes, "levels": levels, "activation": config.activation}
    shape["eps"] = config.box_eps
    if deformable_decoder:
        decoder = DeformableDecoder(
            **shape,
            points=config.decoder_points,
            size_bias=0.0 if proposed else config.size_bias,
            query_scale=config.query_scale,
            norm=config.decoder_norm,
            shared_heads=config.shared_heads,
            look_forward_twice=config.look_forward_twice,
            vectors=vectors,
            points_first=vectors and not proposed,
            refine=config.box_refinement,
        )
    else:
        decoder = DABDecoder(**shape)
    model = DNDETR(backbone, projection, encoder, queries, decoder, proposals, config.one_to_many)
    if config.one_to_many:  # drawn after all else, which a seed makes the same with it and without
        for table in queries.modules():
            if isinstance(table, QueryTable):
                table.add_second_set(config.one_to_many)
    for block in model.modules():
        # Batch norm's running statistics would advance twice.
        if isinstance(block, Recomputable) and not any(isinstance(m, nn.BatchNorm2d) for m in block.modules()):
            block.recomputed = config.checkpointing
    return model
