"""Starting weights: official files, torchvision backbones, our checkpoints with other classes, what does not fit."""

import argparse
import json
import os
from dataclasses import replace

import detectors
import goldens
import pytest
import torch
from official_files import BACK, official, propose_only, randomised

from dndetr.models.build import build_model
from dndetr.models.weights import pretrained
from dndetr.models.weights.official import COCO_CLASSES
from dndetr.ops import images_of
from dndetr.runs.checkpoint import load_checkpoint, save_checkpoint

SUBSETS = {
    "one": [(18, "dog")],
    "unordered": [(90, "toothbrush"), (1, "person"), (27, "backpack")],
    "names-of-their-own": [(3, "voiture"), (7, "train")],
    "all": list(COCO_CLASSES),
}


def initialise(model, path, classes):
    return pretrained.initialise(model, load_checkpoint(path, needs=()), path, classes)


def predictions(model):
    batch = detectors.make_batch([1, 2], 8)
    return model.predict(images_of(batch), batch.sizes)


@pytest.mark.parametrize("name", BACK)
@pytest.mark.parametrize("classes", SUBSETS.values(), ids=SUBSETS)
def test_an_official_file_predicts_the_same_on_any_classes(name, classes, tmp_path):
    theirs = randomised(name, 91)
    columns = [number for number, _ in classes]
    propose_only(theirs, columns)
    state = {f"module.{key}": value for key, value in official(theirs, name).items()}
    torch.save({"model": state, "epoch": 49, "args": argparse.Namespace(lr=1e-4, modelname="x")}, tmp_path / "o.pth")
    model = randomised(name, len(classes), seed=1)
    report = initialise(model, tmp_path / "o.pth", classes)
    assert not report.remade and not report.ignored and not report.absent
    assert report.found == [f"{name} ({number})" for number, name in classes]
    for expected, got in zip(predictions(theirs), predictions(model), strict=True):
        torch.testing.assert_close(got, expected[..., columns] if got.shape != expected.shape else expected)
    labels = model.queries.label_enc.weight
    assert torch.equal(labels[:-1], theirs.queries.label_enc.weight[columns])
    assert torch.equal(labels[-1], theirs.queries.label_enc.weight[-1])


@pytest.mark.parametrize("file", ["dn_dab_detr", "dn_dab_deformable_detr", "dn_deformable_encoder_only_patterns3"])
def test_recorded_official_weights_on_some_classes(file, tmp_path):
    golden = goldens.model_files().get(file) or pytest.skip(f"no {file} in {goldens.GOLDEN}")
    theirs = goldens.load_model(golden, torch.float32).eval()
    torch.save({"model": golden["state_dict"]}, tmp_path / "o.pth")
    classes = [(3, "c"), (1, "a")]
    model = build_model(goldens.model_config(golden), 2).eval()
    assert not initialise(model, tmp_path / "o.pth", classes).remade
    images = goldens.images(golden, torch.float32)
    logits, boxes = theirs.predict(*images)
    got_logits, got_boxes = model.predict(*images)
    torch.testing.assert_close(got_logits, logits[..., [3, 1]])
    torch.testing.assert_close(got_boxes, boxes)


def test_dab_detr_has_no_label_table(tmp_path):
    theirs = randomised("dn-detr", 91)
    theirs.queries.label_enc.weight.data[-1] = 0  # what its matching queries start from
    state = official(theirs, "dn-detr")
    del state["label_enc.weight"]
    torch.save({"model": state}, tmp_path / "dab.pth")
    model = randomised("dn-detr", 91, seed=1)
    before = model.queries.label_enc.weight[:-1].clone()
    classes = [(number, str(number)) for number in range(91)]
    assert not initialise(model, tmp_path / "dab.pth", classes).remade
    torch.testing.assert_close(predictions(model), predictions(theirs))
    assert torch.equal(model.queries.label_enc.weight[:-1], before)


