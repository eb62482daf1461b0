"""Named starting points: the official 50-epoch recipes, and two for small machines and small data."""

import json
from collections.abc import Callable
from dataclasses import replace

from .config import Config, DenoisingConfig, ImagesConfig, LossConfig, OptimizerConfig
from .model_config import BackboneConfig, ModelConfig

_MULTI_SCALE = (2, 3, 4)


def dn_detr_r50() -> Config:
    """DN-DETR: dense attention on one level, 50 epochs of 16 images a step."""
    return Config(
        preset="dn-detr-r50",
        batch_size=16,
        workers=10,
        model=ModelConfig(activation="prelu"),
        denoising=DenoisingConfig(padding="official"),
        detections=300,
    )


def dn_detr_r50_dc5() -> Config:
    """DN-DETR at stride 16: the last stage is dilated."""
    config = dn_detr_r50()
    backbone = replace(config.model.backbone, dilation=True)
    return replace(config, preset="dn-detr-r50-dc5", model=replace(config.model, backbone=backbone))


def dn_detr_r101() -> Config:
    """DN-DETR with the deeper backbone."""
    config = dn_detr_r50()
    backbone = replace(config.model.backbone, depth=101)
    return replace(config, preset="dn-detr-r101", model=replace(config.model, backbone=backbone))


def dn_deformable_detr_r50() -> Config:
    """DN-Deformable-DETR: four levels, deformable attention throughout."""
    config = dn_detr_r50()
    model = ModelConfig(
        variant="dn-deformable-detr",
        backbone=BackboneConfig(outputs=_MULTI_SCALE),
        levels=4,
        temperature=(10000.0, 10000.0),
        position_shift=0.5,
    )
    return replace(config, preset="dn-deformable-detr-r50", model=model, detections=100)


def deformable_detr_r50() -> Config:
    """Deformable DETR with box refinement, and denoising for it: what transformers has a model for."""
    config = dn_deformable_detr_r50()
    model = replace(
        config.model,
        hidden=1024,
        query_positions="vectors",
        query_scale=False,
        label_indicator=False,
        box_eps=1e-5,
    )
    loss = replace(config.loss, label=2.0)
    return replace(config, preset="deformable-detr-r50", batch_size=32, lr=2e-4, model=model, loss=loss)


def dn_deformable_encoder_r50() -> Config:
    """DN-DETR with a deformable encoder over four levels, three patterns per anchor."""
    config = dn_detr_r50()
    model = ModelConfig(
        variant="dn-deformable-encoder", backbone=BackboneConfig(outputs=_MULTI_SCALE), levels=4, patterns=3
    )
    return replace(config, preset="dn-deformable-encoder-r50", model=model)


def dino_r50() -> Config:
    """DINO: queries from the encoder's proposals, contrastive denoising; released for 12, 24 and 36 epochs."""
    config = dn_detr_r50()
    model = ModelConfig(
        variant="dn-deformable-detr",
        backbone=BackboneConfig(outputs=_MULTI_SCALE),
        levels=4,
        queries=900,
        proposals="selected",
        proposal_padding="official",
        look_forward_twice=True,
        shared_heads=True,
        decoder_norm=True,
        query_scale=False,
        label_indicator=False,
    )
    denoising = DenoisingConfig(
        groups=100,
        label_noise=0.25,
        box_noise=1.0,
        max_queries=1024,
        padding="official",
        contrastive=True,
        fill=200,
    )
    optimizer = replace(config.optimizer, drops=())
    return replace(config, preset="dino-r50", epochs=12, model=model, denoising=denoising, optimizer=optimizer)


def dino_r50_5scale() -> Config:
    """DINO with the backbone's finest maps too."""
    config = dino_r50()
    model = replace(config.model, backbone=replace(config.model.backbone, outputs=(1, *_MULTI_SCALE)), levels=5)
    return replace(config, preset="dino-r50-5scale", model=model)


