"""Small Hugging Face detectors of every supported kind, and what they train on."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason='transformers is not installed (pip install -e ".[hf]")')

CLASSES, QUERIES, GROUPS = 5, 20, 3


def backbone(stages: int):
    """A ResNet that is small and quick."""
    return transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=[f"stage{stage}" for stage in range(5 - stages, 5)],
    )


_COMMON = {
    "use_timm_backbone": False,
    "backbone": None,
    "use_pretrained_backbone": False,
    "num_queries": QUERIES,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "num_labels": CLASSES,
    "auxiliary_loss": True,
}
_PLAIN_TRANSFORMER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "mlp_ratio": 2,
    "image_size": 64,
    "patch_size": 16,
    "out_indices": [1, 2],
}


def _build(name: str, levels: int = 1, **config):
    kind = getattr(transformers, f"{name}Config")
    model = getattr(transformers, f"{name}ForObjectDetection")
    return model(kind(backbone_config=backbone(levels), **(_COMMON | config)))


def _build_in_query_groups(name: str, backbone_config, **config):
    """A model that trains GROUPS groups of QUERIES queries."""
    settings = {
        "backbone_config": backbone_config,
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_ffn_dim": 64,
        "decoder_self_attention_heads": 4,
        "decoder_cross_attention_heads": 4,
        "c2f_num_blocks": 1,
        "num_queries": QUERIES,
        "group_detr": GROUPS,
        "num_labels": CLASSES,
        "dropout": 0.0,
    }
    kind, model = (getattr(transformers, name + suffix) for suffix in ("Config", "ForObjectDetection"))
    return model(kind(**(settings | config)))


def _lw(**config):
    backbone = transformers.LwDetrViTConfig(
        **_PLAIN_TRANSFORMER, pretrain_image_size=64, window_block_indices=[0], num_windows=4
    )
    return _build_in_query_groups("LwDetr", backbone, projector_scale_factors=[1.0], **config)


def _rf(**config):
    backbone = transformers.RfDetrDinov2Config(**_PLAIN_TRANSFORMER, num_windows=1, use_mask_token=False)
    return _build_in_query_groups("RfDetr", backbone, **config)


MODELS = {
    "detr": lambda **config: _build("Detr", d_model=32, **config),
    "dab": lambda **config: _build("DabDetr", hidden_size=32, **config),
    "conditional": lambda **config: _build("ConditionalDetr", d_model=32, **config),
    "deformable": lambda **config: _build("DeformableDetr", 3, d_model=32, num_feature_levels=3, **config),
    "deformable-two-stage": lambda **config: _build(
        "DeformableDetr",
        3,
        d_model=32,
        num_feature_levels=3,
        two_stage=True,
        two_stage_num_proposals=QUERIES,
        with_box_refine=True,
        **config,
    ),
    "lw": _lw,
    "rf": _rf,
}
every_model = pytest.mark.parametrize("name", [name for name in MODELS if name not in ("lw", "rf")])
both_kinds = pytest.mark.parametrize("contrastive", [False, True], ids=["plain", "contrastive"])  # of denoising
# Every model, and contrastive denoising where queries take masks and where they do not.
every_kind = pytest.mark.parametrize(
    "name, contrastive",
    [*((name, False) for name in MODELS), ("deformable-two-stage", True), ("detr", True), ("rf", True)],
)


def build(name: str, seed: int = 0, **config):
    """A plain model, the same weights every time."""
    torch.manual_seed(seed)
    return MODELS[name](**config)


def reference_points(name: str, output) -> torch.Tensor:
    """Where queries start [B, Q, 2 or 4], of what a model without heads returns; DETR has no such points."""
    if name == "dab":
        return output.reference_points[0]
    if name == "conditional":
        return output.reference_points.transpose(0, 1)
    return output.intermediate_reference_points[0] if name in ("lw", "rf") else output.init_reference_points


def labels(*counts: int, seed: int = 0) -> list[dict]:
    """Random objects, so many per image."""
    draw = torch.Generator().manual_seed(seed)
    return [
        {
            "class_labels": torch.randint(CLASSES, (count,), generator=draw),
            "boxes": torch.cat(
                (0.3 + 0.4 * torch.rand(count, 2, generator=draw), 0.1 + 0.3 * torch.rand(count, 2, generator=draw)), 1
            ),
        }
        for count in counts
    ]


def pixels(batch: int, height: int = 64, width: int = 96, seed: int = 0) -> torch.Tensor:
    """Random images."""
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))
