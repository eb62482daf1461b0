"""Small detectors of every kind, and batches for them."""

from dataclasses import replace

import backbones
import torch

from dndetr.batch import Batch, Targets
from dndetr.config import DenoisingConfig
from dndetr.data.sample import IMAGENET
from dndetr.model_config import BackboneConfig, ModelConfig
from dndetr.models.build import build_model
from dndetr.presets import preset_named
from dndetr.training.criterion import Criterion
from dndetr.training.distributed import Processes
from dndetr.training.loss_window import Record
from dndetr.training.optim import Schedule, WeightAverage, build_optimizer, schedule_factor
from dndetr.training.step import TrainStep

CLASSES = 5
_SMALL = ModelConfig(
    variant="dn-detr",
    width=32,
    heads=4,
    hidden=64,
    encoder_layers=2,
    decoder_layers=3,
    queries=12,
    activation="prelu",
    backbone=BackboneConfig(blocks=(1, 1, 1, 1), planes=(8, 8, 16, 16), bottleneck=False),
)
_MULTI = replace(
    _SMALL,
    variant="dn-deformable-encoder",
    activation="relu",
    levels=4,
    backbone=replace(_SMALL.backbone, outputs=(2, 3, 4)),
)
_VECTORS = replace(
    _MULTI,
    variant="dn-deformable-detr",
    position_shift=0.5,
    query_positions="vectors",
    query_scale=False,
    label_indicator=False,
    box_eps=1e-5,
)
CONFIGS = {
    "dn-detr": _SMALL,
    "dn-detr-dc5-patterns": replace(_SMALL, patterns=3, backbone=replace(_SMALL.backbone, dilation=True)),
    "dn-deformable-detr": replace(_MULTI, variant="dn-deformable-detr", position_shift=0.5),
    "dn-deformable-encoder": _MULTI,
    "dn-deformable-encoder-patterns": replace(_MULTI, patterns=2),
    "dino": replace(
        _MULTI,
        variant="dn-deformable-detr",
        proposals="selected",
        look_forward_twice=True,
        shared_heads=True,
        decoder_norm=True,
        query_scale=False,
        label_indicator=False,
    ),
    "two-stage": replace(_MULTI, variant="dn-deformable-detr", proposals="objects", content="selected"),
    "deformable-detr": replace(_VECTORS, box_refinement=False, shared_heads=True),
    "deformable-detr-refined": _VECTORS,
    "deformable-detr-two-stage": replace(_VECTORS, proposals="objects", proposal_padding="official"),
    "batch-norm-from-scratch": replace(
        _MULTI,
        variant="dn-deformable-detr",
        encoder_layers=0,
        levels=2,
        anchors="grid",
        backbone=replace(_SMALL.backbone, norm="batch", stem="small", frozen=0, outputs=(2, 3)),
    ),
}

# With a second set of queries: learned anchors and content, shared content, proposals and learned content, vectors.
HYBRID = {
    f"hybrid-{name}": replace(CONFIGS[name], one_to_many=20)
    for name in ("dn-deformable-detr", "dn-detr", "dino", "deformable-detr", "deformable-detr-two-stage")
}


def build(name: str, dtype: torch.dtype = torch.float32):
    """The detector, or a preset's, or one on a backbone of transformers, the same weights every time."""
    torch.manual_seed(0)
    ours = CONFIGS | HYBRID
    known = name in ours or name in backbones.SETTINGS
    config = preset_named(name).model if not known else ours.get(name) or backbones.detector(name)
    model = build_model(config, CLASSES)
    return model if dtype == torch.float32 else model.to(dtype)  # fake tensors cannot be moved


def emptied(model, device: str):
    """The model with empty tensors on a device that is not there, where nothing can be copied to."""
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            empty = torch.empty(value.shape, device=device)
            setattr(module, name, torch.nn.Parameter(empty, requires_grad=value.requires_grad))
        for name, value in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(value.shape, dtype=value.dtype, device=device))
    return model


