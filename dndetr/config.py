"""Every setting, as frozen dataclasses; presets are functions; the command line is made from the types."""

from dataclasses import dataclass, field
from typing import Literal

Variant = Literal["dn-detr", "dn-deformable-detr", "dn-deformable-encoder"]


@dataclass(frozen=True)
class BackboneConfig:
    """A ResNet."""

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
    """Initial anchors: N(0, 1) logits (official), uniform centres, or a regular grid (trains faster from scratch)."""
    size_bias: float = -2.0
    """Initial correction of the anchors' width and height in the first deformable decoder layer, in logits."""
    temperature: tuple[float, float] = (20.0, 20.0)
    """Temperature of the pixels' sine encoding, for y and x."""
    position_shift: float = 0.0
    """Shift of the pixels' positions in that encoding (Deformable-DETR: half a pixel)."""

    @property
    def encoder(self) -> str:
        """The encoder's kind, which follows from the variant."""
        return "dense" if self.variant == "dn-detr" else "deformable"

    def __post_init__(self):
        if self.width % (2 * self.heads) or self.width % 4:
            raise ValueError(f"--model.width {self.width} must be a multiple of 4 and of twice --model.heads {self.heads}")
        if self.variant == "dn-detr" and (self.levels != 1 or len(self.backbone.outputs) != 1):
            raise ValueError("dn-detr works on one level: use --model.levels 1 and one stage in --model.backbone.outputs")
        if self.patterns and self.variant == "dn-deformable-detr":
            raise ValueError("dn-deformable-detr has no patterns: use --model.patterns 0")
