"""Training steps to compare: ours by preset, and Hugging Face's detectors at the same sizes. Nothing is downloaded."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest import mock

import torch
from torch import nn

from dndetr.batch import Batch, Targets
from dndetr.data.collate import TARGET_BUCKETS
from dndetr.data.sample import IMAGENET
from dndetr.model_config import ModelConfig
from dndetr.models.build import build_model
from dndetr.ops import _backend, images_of
from dndetr.presets import PRESETS
from dndetr.training.criterion import Criterion
from dndetr.training.distributed import Processes
from dndetr.training.graphs import GraphedStep
from dndetr.training.loss_window import Record
from dndetr.training.optim import Schedule, build_optimizer
from dndetr.training.step import TrainStep

CLASSES = 91


@contextlib.contextmanager
def references() -> Iterator[None]:
    """All ops on plain torch: the stand-in for the sequence of the official code."""
    # The other choices are put back, not forgotten: making them again runs self-tests, which would be timed.
    with mock.patch.dict(os.environ, DNDETR_BACKEND="reference"), mock.patch.dict(_backend._decisions, clear=True):
        yield


def make_batch(images: int, height: int, width: int, counts: list[int]) -> Batch:
    """Random images that fill their canvas, with ``counts`` objects in turn, in the bucket that training takes."""
    slots = next(bucket for bucket in TARGET_BUCKETS if bucket >= max(counts))
    draw = torch.Generator().manual_seed(0)
    counts = [counts[image % len(counts)] for image in range(images)]
    boxes = torch.rand(images, slots, 4, generator=draw) * 0.3 + 0.1
    boxes[..., :2] += 0.3
    targets = Targets(torch.randint(CLASSES, (images, slots), generator=draw), boxes, torch.tensor(counts).int())
    targets = Targets(targets.labels * targets.valid, boxes * targets.valid[..., None], targets.counts)
    pixels = torch.randint(256, (images, height, width, 3), generator=draw, dtype=torch.uint8)
    sizes = torch.tensor([[height, width]]).repeat(images, 1)
    return Batch(pixels, IMAGENET.repeat(images, 1, 1), sizes, targets, sizes, torch.arange(images))


def our_step(
    preset: str,
    groups: int | None = None,
    device: str = "cpu",
    precision: torch.dtype = torch.float32,
    graph: bool = False,
) -> TrainStep:
    """The whole step of a preset, without moving average (Hugging Face's has none); graph: captured, on a GPU."""
    config = PRESETS[preset]()
    denoising = replace(config.denoising, padding="hidden")
    if groups is not None:
        denoising = replace(denoising, groups=groups)
    torch.manual_seed(0)
    model = build_model(config.model, CLASSES).to(device, memory_format=torch.channels_last).train()
    optimizer = build_optimizer(model, config.lr)
    return (GraphedStep if graph else TrainStep)(
        model,
        Criterion(),
        optimizer,
        Schedule(optimizer, lambda step: 1.0),
        None,
        Record(10, config.model.decoder_layers, device, int(config.model.proposals != "none")),
        classes=CLASSES,
        denoising=denoising,
        clip_norm=config.optimizer.clip_norm,
        precision=precision,
        noise_generator=torch.Generator().manual_seed(0),
        processes=Processes({}),
        **({"say": _refuse} if graph else {}),
    )


def _refuse(text: str) -> None:
    """A step that should have been captured and was not is no result."""
    raise RuntimeError(text)


def hf_model(config: ModelConfig) -> nn.Module:
    """Hugging Face's detector of the same width, feed-forward, layers, queries and trained backbone stages."""
    import transformers

    outputs = [f"stage{stage}" for stage in config.backbone.outputs]
    common = {
        "backbone_config": transformers.ResNetConfig(out_features=outputs),
        "num_queries": config.queries,
        "encoder_layers": config.encoder_layers,
        "decoder_layers": config.decoder_layers,
        "encoder_ffn_dim": config.hidden,
        "decoder_ffn_dim": config.hidden,
        "encoder_attention_heads": config.heads,
        "decoder_attention_heads": config.heads,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "activation_function": config.activation,
        "auxiliary_loss": True,
        "num_labels": CLASSES,
    }
    torch.manual_seed(0)
    if config.variant == "dn-deformable-detr":
        options = {"d_model": config.width, "num_feature_levels": config.levels, "with_box_refine": True}
        made = transformers.DeformableDetrConfig(**common, **options)
        model = transformers.DeformableDetrForObjectDetection(made)
    else:
        made = transformers.DabDetrConfig(**common, hidden_size=config.width)
        model = transformers.DabDetrForObjectDetection(made)
    trained = ("stages.1.", "stages.2.", "stages.3.")  # ours freezes the stem and the first stage
    for name, parameter in model.model.backbone.named_parameters():
        parameter.requires_grad_(any(stage in name for stage in trained))
    return model.train()


def hf_step(
    preset: str, batch: Batch, device: str = "cpu", precision: torch.dtype = torch.float32
) -> Callable[[], torch.Tensor]:
    """A training step of Hugging Face's detector, with the same clipping and optimiser as ours.

    precision: of autocast, float32 for none. The images come from the host in every step, as ours do, but in float32.
    """
    model = hf_model(PRESETS[preset]().model).to(device)
    optimizer = build_optimizer(model, 1e-4)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    images = images_of(batch) if device == "cpu" else images_of(batch).contiguous().pin_memory()
    mask = torch.ones(images.shape[0], *images.shape[-2:], dtype=torch.int64, device=device)
    labels = [
        {"class_labels": batch.targets.labels[image, :count], "boxes": batch.targets.boxes[image, :count]}
        for image, count in enumerate(batch.targets.counts.tolist())
    ]
    labels = [{name: value.to(device) for name, value in label.items()} for label in labels]

    def step() -> torch.Tensor:
        arrived = images.to(device, non_blocking=True)
        with torch.autocast(device, precision, enabled=precision != torch.float32):
            loss = model(pixel_values=arrived, pixel_mask=mask, labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 0.1, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step
