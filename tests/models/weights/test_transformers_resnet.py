"""transformers' ResNets: the same network under other names, there and back."""

import pytest
import torch

from dndetr.models.backbone import ResNet
from dndetr.models.weights.transformers_resnet import from_transformers_resnet, to_transformers_resnet

transformers = pytest.importorskip("transformers")

SHAPES = {  # of ResNet-18 and -50, with fewer blocks, and of -34 and -101 where a stage of many blocks begins
    "basic": ((2, 2, 1, 1), 1),
    "bottleneck": ((2, 1, 2, 1), 4),
    "basic of 34": ((3, 4, 1, 1), 1),
    "bottleneck of 101": ((1, 1, 23, 1), 4),
}


def their_resnet(kind, blocks, expansion, planes=(64, 128, 256, 512)):
    """A model of transformers of which no tensor is a default."""
    config = transformers.ResNetConfig(
        depths=blocks,
        hidden_sizes=[width * expansion for width in planes],
        embedding_size=64,
        layer_type="basic" if expansion == 1 else "bottleneck",
        out_features=["stage1", "stage2", "stage3", "stage4"],
        num_labels=3,
    )
    torch.manual_seed(0)
    model = kind(config).eval()
    for name, value in model.state_dict().items():
        if "normalization" in name and value.is_floating_point():
            value.copy_(torch.rand_like(value) * 0.5 + (0.25 if name.endswith("bias") else 0.75))
    return model


@pytest.mark.parametrize("shape", SHAPES)
def test_names_go_there_and_back_and_the_maps_are_the_same(shape):
    blocks, expansion = SHAPES[shape]
    theirs = their_resnet(transformers.ResNetBackbone, blocks, expansion)
    state = theirs.state_dict()
    ours = ResNet(blocks, expansion=expansion, outputs=(1, 2, 3, 4)).eval()
    names = from_transformers_resnet(state)
    assert to_transformers_resnet(names.values()) == {ours: theirs for theirs, ours in names.items()}
    known = {name for name in names.values() if not name.endswith("num_batches_tracked")}
    assert known == ours.state_dict().keys()
    ours.load_state_dict({names[name]: value for name, value in state.items() if "tracked" not in name})
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        for expected, got in zip(theirs(images).feature_maps, ours(images), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * expected.abs().max())


def test_what_stands_before_stays_and_what_is_no_resnet_is_left():
    inside = {
        "model.backbone.conv_encoder.model.embedder.embedder.convolution.weight": "conv1.weight",
        "model.backbone.conv_encoder.model.encoder.stages.3.layers.12.shortcut.normalization.bias": (
            "layer4.12.downsample.1.bias"
        ),
    }
    inside = {theirs: "model.backbone.conv_encoder.model." + ours for theirs, ours in inside.items()}
    assert from_transformers_resnet(inside) == inside
    assert to_transformers_resnet(inside.values()) == {ours: theirs for theirs, ours in inside.items()}
    for others in ("classifier.1.weight", "encoder.layers.0.norm1.weight", "embedder.embedder.0.convolution.weight"):
        assert from_transformers_resnet([others]) == to_transformers_resnet([others]) == {others: others}
    assert to_transformers_resnet(["conv2.weight"]) == {"conv2.weight": "conv2.weight"}  # of the small stem
