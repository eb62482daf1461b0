"""Tiny backbones of transformers, one of every kind that docs/backbones.md names, and detectors on them."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from dndetr.model_config import BackboneConfig, ModelConfig

_STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32]}
_HEADS = {"num_heads": [1, 2, 2, 4]}
_VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_HGNET = {
    "stem_channels": [3, 8, 8],
    "embedding_size": 8,
    "stage_in_channels": [8, 16, 24, 32],
    "stage_mid_channels": [8, 8, 8, 8],
    "stage_out_channels": [16, 24, 32, 40],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [2, 2, 2, 2],
    "hidden_sizes": [16, 24, 32, 40],
    "depths": [1, 1, 1, 1],
}
SETTINGS = {
    # Two blocks in a stage: the second one shifts its windows.
    "swin": {"embed_dim": 8, "depths": [1, 2, 1, 1], **_HEADS, "window_size": 7},
    "swinv2": {"embed_dim": 8, "depths": [1, 2, 1, 1], **_HEADS, "window_size": 4, "image_size": 64},
    "convnext": _STAGES,
    "convnextv2": _STAGES,
    "dinov2": {**_VIT, "patch_size": 16, "image_size": 64, "mlp_ratio": 2},
    "dinov2_with_registers": {**_VIT, "patch_size": 16, "image_size": 64, "mlp_ratio": 2},
    "dinov3_vit": {**_VIT, "intermediate_size": 64, "patch_size": 16, "num_register_tokens": 2},
    "dinov3_convnext": _STAGES,
    "focalnet": {"embed_dim": 8, "depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 32, 64], "image_size": 64},
    "hgnet_v2": _HGNET,
    "pvt_v2": {**_STAGES, "num_attention_heads": [1, 2, 2, 4]},
    "resnet": {**_STAGES, "embedding_size": 8, "layer_type": "basic"},
    "rt_detr_resnet": {**_STAGES, "embedding_size": 8, "layer_type": "basic"},
}
PLAIN = ("dinov2", "dinov2_with_registers", "dinov3_vit")


def backbone(kind: str, **changes) -> BackboneConfig:
    """Our configuration of a tiny one, as it is after a run has begun; changes: of ours."""
    settings = json.dumps({"model_type": kind, **SETTINGS[kind]})
    return BackboneConfig(**{"kind": "transformers", "settings": settings, "frozen": 1, "outputs": (2, 3, 4)} | changes)


def detector(kind: str, **changes) -> ModelConfig:
    """A small deformable detector on it; changes: of its backbone's configuration."""
    small = ModelConfig(
        variant="dn-deformable-detr",
        backbone=backbone(kind, **changes),
        width=32,
        heads=4,
        hidden=64,
        encoder_layers=1,
        decoder_layers=2,
        queries=12,
        levels=4,
    )
    return small if len(small.backbone.outputs) > 1 else replace(small, variant="dn-detr", levels=1)


def published(kind: str, folder: Path, **settings) -> Path:
    """A folder as the hub has it: a tiny model with a classifier's head where there is one, and random weights."""
    import transformers

    config = transformers.CONFIG_MAPPING[kind](**{**SETTINGS[kind], **settings})
    torch.manual_seed(0)
    kinds = (transformers.AutoModelForImageClassification, transformers.AutoModel, transformers.AutoBackbone)
    whole = next(of for of in kinds if type(config) in of._model_mapping)
    model = whole.from_config(config)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.add_(0.1 * torch.rand_like(value))
    model.save_pretrained(folder)
    return folder
