"""transformers' ResNets: the same network under other names, there and back, and as files to start from."""

from dataclasses import replace

import detectors
import pytest
import torch
from hf_resnets import hf_resnet

from dndetr.model_config import BackboneConfig
from dndetr.models.backbone import BLOCKS
from dndetr.models.build import build_backbone, build_model
from dndetr.models.weights.pretrained import initialise
from dndetr.models.weights.transformers_resnet import from_transformers_resnet, to_transformers_resnet
from dndetr.runs.checkpoint import load_checkpoint

transformers = pytest.importorskip("transformers")

EVERY_STAGE = (1, 2, 3, 4)
SMALL = {
    "basic": BackboneConfig(blocks=(2, 1, 1, 2), planes=(64, 16, 16, 24), bottleneck=False, outputs=EVERY_STAGE),
    "bottleneck": BackboneConfig(blocks=(2, 1, 3, 1), planes=(16, 8, 16, 24), bottleneck=True, outputs=EVERY_STAGE),
}
CLASSES = [(1, "a"), (2, "b")]


def theirs(config: BackboneConfig, kind=transformers.ResNetBackbone, **settings):
    expansion = 4 if (config.depth >= 50 if config.bottleneck is None else config.bottleneck) else 1
    return hf_resnet(kind, config.blocks or BLOCKS[config.depth], config.planes, expansion, **settings)


def assert_the_same_maps(ours, resnet):
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        expected = resnet(images, output_hidden_states=True).hidden_states[1:]
        for wanted, got in zip(expected, ours(images), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


def assert_names_go_there_and_back(state, own):
    names = from_transformers_resnet(state)
    assert to_transformers_resnet(names.values()) == {ours: theirs for theirs, ours in names.items()}
    shapes = {names[name]: value.shape for name, value in state.items() if not name.endswith("num_batches_tracked")}
    assert shapes == {name: value.shape for name, value in own.items()}


@pytest.mark.parametrize("depth", BLOCKS)
def test_names_and_shapes_of_published_depths(depth):
    config = BackboneConfig(depth=depth, outputs=EVERY_STAGE)
    with torch.device("meta"):
        assert_names_go_there_and_back(theirs(config).state_dict(), build_backbone(config).state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("depth", BLOCKS)
def test_maps_of_published_depths(depth):
    config = BackboneConfig(depth=depth, outputs=EVERY_STAGE)
    resnet, ours = theirs(config, transformers.ResNetModel), build_backbone(config).eval()
    names = from_transformers_resnet(resnet.state_dict())
    ours.load_state_dict({names[n]: value for n, value in resnet.state_dict().items() if "tracked" not in n})
    assert_the_same_maps(ours, resnet)


@pytest.mark.parametrize(
    ("kind", "under"),
    [(transformers.ResNetModel, []), (transformers.ResNetForImageClassification, ["resnet"])],
    ids=["model", "classifier"],
)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("shape", SMALL)
def test_a_saved_one_gives_the_same_maps(shape, file, kind, under, tmp_path):
    resnet = theirs(SMALL[shape], kind)
    if file.endswith(".bin"):  # as older versions saved it
        torch.save(resnet.state_dict(), tmp_path / file)
    else:
        resnet.save_pretrained(tmp_path)
    model = build_model(replace(detectors.CONFIGS["dn-deformable-detr"], backbone=SMALL[shape]), 2).eval()
    report = initialise(model, load_checkpoint(tmp_path / file, needs=()), tmp_path / file, CLASSES)
    assert report.removed == under and len(report.kept) == len(model.backbone.state_dict())
    assert sorted(report.ignored) == (["classifier.1.bias", "classifier.1.weight"] if under else [])
    assert not any(name.startswith("backbone.") for name in report.remade)
    assert_the_same_maps(model.backbone, resnet.resnet if under else resnet)


def test_one_inside_of_a_detector_is_found():
    prefix = "model.backbone.conv_encoder.model."
    state = theirs(SMALL["basic"]).state_dict()
    state = {prefix + name: value for name, value in state.items()}
    state["model.encoder.layers.0.fc1.weight"] = torch.ones(1)
    model = build_model(replace(detectors.CONFIGS["dn-deformable-detr"], backbone=SMALL["basic"]), 2)
    report = initialise(model, state, "detr", CLASSES)
    assert report.removed == [prefix[:-1]] and report.ignored == ["model.encoder.layers.0.fc1.weight"]
    assert len(report.kept) == len(model.backbone.state_dict())


def test_one_network_twice_is_refused():
    state = theirs(SMALL["basic"]).state_dict()
    both = state | {"conv1.weight": torch.zeros(1)}
    model = build_model(replace(detectors.CONFIGS["dn-deformable-detr"], backbone=SMALL["basic"]), 2)
    with pytest.raises(ValueError, match=r"x\.bin has conv1\.weight twice, once as conv1\.weight: save"):
        initialise(model, both, "x.bin", CLASSES)


def test_what_stands_before_stays_and_what_is_no_resnet_is_left():
    inside = {
        "model.backbone.model.embedder.embedder.convolution.weight": "model.backbone.model.conv1.weight",
        "x.encoder.stages.3.layers.12.shortcut.normalization.bias": "x.layer4.12.downsample.1.bias",
        "encoder.stages.0.layers.1.layer.2.normalization.weight": "layer1.1.bn3.weight",
    }
    assert from_transformers_resnet(inside) == inside
    assert to_transformers_resnet(inside.values()) == {ours: theirs for theirs, ours in inside.items()}
    for others in ("classifier.1.weight", "encoder.layers.0.norm1.weight", "embedder.embedder.0.convolution.weight"):
        assert from_transformers_resnet([others]) == to_transformers_resnet([others]) == {others: others}
    assert to_transformers_resnet(["conv2.weight"]) == {"conv2.weight": "conv2.weight"}  # of the small stem


def test_rt_detrs_resnet_is_another(tmp_path):
    config = transformers.RTDetrResNetConfig(depths=[2, 2, 1, 1], hidden_sizes=[64, 64, 64, 64], layer_type="basic")
    transformers.RTDetrResNetBackbone(config).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    model = build_model(replace(detectors.CONFIGS["dn-deformable-detr"], backbone=SMALL["basic"]), 2)
    with pytest.raises(ValueError, match=r"with a stem of several convolutions .*: give a plain ResNet's file") as told:
        initialise(model, load_checkpoint(file, needs=()), file, CLASSES)
    assert "\n" not in str(told.value)
