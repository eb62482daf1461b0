"""Training steps to compare: ours by preset, and Hugging Face's detectors at the same sizes. Nothing is downloaded."""

from collections.abc import Callable

import torch
from torch import nn

from dndetr.batch import Batch, Targets
from dndetr.config import ModelConfig
from dndetr.criterion import Criterion
from dndetr.data.collate import TARGET_BUCKETS
from dndetr.models.build import build_model
from dndetr.optim import Schedule, build_optimizer
from dndetr.presets import PRESETS
from dndetr.processes import Processes
from dndetr.step import TrainStep
from dndetr.window import Record

CLASSES = 91


def make_batch(images: int, height: int, width: int, counts: list[int]) -> Batch:
    """Random images that fill their canvas, with ``counts`` objects in turn, in the bucket that training takes."""
    slots = next(bucket for bucket in TARGET_BUCKETS if bucket >= max(counts))
    draw = torch.Generator().manual_seed(0)
    counts = [counts[image % len(counts)] for image in range(images)]
    boxes = torch.rand(images, slots, 4, generator=draw) * 0.3 + 0.1
    boxes[..., :2] += 0.3
    targets = Targets(torch.randint(CLASSES, (images, slots), generator=draw), boxes, torch.tensor(counts).int())
    targets = Targets(targets.labels * targets.valid, boxes * targets.valid[..., None], targets.counts)
    pixels = torch.randn(images, 3, height, width, generator=draw).contiguous(memory_format=torch.channels_last)
    sizes = torch.tensor([[height, width]]).repeat(images, 1)
    return Batch(pixels, sizes, targets, sizes, torch.arange(images))


def our_step(preset: str, groups: int | None = None) -> TrainStep:
    """The whole step of a preset, without moving average (Hugging Face's has none)."""
    config = PRESETS[preset]()
    torch.manual_seed(0)
    model = build_model(config.model, CLASSES).to(memory_format=torch.channels_last).train()
    optimizer = build_optimizer(model, config.lr)
    return TrainStep(
        model,
        Criterion(),
        optimizer,
        Schedule(optimizer, lambda step: 1.0),
        None,
        Record(10, config.model.decoder_layers, "cpu"),
        classes=CLASSES,
        groups=config.denoising.groups if groups is None else groups,
        label_noise=config.denoising.label_noise,
        box_noise=config.denoising.box_noise,
        batch_active=False,
        max_queries=config.denoising.max_queries,
        clip_norm=config.optimizer.clip_norm,
        precision=torch.float32,
        noise_generator=torch.Generator().manual_seed(0),
        processes=Processes({}),
    )


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


def hf_step(preset: str, batch: Batch) -> Callable[[], torch.Tensor]:
    """A training step of Hugging Face's detector, with the same clipping and optimiser as ours."""
    model = hf_model(PRESETS[preset]().model)
    optimizer = build_optimizer(model, 1e-4)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    mask = torch.ones(batch.images.shape[0], *batch.images.shape[-2:], dtype=torch.int64)
    labels = [
        {"class_labels": batch.targets.labels[image, :count], "boxes": batch.targets.boxes[image, :count]}
        for image, count in enumerate(batch.targets.counts.tolist())
    ]

    def step() -> torch.Tensor:
        loss = model(pixel_values=batch.images, pixel_mask=mask, labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 0.1, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step
