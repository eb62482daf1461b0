"""Every setting of a run, as frozen dataclasses from which the command line is made; presets are in ``presets``."""

import json
import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Annotated, Any, Literal, get_type_hints

import tyro

from .demands import demand, demand_counts, demand_finite

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

    def __post_init__(self):
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
_DEFORMABLE_DECODER = ("proposals", "look_forward_twice", "shared_heads", "decoder_norm", "query_scale")


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
        # Within models/proposals.py's border; else no token of the finest level would propose anything.
        sound = 0.01 < self.proposal_size < 0.99
        demand(sound, "model.proposal-size", self.proposal_size, "a share between 0.01 and 0.99")
        if self.proposals == "none":
            demand(self.content == "learned", "model.content", self.content, "--model.proposals too")


@dataclass(frozen=True)
class DenoisingConfig:
    """Query denoising; ``--denoising.groups 0`` is the plain DAB baseline."""

    groups: int = 5
    """Copies of every image's objects that the decoder learns to restore (0: no denoising)."""
    label_noise: float = 0.2
    """Probability of replacing a label by a random one."""
    box_noise: float = 0.4
    """Largest shift in half box sizes, and change of size in sizes; contrastive: shift of corners in half sizes."""
    max_queries: int = 1000
    """Most denoising queries per image: crowded batches get fewer groups, or none, instead of running out of memory."""
    padding: Literal["hidden", "official"] = "hidden"
    """Slots without an object: hidden from attention, or seen up to the batch's largest count (official code)."""
    contrastive: bool = False
    """Also make a negative of every object, with more noise, that is to be rejected (DINO)."""
    fill: int = 0
    """No more groups than have so many queries per image together, but at least one (DINO: 200; 0: no such limit)."""
    slots: Literal["bucket", "batch"] = "bucket"
    """Room for objects in a group: 8, 16, 32, ..., so that shapes are few, or the batch's largest count (official)."""

    @property
    def copies(self) -> int:
        """Slots of a group for every object."""
        return 2 if self.contrastive else 1

    def groups_wanted(self, slots: int) -> int:
        """How many groups a batch with room for so many objects per image gets where memory is no question."""
        return min(self.groups, max(1, self.fill // (self.copies * slots))) if self.fill else self.groups

    def groups_for(self, slots: int) -> int:
        """The same, of which no more than fit under ``max_queries``."""
        return min(self.groups_wanted(slots), self.max_queries // (self.copies * slots))

    def __post_init__(self):
        demand(self.groups >= 0, "denoising.groups", self.groups, "0 (off) or more")
        demand(self.fill >= 0, "denoising.fill", self.fill, "0 (off) or more")
        demand_counts(self, "denoising.", "max_queries")
        for name in ("label_noise", "box_noise"):
            value = getattr(self, name)
            demand(0 <= value <= 1, f"denoising.{name.replace('_', '-')}", value, "0 to 1")


@dataclass(frozen=True)
class LossConfig:
    """Coefficients of the loss and of the matching cost."""

    label: float = 1.0
    """Classification loss."""
    l1: float = 5.0
    """L1 distance of boxes."""
    giou: float = 2.0
    """Generalised IoU."""
    cost_label: float = 2.0
    """Classification in the matching cost."""
    cost_l1: float = 5.0
    """L1 distance in the matching cost."""
    cost_giou: float = 2.0
    """Generalised IoU in the matching cost."""
    alpha: float = 0.25
    """Weight of the positive class in the focal loss and cost."""

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            demand(0 <= value < float("inf"), f"loss.{f.name.replace('_', '-')}", value, "0 or more")
        demand(self.alpha <= 1, "loss.alpha", self.alpha, "0 to 1")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its learning-rate schedule, and the averaged weights."""

    backbone_scale: float = 0.1
    """The backbone's learning rate as a share of --lr."""
    weight_decay: float = 1e-4
    """Decay of all weights."""
    clip_norm: float = 0.1
    """Largest norm of the whole gradient."""
    schedule: Literal["constant", "step", "multistep", "cosine"] = "step"
    """How the learning rate falls."""
    warmup: float = 0.0
    """Share of the run in which the learning rate rises from zero."""
    drops: tuple[float, ...] = (0.8,)
    """Shares of the run after which step (its first) and multistep (all) multiply the rate by gamma (none: DINO's)."""
    gamma: float = 0.1
    """That factor."""
    floor: float = 0.01
    """Where cosine ends, as a share of --lr."""
    ema: float = 0.0
    """Decay of the moving average of the weights, which is then what is evaluated (0: off)."""

    def __post_init__(self):
        demand_finite(self, "optimizer.")
        demand(self.backbone_scale >= 0, "optimizer.backbone-scale", self.backbone_scale, "0 or more")
        demand(self.weight_decay >= 0, "optimizer.weight-decay", self.weight_decay, "0 or more")
        demand(self.clip_norm > 0, "optimizer.clip-norm", self.clip_norm, "a positive number")
        demand(0 <= self.warmup < 1, "optimizer.warmup", self.warmup, "a share of the run from 0 to below 1")
        demand(0 <= self.floor <= 1, "optimizer.floor", self.floor, "0 to 1")
        demand(0 <= self.ema < 1, "optimizer.ema", self.ema, "0 (off) to below 1")
        demand(self.gamma > 0, "optimizer.gamma", self.gamma, "a positive number")
        ascending = list(self.drops) == sorted(self.drops) and all(0 < share <= 1 for share in self.drops)
        demand(ascending, "optimizer.drops", self.drops, "ascending shares of the run, each up to 1")

    def drop_epochs(self, epochs: int) -> tuple[int, ...]:
        """The epochs of a run after which the rate drops; DINO was released with 11 of 12, 20 of 24 and 30 of 36."""
        drops = self.drops or (11 / 12 if epochs <= 12 else 5 / 6,)
        return tuple(round(share * epochs) for share in (drops[:1] if self.schedule == "step" else drops))


@dataclass(frozen=True)
class ImagesConfig:
    """How images become canvases."""

    recipe: Literal["official", "fixed", "original"] = "official"
    """DETR's multi-scale resize and crop; one canvas with flips, crops and colours for small data; or own sizes."""
    sizes: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    """official: short sides to draw from in training."""
    eval_size: int = 800
    """official: short side in evaluation."""
    max_size: int = 1333
    """official: longest long side."""
    canvas: tuple[int, int] = (240, 320)
    """fixed: height and width that every image is resized to."""
    multiple: int = 64
    """official, original: canvases are multiples of this many pixels."""
    augment: bool = True
    """Augment the training images."""
    vertical_flip: bool = False
    """fixed: also flip upside down."""
    cache_mib: int = 1024
    """Memory for decoded images, in MiB (0: decode every time)."""
    skip_unreadable: bool = False
    """Decode every image before training, and leave out and count those that cannot be, instead of stopping."""

    def __post_init__(self):
        demand_counts(self, "images.", "eval_size", "max_size", "multiple")
        demand(bool(self.sizes) and all(n >= 1 for n in self.sizes), "images.sizes", self.sizes, "sizes of 1 or more")
        demand(all(n >= 1 for n in self.canvas), "images.canvas", self.canvas, "height and width of 1 or more")
        demand(self.cache_mib >= 0, "images.cache-mib", self.cache_mib, "0 or more")


@dataclass(frozen=True)
class Config:
    """One training run."""

    preset: str = "tiny"
    """The preset that everything else starts from."""
    data: str | None = None
    """A COCO-format folder, or "shapes" for the built-in data (a folder of that name is ./shapes)."""
    output: str | None = None
    """New folder for the run (default: a numbered one under runs/)."""
    resume: str | None = None
    """Continue this run folder to its configured end."""
    init: str | None = None
    """File with weights to start from: a checkpoint, a DINO, DN-DETR or DAB-DETR file, or a ResNet."""
    overfit: int | None = None
    """Train and evaluate on so many images of the train split, to see whether all works: AP should pass 0.9."""
    epochs: int = 50
    """Passes over the training data."""
    hours: float | None = None
    """End the run within so many hours, its schedule shortened to fit: fewer steps than --epochs says, if need be."""
    patience: int | None = None
    """End the run after so many evaluations in a row without a higher AP."""
    batch_size: int | Literal["auto"] = 2
    """Images at once, in each process; auto measures how many fit, and accumulates to the preset's images a step."""
    accumulate: int = 1
    """Batches whose gradients make one step: the effect of a larger batch in the memory of this one."""
    lr: float = 1e-4
    """Learning rate."""
    seed: int = 42
    """Seed of weights, data order, augmentation and noise."""
    workers: int = 0
    """Processes that prepare images (0: in the training process)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the model's matrix products; auto takes bfloat16 where the hardware has it."""
    mode: Literal["auto", "eager", "graph"] = "auto"
    """How a step runs: graph replays it as one CUDA graph per shape of the batch; auto does so on one GPU."""
    max_steps_per_epoch: int | None = None
    """End every epoch after this many steps."""
    train_images: int = 2000
    """Built-in data: training images per epoch, new ones every epoch."""
    val_images: int = 200
    """Built-in data: validation images."""
    evaluate_every: int = 1
    """Epochs from one evaluation to the next (the last epoch is always evaluated)."""
    fast_eval: bool = False
    """Score with faster-coco-eval (extra fast-eval): the same numbers as pycocotools, sooner."""
    detections: int = 100
    """Detections kept per image (COCO scores at most 100)."""
    log_every: int = 20
    """Steps from one row of metrics.jsonl to the next."""
    checkpoint_every: int | None = None
    """Also save after every so many steps, not only after every epoch."""
    tensorboard: bool = False
    """Write the numbers of metrics.jsonl for TensorBoard too (extra tensorboard)."""
    quiet: bool = False
    """Print nothing but errors."""
    model: ModelConfig = field(default_factory=ModelConfig)
    denoising: DenoisingConfig = field(default_factory=DenoisingConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    images: ImagesConfig = field(default_factory=ImagesConfig)
    given: Annotated[dict[str, str], tyro.conf.Fixed, tyro.conf.Suppress] = field(default_factory=dict)
    """Paths as they were typed, by field; no flag, but set by ``runs.paths``."""

    @property
    def data_name(self) -> str | None:
        """The data set as the user called it, for titles."""
        return self.given.get("data", self.data)

    def __post_init__(self):
        demand_counts(self, "", "epochs", "accumulate", "evaluate_every", "log_every")
        demand_counts(self, "", "train_images", "val_images", "detections")
        demand_counts(self, "", "overfit", "patience", "max_steps_per_epoch", "checkpoint_every")
        if self.batch_size != "auto":
            demand_counts(self, "", "batch_size")
        elif self.accumulate != 1:
            raise ValueError("--batch-size auto chooses --accumulate too: leave that out, or give a number of images")
        demand(0 < self.lr < float("inf"), "lr", self.lr, "a positive number")
        demand(self.hours is None or 0 < self.hours < float("inf"), "hours", self.hours, "a positive number")
        demand(0 <= self.seed < 2**62, "seed", self.seed, "0 or more, below 2**62")
        demand(self.workers >= 0, "workers", self.workers, "0 or more")
        known = self.device in ("auto", "cpu", "cuda") or re.fullmatch(r"cuda:\d+", self.device)
        demand(bool(known), "device", self.device, "auto, cpu, cuda or cuda:N")


def to_dict(config: Config) -> dict[str, Any]:
    """A configuration as plain JSON values: lists, not tuples."""
    return json.loads(json.dumps(asdict(config)))


def from_dict(values: dict[str, Any], kind: type = Config) -> Any:
    """The inverse of :func:`to_dict`; ValueError for a field that does not exist."""
    known = get_type_hints(kind)
    unknown = sorted(set(values) - {f.name for f in fields(kind)})
    if unknown:
        raise ValueError(f"the saved configuration has unknown fields: {', '.join(unknown)} (another version's?)")
    built = {}
    for name, value in values.items():
        if is_dataclass(known[name]):
            value = from_dict(value, known[name])
        elif isinstance(value, list):
            value = tuple(value)
        built[name] = value
    return kind(**built)
