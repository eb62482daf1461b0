"""ResNets of transformers with random weights and statistics."""

import torch


def hf_resnet(kind, depths, planes, expansion, dtype=torch.float32, **settings):
    """A ``kind`` of transformers' ResNet, in evaluation mode, of which no tensor is a default."""
    from transformers import ResNetConfig

    config = ResNetConfig(
        depths=list(depths),
        hidden_sizes=[width * expansion for width in planes],
        layer_type="basic" if expansion == 1 else "bottleneck",
        out_features=[f"stage{number}" for number in range(1, len(depths) + 1)],
        num_labels=3,
        **settings,
    )
    torch.manual_seed(0)
    model = kind(config).eval()
    for name, value in model.state_dict().items():
        if "normalization" in name and value.is_floating_point():
            value.copy_(torch.rand_like(value) * 0.5 + (0.0 if name.endswith("bias") else 0.75))
    return model.to(dtype)
