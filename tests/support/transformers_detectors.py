"""Detectors of transformers in every variant, small, with nothing in them at its initial value."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers", reason='transformers is not installed (pip install -e ".[hf]")')

CLASSES = 5


def resnet(maps: int = 1, kind: str = "basic", **config):
    """A ResNet that ours can be, with its last maps."""
    config = {"depths": [1, 2, 1, 1], "hidden_sizes": [16, 24, 32, 40], "layer_type": kind} | config
    config = {"out_features": [f"stage{n}" for n in range(5 - maps, 5)]} | config
    return transformers.ResNetConfig(**config)


_COMMON = {
    "num_queries": 7,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_labels": CLASSES,
    "auxiliary_loss": True,
}


def dab(backbone=None, **config):
    """DAB-DETR."""
    config = transformers.DabDetrConfig(
        backbone_config=backbone or resnet(), **(_COMMON | {"hidden_size": 32} | config)
    )
    return randomised(transformers.DabDetrForObjectDetection(config))


def deformable(maps: int = 3, levels: int = 4, backbone=None, **config):
    """Deformable DETR, of so many maps of its backbone."""
    config = _COMMON | {"d_model": 32, "num_feature_levels": levels, "two_stage_num_proposals": 7} | config
    config = transformers.DeformableDetrConfig(backbone_config=backbone or resnet(maps), **config)
    return randomised(transformers.DeformableDetrForObjectDetection(config))


def bottleneck():
    """A ResNet of three convolutions a block."""
    return resnet(kind="bottleneck")


def swin(maps: int):
    """A backbone that ours cannot be."""
    config = {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "window_size": 4, "image_size": 64}
    return transformers.SwinConfig(out_features=[f"stage{n}" for n in range(5 - maps, 5)], **config)


def pvt(maps: int):
    """A backbone without a stem among its stages' names."""
    config = {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 4, 8]}
    return transformers.PvtV2Config(out_features=[f"stage{n}" for n in range(5 - maps, 5)], **config)


def dinov2():
    """A plain vision transformer."""
    config = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 64, "patch_size": 16}
    return transformers.Dinov2Config(out_features=["stage3"], **config)


VARIANTS = {
    "dab": dab,
    "dab-bottleneck-relu": lambda: dab(bottleneck(), activation_function="relu", encoder_layers=0),
    "dab-patterns": lambda: dab(num_patterns=3, temperature_height=10, temperature_width=15),
    "dab-of-several-maps": lambda: dab(resnet(out_features=["stem", "stage2", "stage4"])),  # the last is used
    "deformable": deformable,
    "deformable-box-refinement": lambda: deformable(with_box_refine=True),
    "deformable-two-stage": lambda: deformable(with_box_refine=True, two_stage=True),
    "deformable-single-scale": lambda: deformable(1, 1, bottleneck()),
    "deformable-3-levels": lambda: deformable(3, 3, encoder_n_points=3, decoder_n_points=2),
    "deformable-5-levels": lambda: deformable(2, 5, activation_function="prelu", with_box_refine=True),
    "deformable-gelu": lambda: deformable(activation_function="gelu", encoder_layers=0),
}


OTHER_BACKBONES = {
    "dab-dinov2": lambda: dab(dinov2()),
    "dab-pvt": lambda: dab(pvt(1)),
    "dab-odd-resnet": lambda: dab(resnet(kind="bottleneck", hidden_sizes=[18, 26, 34, 42])),
    "deformable-pvt": lambda: deformable(backbone=pvt(3)),
    "deformable-swin": lambda: deformable(backbone=swin(3), with_box_refine=True),
    "deformable-narrow-resnet": lambda: deformable(backbone=resnet(3, embedding_size=16)),
}


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


def dilated(model):
    """The model with its ResNet's last stage at the stride of the one before, as torchvision and timm dilate it."""
    backbone = next(part for name, part in model.named_modules() if name.endswith("encoder.stages.3"))
    for index, layer in enumerate(backbone.layers):
        for part in layer.modules():
            if isinstance(part, torch.nn.Conv2d):
                part.stride = (1, 1)
                if index and part.kernel_size == (3, 3):
                    part.dilation = part.padding = (2, 2)
    return model


def pair():
    """Two images of different sizes on one canvas: pixels [2, 3, 96, 128], sizes [2, 2], mask [2, 96, 128]."""
    generator = torch.Generator().manual_seed(6)
    sizes = torch.tensor([[96, 100], [70, 128]])
    images, mask = torch.zeros(2, 3, 96, 128), torch.zeros(2, 96, 128, dtype=torch.int64)
    for image, own, (height, width) in zip(images, mask, sizes.tolist(), strict=True):
        image[:, :height, :width] = torch.randn(3, height, width, generator=generator)
        own[:height, :width] = 1
    return images, sizes, mask


def outputs(model) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Logits and boxes of every layer for the pair."""
    images, _, mask = pair()
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.3, 0.2]])}] * 2
    with torch.no_grad():
        found = model(pixel_values=images, pixel_mask=mask, labels=labels)
    layers = [(layer["logits"], layer["pred_boxes"]) for layer in found.auxiliary_outputs or ()]
    return [*layers, (found.logits, found.pred_boxes)]


def changed(folder, weights=lambda tensors: tensors, **config):
    """The folder with its tensors and settings changed; a setting that becomes None is left out."""
    file = folder / "model.safetensors"
    tensors = weights(load_file(file))
    save_file({name: value.contiguous() for name, value in tensors.items()}, file, {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text()) | config
    kept = {name: value for name, value in settings.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def renamed(*rules: tuple[str, str]):
    """For ``changed``: names of tensors with these parts replaced, of those that have them."""

    def rename(tensors):
        for pattern, replacement in rules:
            assert any(re.search(pattern, name) for name in tensors), pattern
            tensors = {re.sub(pattern, replacement, name): value for name, value in tensors.items()}
        return tensors

    return rename
