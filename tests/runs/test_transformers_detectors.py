"""Detectors of transformers, read by us: the same outputs to the last digits of float32."""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch
import transformers_detectors as theirs
from safetensors.torch import load_file, save_file

from dndetr import hub
from dndetr.config import from_dict
from dndetr.detector import load
from dndetr.hf import detector_config
from dndetr.hf.written_config import to_transformers
from dndetr.models.weights.transformers_detectors import to_detector
from dndetr.runs.checkpoint import load_checkpoint


def demand_equal(path, model):
    """All layers' outputs, where transformers gives them, are the same on two images of different sizes."""
    images, sizes, _ = theirs.pair()
    expected = theirs.outputs(model)
    with torch.no_grad():
        found = load(path, "cpu").model(images, sizes)
    logits, boxes = (torch.stack(part) for part in zip(*expected, strict=True))
    assert boxes.std(dim=2).min() > 1e-3  # of boxes that are alike any order would do
    torch.testing.assert_close(found.logits[-len(logits) :], logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.boxes[-len(boxes) :], boxes, rtol=1e-5, atol=1e-5)
    return len(logits)


@pytest.mark.parametrize("variant", theirs.VARIANTS)
def test_outputs_of_all_layers_are_those_of_transformers(variant, saved):
    path, model = saved(variant)
    assert demand_equal(path, model) == model.config.decoder_layers


@pytest.mark.parametrize("variant", ["dab", "deformable-two-stage"])
def test_transformers_is_not_needed(variant, saved, monkeypatch):
    path, _ = saved(variant)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert len(load(path, "cpu").classes) == theirs.CLASSES


@pytest.mark.parametrize("variant", theirs.OTHER_BACKBONES)
def test_backbones_that_ours_cannot_be(variant, saved):
    path, model = saved(variant)
    demand_equal(path, model)
    own = from_dict(load_checkpoint(path)["config"])
    assert own.model.backbone.kind == "transformers"
    back, given = to_transformers(own, [(1, "cell")])["backbone_config"], model.config.backbone_config
    assert (back["out_indices"], back["stage_names"]) == (list(given.out_indices), list(given.stage_names))


@pytest.mark.parametrize("variant", theirs.VARIANTS)
def test_tensors_go_back_as_they_came(variant, saved):
    path, _ = saved(variant)
    content = load_checkpoint(path)
    back, kept = to_detector(content["model"], from_dict(content["config"]).model)
    given = load_file(path / "model.safetensors")
    assert kept.keys() - {"queries.patterns.weight"} == set(content["blank"])
    for name in given.keys() & back.keys():
        unused = content["config"]["model"]["encoder_layers"] == 0 and ("query_scale" in name or "level_embed" in name)
        assert back[name].equal(given[name]) or unused, name
    assert given.keys() <= back.keys()
    # Patterns that are none are zeros, and class heads that were tied are copies.
    for name in back.keys() - given.keys():
        same = given.get(re.sub(r"^class_embed\.\d", "class_embed.0", name), torch.zeros(1, 32))
        assert back[name].equal(same), name


@pytest.mark.parametrize(
    ("variant", "rules"),
    [
        ("dab", [(r"decoder\.layers\.(\d+)\.self_attn\.(?=\w)", r"decoder.layers.\1.layer.0.")]),
        ("dab", [("conv_encoder.model", "model")]),
        ("deformable", [(r"layers\.(\d+)\.(fc\d)", r"layers.\1.mlp.\2"), ("self_attn.out_proj", "self_attn.o_proj")]),
        ("deformable-5-levels", [("mlp.activation_fn", "activation_fn"), ("conv_encoder.model", "model")]),
    ],
)
def test_names_of_other_versions(variant, rules, copied):
    path, model = copied(variant)
    theirs.changed(path, theirs.renamed(*rules))
    demand_equal(path, model)


def both_places(tensors):
    heads = {name: value for name, value in tensors.items() if name.startswith("model.decoder.") and "_embed." in name}
    return tensors | {name.removeprefix("model.decoder."): value.clone() for name, value in heads.items()}