def test_category_ids_beyond_the_head_are_made_anew(tmp_path):
    torch.save(official(randomised("dn-detr", 91), "dn-detr"), tmp_path / "o.pth")
    model = randomised("dn-detr", 2, seed=1)
    before = model.decoder.class_embed.weight.clone()
    report = initialise(model, tmp_path / "o.pth", [(5, "airplane"), (2**40, "cell")])
    assert report.absent == [f"cell ({2**40})"] and "classes made anew: cell" in str(report)
    assert torch.equal(model.decoder.class_embed.weight[1], before[1])
    assert not torch.equal(model.decoder.class_embed.weight[0], before[0])


def test_our_checkpoints_are_mapped_by_name_and_average(tmp_path):
    theirs, average = randomised("dn-deformable-detr", 3), randomised("dn-deformable-detr", 3, seed=2)
    classes = [[4, "cat"], [9, "dog"], [11, "cow"]]
    checkpoint = {"model": theirs.state_dict(), "ema": average.state_dict(), "config": {}, "classes": classes}
    save_checkpoint(tmp_path / "c.pt", checkpoint)
    model = randomised("dn-deformable-detr", 4, seed=1)
    before = [head.weight.clone() for head in model.decoder.class_embed]
    report = initialise(model, tmp_path / "c.pt", [(1, "cow"), (4, "emu"), (2, "cat"), (3, "dog")])
    assert (report.found, report.absent) == (["cow", "cat", "dog"], ["emu"])
    for layer, head in enumerate(model.decoder.class_embed):
        there = average.decoder.class_embed[layer]
        assert torch.equal(head.weight[[0, 2, 3]], there.weight[[2, 0, 1]])
        assert torch.equal(head.bias[[0, 2, 3]], there.bias[[2, 0, 1]])
        assert torch.equal(head.weight[1], before[layer][1])
    logits, boxes = predictions(average)
    got_logits, got_boxes = predictions(model)
    torch.testing.assert_close(got_logits[..., [0, 2, 3]], logits[..., [2, 0, 1]])
    torch.testing.assert_close(got_boxes, boxes)


def test_what_does_not_fit_is_reported_by_name(tmp_path):
    source = build_model(detectors.CONFIGS["dn-deformable-detr"], 2).state_dict()
    source["queries.refpoint_embed.weight"] = torch.zeros(7, 4)
    source["segmentation.weight"] = torch.zeros(1)
    del source["encoder.layers.0.ffn.linear1.bias"]
    torch.save(source, tmp_path / "w.pt")
    model = build_model(detectors.CONFIGS["dn-deformable-detr"], 2)
    report = initialise(model, tmp_path / "w.pt", [(1, "a"), (2, "b")])
    remade = ["encoder.layers.0.ffn.linear1.bias", "queries.refpoint_embed.weight (7x4 there, 12x4 here)"]
    assert sorted(report.remade) == remade and report.ignored == ["segmentation.weight"]
    assert len(report.kept) == len(model.state_dict()) - 2
    assert "re-made 2: " in str(report) and "ignored 1: segmentation.weight" in str(report)


def test_a_second_set_of_queries_is_made_anew_or_dropped_with_a_line(tmp_path):
    classes = [(1, "a"), (2, "b")]
    plain, hybrid = (build_model(detectors.CONFIGS["dino"], 2), build_model(detectors.HYBRID["hybrid-dino"], 2))
    for source in (plain, hybrid):
        torch.save(source.state_dict(), tmp_path / f"{source.one_to_many}.pt")
    report = initialise(hybrid, tmp_path / "0.pt", classes)
    assert report.remade == ["queries.tgt_embed.many"] and not report.ignored
    assert torch.equal(hybrid.queries.tgt_embed.weight, plain.queries.tgt_embed.weight)
    report = initialise(plain, tmp_path / "20.pt", classes)
    assert not report.remade and str(report).endswith("ignored 1: queries.tgt_embed.many")