def empty_batch(device: str) -> Batch:
    """Two images on a device that is not there."""
    return Batch(
        torch.empty(2, 96, 128, 3, dtype=torch.uint8, device=device),
        torch.empty(2, 3, 4, device=device),
        torch.empty(2, 2, dtype=torch.int64, device=device),
        Targets(
            torch.empty(2, 8, dtype=torch.int64, device=device),
            torch.empty(2, 8, 4, device=device),
            torch.empty(2, dtype=torch.int32, device=device),
        ),
        torch.empty(2, 2, dtype=torch.int64, device=device),
        torch.empty(2, dtype=torch.int64, device=device),
    )


def make_targets(counts: list[int], slots: int, dtype=torch.float32, device="cpu") -> Targets:
    """Random objects, the same for an image whatever the slots and the other images; values beyond counts are zero."""
    labels = torch.zeros(len(counts), slots, dtype=torch.int64)
    boxes = torch.zeros(len(counts), slots, 4, dtype=dtype)
    for image, count in enumerate(counts):
        generator = torch.Generator().manual_seed(100 + image)
        labels[image, :count] = torch.randint(CLASSES, (count,), generator=generator)
        values = torch.rand(count, 4, generator=generator, dtype=dtype)
        boxes[image, :count] = torch.cat((0.3 + 0.4 * values[:, :2], 0.1 + 0.3 * values[:, 2:]), dim=-1)
    return Targets(labels, boxes, torch.tensor(counts, dtype=torch.int32)).to(device)


def make_batch(counts: list[int], slots: int, dtype=torch.float32, canvas=(96, 128)) -> Batch:
    """Random images of different sizes on one canvas, and other bytes outside, with their objects."""
    height, width = canvas
    pixels = torch.full((len(counts), height, width, 3), 77, dtype=torch.uint8)
    colours = IMAGENET.to(dtype).repeat(len(counts), 1, 1)
    sizes = torch.tensor([(height - 16 * (i % 3), width - 24 * (i % 2)) for i in range(len(counts))])
    for image, (h, w) in enumerate(sizes.tolist()):
        generator = torch.Generator().manual_seed(1 + image)
        pixels[image, :h, :w] = torch.randint(256, (h, w, 3), generator=generator, dtype=torch.uint8)
    return Batch(pixels, colours, sizes, make_targets(counts, slots, dtype), sizes, torch.arange(len(counts)))


def federated(batch: Batch) -> Batch:
    """The same with classes that are not verified: 1 and 3 in the first image, 0 in the second."""
    unverified = torch.zeros(len(batch.ids), CLASSES, dtype=torch.bool)
    unverified[0, [1, 3]] = unverified[1, 0] = True
    return replace(batch, targets=replace(batch.targets, unverified=unverified))


def part(batch: Batch, images: slice) -> Batch:
    """Some of a batch's images."""
    targets = batch.targets
    return Batch(
        batch.pixels[images],
        batch.colours[images],
        batch.sizes[images],
        Targets(targets.labels[images], targets.boxes[images], targets.counts[images]),
        batch.original_sizes[images],
        batch.ids[images],
    )


def make_step(
    model,
    groups: int = 5,
    precision=torch.float32,
    lr: float = 1e-3,
    average=None,
    processes=None,
    kind=TrainStep,
    **options,
) -> TrainStep:
    """A whole training step around a model, with moving average (a new one by default) and schedule.

    A model like DINO is trained with contrastive denoising.
    """
    contrastive = model.proposals is not None and not model.proposals.objects
    layers = len(model.decoder.layers)
    of_many = layers if model.one_to_many else 0
    optimizer = build_optimizer(model, lr)
    factor = schedule_factor("cosine", 100, 5, (), 0.1, 0.01)
    device = next(model.parameters()).device
    return kind(
        model.train(),
        Criterion(),
        optimizer,
        Schedule(optimizer, factor),
        average or WeightAverage(model, 0.9),
        Record(20, layers, device, int(model.proposals is not None), of_many),
        classes=CLASSES,
        denoising=DenoisingConfig(groups=groups, contrastive=contrastive),
        clip_norm=0.1,
        precision=precision,
        noise_generator=torch.Generator().manual_seed(0),
        processes=processes or Processes({}),
        **options,
    )