def heads_for_all(tensors):
    heads = {name: value for name, value in tensors.items() if name.startswith(("class_embed.0", "bbox_embed.0"))}
    copies = {name.replace(".0.", f".{n}.", 1): value.clone() for name, value in heads.items() for n in (1, 2)}
    return tensors | copies


@pytest.mark.parametrize(
    ("variant", "change"),
    [
        ("deformable-two-stage", both_places),
        ("deformable", heads_for_all),
        ("deformable-box-refinement", heads_for_all),
    ],
)
def test_heads_may_be_saved_more_than_once(variant, change, copied):
    path, model = copied(variant)
    theirs.changed(path, change)
    demand_equal(path, model)


@pytest.mark.parametrize("variant", ["deformable", "deformable-box-refinement"])
def test_heads_of_their_own_for_each_layer(variant, copied):
    """transformers ties them by default, and unties them where a file has several, as the original authors' have."""
    path, _ = copied(variant)

    def each_its_own(tensors):
        tensors = heads_for_all(tensors)
        torch.manual_seed(0)
        drawn = {n: 0.3 * torch.randn_like(v) for n, v in tensors.items() if n.startswith(("class", "bbox"))}
        return tensors | drawn

    theirs.changed(path, each_its_own)
    model = theirs.transformers.DeformableDetrForObjectDetection.from_pretrained(path).eval()
    assert not model.class_embed[0].weight.equal(model.class_embed[1].weight)
    demand_equal(path, model)


def as_timm(ours, kept: str):
    """For ``changed``: a ResNet under timm's names, which are torchvision's and ours, and with its counters."""

    def change(tensors):
        others = {name: value for name, value in tensors.items() if "conv_encoder" not in name}
        names = [name for name in ours if name.startswith("backbone.")]
        place = f"model.backbone.conv_encoder.model.{kept}"
        timm = {place + name.removeprefix("backbone."): ours[name] for name in names}
        return others | timm | {f"{place}bn1.num_batches_tracked": torch.tensor(7)}

    return change


@pytest.mark.parametrize(("variant", "kept"), [("dab-bottleneck-relu", "_backbone."), ("deformable-single-scale", "")])
def test_timm_names_and_dc5(variant, kept, copied, monkeypatch):
    """What the published files have, on a ResNet of fewer blocks than timm's."""
    path, model = copied(variant)
    content = load_checkpoint(path)
    small = replace(from_dict(content["config"]).model.backbone, dilation=True)
    monkeypatch.setattr(detector_config, "BackboneConfig", lambda **_: small)
    timm = {"model_type": "timm_backbone", "backbone": "resnet50", "output_stride": 16, "out_indices": [1, 2, 3, 4]}
    theirs.changed(path, as_timm(content["model"], kept), backbone_config=timm)
    demand_equal(path, theirs.dilated(model))


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "kept"), [("dab", "_backbone."), ("deformable", "")])
def test_timm_resnet_50_in_dc5(variant, kept, tmp_path):
    backbone = theirs.resnet(kind="bottleneck", depths=[3, 4, 6, 3], hidden_sizes=[256, 512, 1024, 2048])
    model = theirs.dab(backbone) if variant == "dab" else theirs.deformable(1, 1, backbone)
    theirs.dilated(model).save_pretrained(tmp_path)
    ours = load_checkpoint(tmp_path)["model"]
    old = {"backbone_config": None, "use_timm_backbone": True, "backbone": "resnet50", "dilation": True}
    theirs.changed(tmp_path, as_timm(ours, kept), **old)
    demand_equal(tmp_path, model)
    config = from_dict(load_checkpoint(tmp_path)["config"])
    assert config.model.backbone.depth == 50 and config.model.backbone.dilation