def dino_swin_l() -> Config:
    """DINO with Swin-L, pretrained on ImageNet-22k with images of 384x384: nothing is frozen, and blocks recomputed."""
    config = dino_r50()
    architecture = {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48], "window_size": 12}
    settings = json.dumps({"model_type": "swin", **architecture, "image_size": 384})
    backbone = _of_transformers("swin-large", settings, outputs=_MULTI_SCALE)
    return replace(config, preset="dino-swin-l", model=replace(config.model, backbone=backbone, checkpointing=True))


def dn_detr_convnextv2_tiny() -> Config:
    """DN-DETR on the last map of ConvNeXt V2-T, pretrained on ImageNet-22k."""
    config = dn_detr_r50()
    architecture = {"depths": [3, 3, 9, 3], "hidden_sizes": [96, 192, 384, 768]}
    backbone = _of_transformers("convnextv2-tiny", json.dumps({"model_type": "convnextv2", **architecture}))
    return replace(config, preset="dn-detr-convnextv2-tiny", model=replace(config.model, backbone=backbone))


def _of_transformers(name: str, settings: str, outputs: tuple[int, ...] = (4,)) -> BackboneConfig:
    """A backbone of which nothing is frozen; settings: what it is, for those who look at it without its weights."""
    return BackboneConfig(kind="transformers", name=name, settings=settings, frozen=0, outputs=outputs)


def tiny() -> Config:
    """A small detector on the built-in shapes, from nothing, in minutes on two CPU cores."""
    return Config(
        preset="tiny",
        data="shapes",
        epochs=7,
        batch_size=16,
        lr=4e-3,
        train_images=1712,
        log_every=10,
        model=ModelConfig(
            variant="dn-deformable-detr",
            backbone=BackboneConfig(
                blocks=(1, 2, 1),
                planes=(32, 96, 160),
                bottleneck=False,
                stem="small",
                norm="batch",
                frozen=0,
                outputs=(2, 3),
            ),
            width=128,
            heads=4,
            hidden=512,
            encoder_layers=0,
            decoder_layers=3,
            queries=30,
            levels=2,
            anchors="grid",
            size_bias=0.0,
            temperature=(10000.0, 10000.0),
            position_shift=0.5,
        ),
        denoising=DenoisingConfig(groups=3),
        loss=LossConfig(kind="iou", giou=4.0),
        optimizer=OptimizerConfig(backbone_scale=1.0, schedule="cosine", warmup=0.05, ema=0.99),
        images=ImagesConfig(recipe="fixed", canvas=(128, 128), augment=False),
    )


def small() -> Config:
    """Small data on a small machine: ResNet-18 up to stride 16, DINO's proposals, fixed canvas, strong augmentation."""
    return Config(
        preset="small",
        epochs=43,
        batch_size=4,
        lr=8e-4,
        evaluate_every=4,
        model=ModelConfig(
            variant="dn-deformable-detr",
            backbone=BackboneConfig(depth=18, frozen=2, outputs=(2, 3)),
            width=128,
            heads=4,
            hidden=512,
            encoder_layers=1,
            decoder_layers=3,
            queries=100,
            levels=2,
            temperature=(10000.0, 10000.0),
            position_shift=0.5,
            proposals="selected",
            proposal_size=0.15,
            look_forward_twice=True,
        ),
        denoising=DenoisingConfig(groups=4, contrastive=True),
        loss=LossConfig(kind="iou"),
        optimizer=OptimizerConfig(backbone_scale=0.15, schedule="cosine", warmup=0.05, ema=0.995),
        images=ImagesConfig(recipe="fixed", canvas=(240, 320), vertical_flip=True),
    )


PRESETS: dict[str, Callable[[], Config]] = {
    preset().preset: preset
    for preset in (
        tiny,
        small,
        dn_detr_r50,
        dn_detr_r50_dc5,
        dn_detr_r101,
        dn_deformable_detr_r50,
        deformable_detr_r50,
        dn_deformable_encoder_r50,
        dino_r50,
        dino_r50_5scale,
        dino_swin_l,
        dn_detr_convnextv2_tiny,
    )
}


def preset_named(name: str) -> Config:
    """The preset of that name; ValueError that lists the names where there is none."""
    if name not in PRESETS:
        raise ValueError(f"--preset {name}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]()
