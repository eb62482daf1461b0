"""The settings of a model, as frozen dataclasses from which the command line is made."""

from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

import tyro

from .demands import demand, demand_counts, demand_finite

Variant = Literal["dn-detr", "dn-deformable-detr", "dn-deformable-encoder"]


@dataclass(frozen=True)
class BackboneConfig:
    """What makes maps of images: our ResNet, or a backbone of transformers."""

    kind: Literal["resnet", "transformers"] = "resnet"
    """resnet is ours, and what the settings below describe; transformers: any of its backbones, by name."""
    name: str = ""
    """transformers: which one, as swin-tiny, a hub id, or a folder with config.json and weights."""
    settings: Annotated[str, tyro.conf.Fixed, tyro.conf.Suppress] = ""
    """Its configuration as JSON; no flag, but read from ``name`` when a run begins, so that nothing is asked later."""
    depth: Literal[18, 34, 50, 101] = 50
    """Published depth: block counts and block kind."""
    blocks: tuple[int, ...] = ()
    """Block counts per stage instead of those of the depth."""
    planes: tuple[int, ...] = (64, 128, 256, 512)
    """Base width of each stage."""
    bottleneck: bool | None = None
    """Three-convolution blocks, four times as wide outside (default: from depth 50 on)."""
    stem: Literal["imagenet", "small"] = "imagenet"
    """7x7 and max-pool, or two 3x3 convolutions for small images."""
    norm: Literal["frozen", "batch", "group"] = "frozen"
    """Normalisation: frozen batch norm wants pretrained weights, batch and group norm train from scratch."""
    dilation: bool = False
    """Keep the last stage at the stride of the one before it (DC5)."""
    frozen: int = 2
    """Parts without gradient: 1 the stem, 2 also layer1, and so on."""
    outputs: tuple[int, ...] = (4,)
    """Stages (1 to 4, strides 4 to 32) whose maps are used."""

    def __post_init__(self):
        if self.kind == "transformers":
            demand(bool(self.name or self.settings), "model.backbone.kind", self.kind, "--model.backbone.name too")
            demand(
                self.norm != "group", "model.backbone.norm", self.norm, "frozen or batch with transformers' backbones"
            )
            stages = 4
        else:
            demand(not self.name, "model.backbone.name", self.name, "--model.backbone.kind transformers too")
            stages = min(len(self.planes), len(self.blocks) or 4)
        wanted = f"ascending numbers of stages from 1 to {stages}"
        in_range = bool(self.outputs) and set(self.outputs) <= set(range(1, stages + 1))
        demand(
            in_range and list(self.outputs) == sorted(set(self.outputs)), "model.backbone.outputs", self.outputs, wanted
        )
        demand(all(n >= 1 for n in self.planes), "model.backbone.planes", self.planes, "widths of 1 or more")
        demand(all(n >= 1 for n in self.blocks), "model.backbone.blocks", self.blocks, "counts of 1 or more")
        demand(self.frozen >= 0, "model.backbone.frozen", self.frozen, "0 or more")


# Settings of the model that dn-deformable-detr alone has.
_DEFORMABLE_DECODER = (
    *("proposals", "look_forward_twice", "shared_heads", "decoder_norm", "query_scale"),
    *("query_positions", "box_refinement"),
)


def _typed(name: str, value: str | bool) -> str:
    """A setting of the model as it is typed; switches take no value."""
    flag = name.replace("_", "-")
    return f"--model.{flag} {value}" if isinstance(value, str) else f"--model.{'' if value else 'no-'}{flag}"