@pytest.mark.parametrize(
    ("settings", "model"),
    [
        ({"num_feature_levels": 1, "backbone": "resnet101"}, (101, (4,))),
        ({"num_feature_levels": 4}, (50, (2, 3, 4))),
        ({"num_feature_levels": 4, "backbone": "resnet18.a1_in1k"}, (18, (2, 3, 4))),
    ],
)
def test_timm_backbones_that_old_files_only_name(settings, model):
    config, classes = detector_config.from_transformers(
        {"model_type": "deformable_detr", "num_labels": 3, **settings}, {}
    )
    assert (config.model.backbone.depth, config.model.backbone.outputs) == model
    assert (config.preset, config.denoising.groups, len(classes)) == ("deformable-detr-r50", 0, 3)


def test_other_forms_of_the_weights(copied):
    """Pickled, in shards of either kind, a file by its name, and in half precision."""
    path, model = copied("dab")
    file = path / "model.safetensors"
    demand_equal(file, model)
    tensors = load_file(file)
    file.unlink()
    torch.save(tensors, path / "pytorch_model.bin")
    demand_equal(path, model)
    (path / "pytorch_model.bin").unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, path / f"model-{number}.safetensors", {"format": "pt"})
    places = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(names)}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    demand_equal(path, model)
    half = {name: value.half() for name, value in tensors.items()}
    save_file(half, file, {"format": "pt"})
    assert {value.dtype for value in load_checkpoint(path)["model"].values()} == {torch.float32}


def test_classes_are_the_rows(copied):
    path, _ = copied("dab")
    assert load(path, "cpu").names == [f"LABEL_{row}" for row in range(5)]
    theirs.changed(path, id2label={"0": "N/A", "1": "person", "2": "bicycle", "3": "N/A", "4": "car"})
    detector = load(path, "cpu")
    assert detector.classes == [(0, "N/A"), (1, "person"), (2, "bicycle"), (3, "N/A"), (4, "car")]
    assert detector.names[1] == "person" and detector.names[3] == "N/A (id 3)"


@pytest.mark.parametrize(
    ("processor", "images"),
    [
        ({}, {"recipe": "official", "eval_size": 800, "max_size": 1333, "mean": (0.485, 0.456, 0.406)}),
        ({"size": 600, "max_size": 900}, {"eval_size": 600, "max_size": 900}),
        (
            {"size": {"shortest_edge": 400, "longest_edge": 666}},
            {"eval_size": 400, "sizes": tuple(range(240, 401, 16))},
        ),
        ({"size": {"height": 96, "width": 160}}, {"recipe": "fixed", "canvas": (96, 160)}),
        ({"do_resize": False}, {"recipe": "original"}),
        ({"do_normalize": False}, {"mean": (0.0,) * 3, "std": (1.0,) * 3}),
        ({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}, {"mean": (0.5,) * 3, "std": (0.25,) * 3}),
        (
            {"do_rescale": False, "image_mean": [51] * 3, "image_std": [102] * 3},
            {"mean": (0.2,) * 3, "std": (0.4,) * 3},
        ),
    ],
)
def test_images_are_prepared_as_the_processor_says(processor, images, copied):
    path, _ = copied("dab")
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    config = from_dict(load_checkpoint(path)["config"])
    assert {name: getattr(config.images, name) for name in images} == images


def test_names_on_the_hub(saved, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    huggingface_hub = pytest.importorskip("huggingface_hub")
    path, model = saved("dab")
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(path))
    demand_equal("somebody/dab-detr", model)
    assert asked == ["somebody/dab-detr"]

    def unreachable(name, **_):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(OSError, match=r"somebody/dab-detr is no folder here, the hub cannot be reached.*config\.json"):
        load("somebody/dab-detr", "cpu")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match="pip install huggingface_hub"):
        load("somebody/dab-detr", "cpu")


@pytest.mark.parametrize(
    "name", ["here/small-1", "runs/small-1", "a.pt", "owner/model.safetensors", "a/b/c", "/a/b", "plain", "../x"]
)
def test_what_is_no_name_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert not hub.is_hub_name(name)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(name)
