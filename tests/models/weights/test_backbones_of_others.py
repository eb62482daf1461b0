"""ResNets in files of other detectors, of segmentation, of timm: found where they are, or refused for what they are."""

import re
from dataclasses import replace

import detectors
import pytest
import torch
from torch import nn

import dndetr
from dndetr.models.build import build_model
from dndetr.models.weights.pretrained import initialise

CONFIG = replace(
    detectors.CONFIGS["dn-detr"], backbone=replace(detectors.CONFIGS["dn-detr"].backbone, blocks=(2, 1, 1, 1))
)
CLASSES = [(1, "a"), (2, "b")]


def resnet(seed=1, counters=False, **change):
    """A backbone's tensors with torchvision's names, none of them a default."""
    torch.manual_seed(seed)
    state = build_model(replace(CONFIG, backbone=replace(CONFIG.backbone, **change)), 2).backbone.state_dict()
    state = {name: torch.rand_like(value) for name, value in state.items()}
    norms = [name.removesuffix("running_var") for name in state if name.endswith("running_var")]
    return state | {f"{norm}num_batches_tracked": torch.tensor(5) for norm in norms if counters}


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def named(*names):
    return {f"{name}.{part}": torch.ones(2) for name in names for part in ("weight", "bias")}


OTHERS = {
    "faster r-cnn": ("backbone.body.", named("backbone.fpn.inner_blocks.0.0", "rpn.head.conv.0.0", "roi_heads.fc6")),
    "retinanet": ("backbone.body.", named("backbone.fpn.layer_blocks.0", "head.classification_head.conv.0")),
    "deeplab": ("backbone.", named("classifier.0.convs.0.0", "aux_classifier.0")),
    "timm in a detector": ("model._backbone.", named("model.neck.0", "model.head.0")),
    "transformers' detr": (
        "model.backbone.conv_encoder.model._backbone.",
        named("model.encoder.layers.0.fc1"),
    ),
}


@pytest.mark.parametrize("counters", [False, True])
@pytest.mark.parametrize("kind", OTHERS)
def test_backbones_are_found_in_other_models(kind, counters):
    prefix, rest = OTHERS[kind]
    backbone = resnet(counters=counters)
    model = build_model(CONFIG, 2)
    report = initialise(model, under(prefix, backbone) | rest, "x.pth", CLASSES)
    assert all(torch.equal(value, backbone[name]) for name, value in model.backbone.state_dict().items())
    assert sorted(report.ignored) == sorted(rest) and not any(n.startswith("backbone.") for n in report.remade)
    assert report.removed == ([] if prefix == "backbone." else [prefix[:-1]])


def detr():
    """A DETR of our width, under the names of its repository."""
    transformer = nn.Transformer(CONFIG.width, CONFIG.heads, 2, 2, CONFIG.hidden).state_dict()
    head = {"class_embed.weight": torch.ones(92, 32), "query_embed.weight": torch.ones(12, 32)}
    neck = {"input_proj.weight": torch.ones(32, 16, 1, 1), "bbox_embed.layers.0.weight": torch.ones(32, 32)}
    return under("backbone.0.body.", resnet()) | under("transformer.", transformer) | head | neck


@pytest.mark.parametrize("wrap", ["", "detr."])
def test_of_detr_the_backbone_alone_is_used(wrap):
    model = build_model(CONFIG, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    content = {"model": under(wrap, detr())}
    report = initialise(model, content, "detr.pth", CLASSES)
    for name, value in model.state_dict().items():
        wanted = resnet()[name.removeprefix("backbone.")] if name.startswith("backbone.") else before[name]
        assert torch.equal(value, wanted), name
    assert set(report.remade) == {name for name in before if not name.startswith("backbone.")}
    assert {"transformer", "class_embed", "input_proj"} <= {name.split(".")[0] for name in report.ignored}
    assert str(report).endswith("it is of another detector, DETR, of which only the backbone is used")


def test_detr_is_not_loaded_as_one_of_ours(tmp_path):
    full = replace(CONFIG.backbone, depth=50, blocks=(), bottleneck=None, planes=(64, 128, 256, 512))
    backbone = build_model(replace(CONFIG, backbone=full), 2).backbone.state_dict()
    torch.save({"model": detr() | under("backbone.0.body.", backbone)}, tmp_path / "detr.pth")
    with pytest.raises(ValueError, match=r"detr\.pth is of another detector, DETR, .* --init FILE"):
        dndetr.load(tmp_path / "detr.pth", preset="dn-detr-r50")


def renamed(state, old, new):
    return {re.sub(old, new, name): value for name, value in state.items()}


def reshaped(state, ending, shape):
    return {name: torch.zeros(shape(value)) if name.endswith(ending) else value for name, value in state.items()}


VARIANTS = {
    "a stem of several convolutions": lambda plain: renamed(plain, r"^conv1\.", "conv1.0."),
    "weights for its channels": lambda plain: plain | named("layer1.0.se.fc1"),
    "pooling in its shortcuts": lambda plain: renamed(
        renamed(plain, r"downsample\.1", "downsample.2"), r"downsample\.0", "downsample.1"
    ),
    "grouped convolutions": lambda plain: reshaped(plain, "conv2.weight", lambda w: (len(w), w.shape[1] // 4, 3, 3)),
    "wide bottlenecks": lambda plain: reshaped(plain, "conv3.weight", lambda w: (len(w) // 2, *w.shape[1:])),
}


@pytest.mark.parametrize("wrap", ["", "backbone.body."])
@pytest.mark.parametrize("what", VARIANTS)
def test_resnets_of_other_kinds_are_called_what_they_are(what, wrap):
    plain = resnet(bottleneck=True)
    model = build_model(replace(CONFIG, backbone=replace(CONFIG.backbone, bottleneck=True)), 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    content = under(wrap, VARIANTS[what](plain))
    with pytest.raises(ValueError, match=rf"^x\.pth: its backbone does not fit: .* with {what} .*: give a plain"):
        initialise(model, content, "x.pth", CLASSES)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