@dataclass(frozen=True)
class ModelConfig:
    """The detector's architecture."""

    variant: Variant = "dn-detr"
    """Dense attention (dn-detr), deformable attention, or deformable encoder with dense decoder."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    width: int = 256
    """Width of encoder and decoder."""
    heads: int = 8
    """Attention heads."""
    hidden: int = 2048
    """Hidden width of the feed-forward blocks."""
    encoder_layers: int = 6
    """Number of encoder layers."""
    decoder_layers: int = 6
    """Number of decoder layers."""
    queries: int = 300
    """Number of matching queries (anchors)."""
    one_to_many: int = 0
    """Queries of a second set, trained with repeated targets, dropped at test time (0: none; H-DETR: 1500; to 2048)."""
    patterns: int = 0
    """Learned content patterns per anchor (0: none)."""
    levels: int = 1
    """Feature levels; those beyond the backbone's outputs are made by strided convolutions."""
    encoder_points: int = 4
    """Sampling points per head and level in the encoder."""
    decoder_points: int = 4
    """Sampling points per head and level in the decoder."""
    activation: Literal["relu", "prelu", "gelu"] = "relu"
    """Activation of the feed-forward blocks."""
    anchors: Literal["normal", "uniform", "grid"] = "normal"
    """Initial anchors without proposals: N(0, 1) logits (official), uniform centres, or a grid (best from scratch)."""
    size_bias: float = -2.0
    """Initial correction of such anchors' sizes by the first deformable decoder layer's own head, in logits."""
    temperature: tuple[float, float] = (20.0, 20.0)
    """Temperature of the pixels' sine encoding, for y and x (of no effect on deformable decoders without encoder)."""
    checkpointing: bool = False
    """Keep only the layers' inputs for backward and compute the rest again: a third slower, far less memory."""
    position_shift: float = 0.0
    """Shift of the pixels' positions in that encoding (Deformable-DETR: half a pixel)."""
    proposals: Literal["none", "selected", "objects"] = "none"
    """Two stages: queries start at the encoder's best boxes, scored by class (selected, DINO) or as objects of any."""
    proposal_size: float = 0.05
    """Sides of the boxes that tokens of the finest level start from, as shares of the image; doubled at each next."""
    proposal_padding: Literal["hidden", "official"] = "hidden"
    """Tokens outside the image or at its very border: not proposed while there are others, or like any other."""
    content: Literal["learned", "selected"] = "learned"
    """With proposals: the queries' content is learned, by rank (DINO's mixed selection), or the selected token's."""
    look_forward_twice: bool = False
    """The loss of a layer's boxes also trains the layer before (DINO)."""
    shared_heads: bool = False
    """One pair of heads for all layers of a deformable decoder (DINO)."""
    decoder_norm: bool = False
    """A norm before the heads of a deformable decoder (DINO)."""
    query_scale: bool = True
    """Scale the queries' positions by their content from the second deformable decoder layer on (DINO: not)."""
    label_indicator: bool = True
    """One channel of a query's content says whether it is for denoising (DINO: not)."""
    query_positions: Literal["anchors", "vectors"] = "anchors"
    """Positions of a deformable decoder's queries: made of their anchors, or vectors of their own (Deformable DETR)."""
    box_refinement: bool = True
    """With vectors: layers correct the boxes of the one before, or all of them the first (plain Deformable DETR)."""
    box_eps: float = 1e-3
    """Boxes are corrected from no closer than this to the image's edge (Deformable DETR and transformers: 1e-5)."""

    @property
    def encoder(self) -> str:
        """The encoder's kind, which follows from the variant."""
        return "dense" if self.variant == "dn-detr" else "deformable"

    def __post_init__(self):
        demand_finite(self, "model.")
        demand_counts(self, "model.", "width", "heads", "hidden", "decoder_layers", "queries", "levels")
        demand_counts(self, "model.", "encoder_points", "decoder_points")
        demand(self.encoder_layers >= 0, "model.encoder-layers", self.encoder_layers, "0 or more")
        demand(self.patterns >= 0, "model.patterns", self.patterns, "0 or more")
        most = "0 (off) to 2048, the most that a GPU matches at once"
        demand(0 <= self.one_to_many <= 2048, "model.one-to-many", self.one_to_many, most)
        wanted = "--model.patterns 0 too, since a second set has no patterns"
        demand(not (self.one_to_many and self.patterns), "model.one-to-many", self.one_to_many, wanted)
        demand(all(t > 0 for t in self.temperature), "model.temperature", self.temperature, "positive numbers")
        if self.width % (2 * self.heads) or self.width % 4:
            raise ValueError(f"--model.width {self.width} must be a multiple of 4 and of twice its heads, {self.heads}")
        if self.variant == "dn-detr" and (self.levels != 1 or len(self.backbone.outputs) != 1):
            raise ValueError("dn-detr works on one level: use --model.levels 1 and one of --model.backbone.outputs")
        if self.levels < len(self.backbone.outputs):
            raise ValueError(
                f"--model.levels {self.levels}: the backbone gives {len(self.backbone.outputs)} maps; "
                "give as many levels or more, or fewer --model.backbone.outputs"
            )
        if self.variant == "dn-deformable-detr":
            demand(self.patterns == 0, "model.patterns", self.patterns, "0 with dn-deformable-detr, which has none")
        else:
            for f in fields(self):
                if f.name in _DEFORMABLE_DECODER and (value := getattr(self, f.name)) != f.default:
                    given, wanted = (_typed(f.name, of) for of in (value, f.default))
                    raise ValueError(f"{given}: give {wanted} with {self.variant}")
        demand(0 < self.box_eps <= 0.01, "model.box-eps", self.box_eps, "a share above 0, at most 0.01")
        self._demand_deformable_detr()
        # Within models/proposals.py's border; else no token of the finest level would propose anything.
        sound = 0.01 < self.proposal_size < 0.99
        demand(sound, "model.proposal-size", self.proposal_size, "a share between 0.01 and 0.99")
        if self.proposals == "none":
            demand(self.content == "learned", "model.content", self.content, "--model.proposals too")

    def _demand_deformable_detr(self) -> None:
        """Positions that are vectors go with what Deformable DETR is, and with nothing of DAB-DETR's and DINO's."""
        if self.query_positions == "anchors":
            demand(self.box_refinement, "model.box-refinement", False, "--model.query-positions vectors too")
            return
        needed = {"label_indicator": False, "query_scale": False, "decoder_norm": False, "content": "learned"}
        for name, wanted in needed.items():
            if (given := getattr(self, name)) != wanted:
                raise ValueError(
                    f"--model.query-positions vectors: give {_typed(name, wanted)} (not {_typed(name, given)})"
                )
        if not self.box_refinement and self.look_forward_twice:
            raise ValueError("--model.look-forward-twice needs --model.box-refinement")
        if not self.box_refinement and self.proposals != "none":
            raise ValueError(f"--model.proposals {self.proposals} needs --model.box-refinement")