@pytest.mark.parametrize("name", ["dn-detr", "batch-norm-from-scratch"])
def test_torchvision_backbones(name, tmp_path):
    """With the step counters of a trainable batch norm and a classifier, as published; under DataParallel's prefix."""
    model = build_model(detectors.CONFIGS[name], 2)
    state = {key: torch.rand_like(value) for key, value in model.backbone.state_dict().items() if "tracked" not in key}
    norms = [key.removesuffix("running_var") for key in state if key.endswith("running_var")]
    state |= {f"{norm}num_batches_tracked": torch.tensor(5) for norm in norms}
    state |= {"fc.weight": torch.zeros(1000, 16), "fc.bias": torch.zeros(1000)}
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "resnet.pth")
    report = initialise(model, tmp_path / "resnet.pth", [(1, "a"), (2, "b")])
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert not report.ignored and all(not entry.startswith("backbone.") for entry in report.remade)


@pytest.mark.parametrize("change", [{"bottleneck": True}, {"stem": "small"}, {"planes": (16, 16, 16, 16)}])
def test_another_backbone_is_refused(change, tmp_path):
    config = detectors.CONFIGS["dn-detr"]
    torch.save(build_model(config, 2).backbone.state_dict(), tmp_path / "resnet.pth")
    model = build_model(replace(config, backbone=replace(config.backbone, **change)), 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"resnet.pth: its backbone does not fit: .* --model.backbone.depth"):
        initialise(model, tmp_path / "resnet.pth", [(1, "a"), (2, "b")])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


RESNET_18 = replace(detectors.CONFIGS["dn-detr"].backbone, blocks=(), planes=(64, 128, 256, 512), depth=18)


def with_backbone(**change):
    return build_model(replace(detectors.CONFIGS["dn-detr"], backbone=replace(RESNET_18, **change)), 2)


@pytest.mark.parametrize(
    ("file", "model", "what"),
    [
        ({}, {"depth": 34}, r"a ResNet-18: choose the file's with --model\.backbone\.depth 18,"),
        ({"depth": 34}, {}, r"the model has no .* a ResNet-34: choose the file's with --model\.backbone\.depth 34,"),
        ({"depth": 50, "bottleneck": True}, {}, r"ResNet-50: choose the file's with --model\.backbone\.depth 50,"),
        ({"blocks": (1, 2, 1, 1)}, {}, r"here --model\.backbone\.blocks 1 2 1 1 --model\.backbone\.bottleneck False,"),
        ({"norm": "group"}, {}, r"has no backbone\.bn1\.running_mean; .* here --model\.backbone\.norm group,"),
    ],
)
def test_a_backbone_of_another_depth_is_refused_with_what_to_type(file, model, what, tmp_path):
    torch.save(with_backbone(**file).backbone.state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=rf"resnet\.pth: its backbone does not fit: .*{what}"):
        initialise(with_backbone(**model), tmp_path / "resnet.pth", [(1, "a"), (2, "b")])


def test_a_part_of_a_backbone_is_refused(tmp_path):
    whole = with_backbone().backbone.state_dict()
    for gone, what in ((("layer2", "layer3", "layer4"), "cut off before layer2"), (("layer4.1.bn2",), "not whole")):
        part = {name: value for name, value in whole.items() if not name.startswith(gone)}
        torch.save(part, tmp_path / "cut.pth")
        with pytest.raises(ValueError, match=rf"cut\.pth: .* a ResNet-18, {what}.*give a"):
            initialise(with_backbone(), tmp_path / "cut.pth", [(1, "a"), (2, "b")])
    torch.save({name: value for name, value in whole.items() if not name.startswith("layer4")}, tmp_path / "cut.pth")
    assert initialise(with_backbone(outputs=(3,)), tmp_path / "cut.pth", [(1, "a"), (2, "b")]).kept


def test_a_backbone_of_another_kind_is_refused(tmp_path):
    torch.save({"backbone.patch_embed.weight": torch.zeros(1), "encoder.x": torch.zeros(1)}, tmp_path / "swin.pth")
    with pytest.raises(ValueError, match=r"swin\.pth: its backbone does not fit: .* it is no ResNet"):
        initialise(with_backbone(), tmp_path / "swin.pth", [(1, "a"), (2, "b")])


