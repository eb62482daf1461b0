"""Detectors of transformers in every variant, small, with nothing in them at its initial value."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason='transformers is not installed (pip install -e ".[hf]")')

CLASSES = 5


def resnet(stages: int = 1, kind: str = "basic", **config):
    """A ResNet that ours can be."""
    config = {"depths": [1, 2, 1, 1], "hidden_sizes": [16, 24, 32, 40], "layer_type": kind} | config
    return transformers.ResNetConfig(out_features=[f"stage{n}" for n in range(5 - stages, 5)], **config)


_COMMON = {
    "num_queries": 7,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_labels": CLASSES,
}


def dab(backbone=None, **config):
    """DAB-DETR."""
    config = _COMMON | {"hidden_size": 32} | config
    model = transformers.DabDetrForObjectDetection(
        transformers.DabDetrConfig(backbone_config=backbone or resnet(), **config)
    )
    return randomised(model)


def deformable(maps: int = 3, levels: int = 4, backbone=None, **config):
    """Deformable DETR."""
    config = _COMMON | {"d_model": 32, "num_feature_levels": levels, "two_stage_num_proposals": 7} | config
    model = transformers.DeformableDetrForObjectDetection(
        transformers.DeformableDetrConfig(backbone_config=backbone or resnet(maps), **config)
    )
    return randomised(model)


def randomised(model):
    """The model with every tensor drawn anew, biases, norms and their statistics too: 0 and 1 would hide mistakes."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if not value.is_floating_point():
                continue
            drawn = torch.randn(value.shape, generator=generator)
            if "norm" in name and name.endswith(("weight", "running_var")):
                value.copy_(1 + 0.3 * drawn.clamp(-2, 2))
            elif value.ndim > 1:
                value.copy_(drawn * value[0].numel() ** -0.5)
            else:
                value.copy_(0.3 * drawn)
    return model.eval()


def pair():
    """Two images of different sizes on one canvas: pixels [2, 3, 96, 128], sizes [2, 2], mask [2, 96, 128]."""
    generator = torch.Generator().manual_seed(6)
    sizes = torch.tensor([[96, 100], [70, 128]])
    images, mask = torch.zeros(2, 3, 96, 128), torch.zeros(2, 96, 128, dtype=torch.int64)
    for image, own, (height, width) in zip(images, mask, sizes.tolist(), strict=True):
        image[:, :height, :width] = torch.randn(3, height, width, generator=generator)
        own[:height, :width] = 1
    return images, sizes, mask
