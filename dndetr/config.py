"""Every setting of a run, as frozen dataclasses from which the command line is made; presets are in ``presets``."""

import json
import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Annotated, Any, Literal, get_type_hints

import tyro

from .demands import demand, demand_counts, demand_finite, demand_val_share
from .model_config import ModelConfig


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
    """Weight of the positive class in the losses focal and position, and in the cost; in iou the score's share."""
    kind: Literal["focal", "iou", "mal", "position"] = "focal"
    """Classification by class alone (focal), or also by how good the box is: Align-DETR's, DEIM's, Stable-DINO's."""
    noised: Literal["same", "focal"] = "same"
    """Classification of denoising queries: by the same kind, or focal."""
    cost_position: float | None = None
    """Exponent of the overlap that a score is multiplied by in the matching cost (default: position 0.5, others 0)."""
    one_to_many: float = 1.0
    """Loss of the queries of --model.one-to-many."""
    repeats: int = 6
    """Copies of every target that those are matched with (fewer where the room of an image would be over 2048)."""
    federated: bool = False
    """LVIS: a class is a negative only in images that were looked through for it (docs/many-classes.md)."""

    @property
    def position(self) -> float:
        """``cost_position``, or the default of the kind."""
        return (0.5 if self.kind == "position" else 0.0) if self.cost_position is None else self.cost_position

    def __post_init__(self):
        demand_counts(self, "loss.", "repeats")
        demand(0 <= self.alpha <= 1, "loss.alpha", self.alpha, "0 to 1")
        for f in fields(self):
            value = getattr(self, f.name)
            if not isinstance(value, int | float):
                continue
            demand(0 <= value < float("inf"), f"loss.{f.name.replace('_', '-')}", value, "0 or more")


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
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of RGB in [0, 1] that is taken from pixels: what the backbone was trained with."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """What they are divided by then."""

    def __post_init__(self):
        demand_counts(self, "images.", "eval_size", "max_size", "multiple")
        demand(bool(self.sizes) and all(n >= 1 for n in self.sizes), "images.sizes", self.sizes, "sizes of 1 or more")
        demand(all(n >= 1 for n in self.canvas), "images.canvas", self.canvas, "height and width of 1 or more")
        demand(self.cache_mib >= 0, "images.cache-mib", self.cache_mib, "0 or more")
        demand_finite(self, "images.")
        demand(all(value > 0 for value in self.std), "images.std", self.std, "positive numbers")


@dataclass(frozen=True)
class Config:
    """One training run."""

    preset: str = "tiny"
    """The preset that everything else starts from."""
    data: str | None = None
    """A folder in COCO, YOLO or VOC format, or "shapes" for the built-in data (a folder of that name is ./shapes)."""
    val_share: float | None = None
    """For data without a validation split: this share of the images is validated on, the same ones every time."""
    split_file: str | None = None
    """JSON file that keeps that division: it is followed where it is there, and written where it is not."""
    output: str | None = None
    """New folder for the run (default: a numbered one under runs/)."""
    resume: str | None = None
    """Continue this run folder to its configured end; auto: go on in --output, or start there if nothing is there."""
    init: str | None = None
    """Weights to start from: a checkpoint, a DINO, DN-DETR or DAB-DETR file, a ResNet, a transformers DETR's name."""
    overfit: int | None = None
    """Train and evaluate on so many images of the train split, to see whether all works: AP should pass 0.9."""
    epochs: int = 50
    """Passes over the training data."""
    repeat_threshold: float | None = None
    """LVIS: show images of classes that fewer images than this share have more often in an epoch (LVIS: 0.001)."""
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
    """Score with hotcoco (extra fast-eval): the same numbers as pycocotools, sooner."""
    detections: int = 100
    """Detections kept per image (COCO scores at most 100)."""
    log_every: int = 20
    """Steps from one row of metrics.jsonl to the next."""
    checkpoint_every: int | None = None
    """Also save after every so many steps, not only after every epoch."""
    tensorboard: bool = False
    """The same as --tracker tensorboard (extra tensorboard)."""
    tracker: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio", "clearml", "comet"], ...] = ()
    """Show the run in these, several if you like (extra trackers): settings, numbers, pictures, final table."""
    project: str = "dndetr"
    """The trackers' name of what the run belongs to: W&B's, Trackio's, ClearML's project, MLflow's experiment."""
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
        demand_val_share(self.val_share)
        divides = self.resume is None and (self.val_share, self.split_file) != (None, None)
        demand(not (divides and self.data == "shapes"), "data", self.data, "data of yours, since this has a val split")
        if self.repeat_threshold is not None:
            threshold = self.repeat_threshold
            demand(0 < threshold <= 1, "repeat-threshold", threshold, "a share of the images, above 0 and up to 1")
            if self.overfit is not None:
                raise ValueError("--repeat-threshold: --overfit has its images equally often: leave one out")
        if self.data == "shapes":
            for flag, given, what in (
                ("repeat-threshold", self.repeat_threshold is not None, "has new images in every epoch"),
                ("loss.federated", self.loss.federated, "is annotated in full"),
            ):
                if given:
                    raise ValueError(f"--{flag}: --data shapes {what}: leave one out")
        demand(0 < self.lr < float("inf"), "lr", self.lr, "a positive number")
        demand(self.hours is None or 0 < self.hours < float("inf"), "hours", self.hours, "a positive number")
        demand(0 <= self.seed < 2**62, "seed", self.seed, "0 or more, below 2**62")
        demand(self.workers >= 0, "workers", self.workers, "0 or more")
        known = self.device in ("auto", "cpu", "cuda") or re.fullmatch(r"cuda:\d+", self.device)
        demand(bool(known), "device", self.device, "auto, cpu, cuda or cuda:N")
        named = re.fullmatch(r"\w[\w. -]{0,127}", self.project)  # what every tracker takes
        demand(bool(named), "project", self.project, "letters, digits, spaces and . _ -, at most 128 of them")


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