WRAPPED = {
    "state_dict": lambda plain: {"state_dict": plain, "best_acc1": torch.tensor(70.0), "optimizer": {"state": plain}},
    "model_state_dict, module": lambda plain: {"model_state_dict": prefixed("module.", plain)},
    "_orig_mod": lambda plain: prefixed("_orig_mod.", plain),
    "module, _orig_mod": lambda plain: prefixed("module._orig_mod.", plain),
    "state_dict, _orig_mod, model": lambda plain: {"state_dict": prefixed("model._orig_mod.", plain) | head("head.")},
    "ema, module": lambda plain: {"ema": {"module": plain, "updates": 5}, "model": prefixed("x.", plain)},
    "teacher, module": lambda plain: {"student": {}, "teacher": prefixed("module.backbone.", plain)},
    "net": lambda plain: {"net": plain, "acc": 90.0},
    "state_dict, module, encoder_q": lambda plain: {
        "state_dict": prefixed("module.encoder_q.", plain) | prefixed("module.encoder_k.", plain)
    },
}


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def head(name):
    return {f"{name}weight": torch.zeros(1)}


@pytest.mark.parametrize("kind", WRAPPED)
def test_weights_are_found_where_others_put_them(kind, tmp_path):
    plain = with_backbone().backbone.state_dict()
    torch.save(WRAPPED[kind](plain), tmp_path / "w.pth")
    model = with_backbone()
    report = initialise(model, tmp_path / "w.pth", [(1, "a"), (2, "b")])
    assert str(report).startswith(f"found under {kind}; kept {len(plain)} tensors")
    assert all(torch.equal(value, plain[name]) for name, value in model.backbone.state_dict().items())


@pytest.mark.parametrize("name", BACK)
def test_a_whole_detector_is_found_inside_of_another_module(name, tmp_path):
    theirs = randomised(name, 91)
    columns = [number for number, _ in COCO_CLASSES]
    propose_only(theirs, columns)
    torch.save({"state_dict": prefixed("model.", official(theirs, name))}, tmp_path / "lightning.ckpt")
    model = randomised(name, len(COCO_CLASSES), seed=1)
    report = initialise(model, tmp_path / "lightning.ckpt", list(COCO_CLASSES))
    assert not report.remade and not report.ignored and report.removed == ["state_dict", "model"]
    for expected, got in zip(predictions(theirs), predictions(model), strict=True):
        torch.testing.assert_close(got, expected[..., columns] if expected.shape[-1] == 91 else expected)


def test_weights_of_several_models_are_refused(tmp_path):
    plain = with_backbone().backbone.state_dict()
    torch.save(prefixed("first.", plain) | prefixed("second.", plain), tmp_path / "two.pth")
    with pytest.raises(ValueError, match=r"two\.pth has the weights of several models, first\., second\.: save"):
        initialise(with_backbone(), tmp_path / "two.pth", [(1, "a"), (2, "b")])
    torch.save(plain | prefixed("module.", plain), tmp_path / "two.pth")
    with pytest.raises(ValueError, match=r"two\.pth has conv1\.weight twice"):
        initialise(with_backbone(), tmp_path / "two.pth", [(1, "a"), (2, "b")])


def test_a_file_of_something_else_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    model = build_model(detectors.CONFIGS["dn-detr"], 2)
    with pytest.raises(ValueError, match=r"nothing in this file fits the model \(it has weight\)"):
        initialise(model, tmp_path / "other.pt", [(1, "a"), (2, "b")])


class _Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_no_code_in_a_file_is_run(tmp_path):
    args = argparse.Namespace(lr=1, evil=_Attack(tmp_path / "ran"))
    torch.save({"model": {"a": torch.zeros(1)}, "args": args}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="holds more than tensors and plain values"):
        load_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_the_table_of_coco_classes():
    path = goldens.SHARED / "data" / "coco_tiny" / "annotations" / "instances_val.json"
    if not path.is_file():
        pytest.skip(f"no data at {path} (set DNDETR_SHARED)")
    categories = json.loads(path.read_text())["categories"]
    assert list(COCO_CLASSES) == sorted((entry["id"], entry["name"]) for entry in categories)
