"""Starting weights of a DINO: released, republished and detrex's files, one kind of heads for a model of another."""

import argparse
from collections import Counter
from dataclasses import replace

import detectors
import goldens
import pytest
import torch
from detrex_files import detrex
from official_files import official, propose_only, randomised

import dndetr
from dndetr import presets, train
from dndetr.models.build import build_model
from dndetr.models.weights import pretrained
from dndetr.models.weights.head_sharing import fit_heads
from dndetr.models.weights.official import COCO_CLASSES, from_official, official_names
from dndetr.ops import images_of
from dndetr.runs.checkpoint import load_checkpoint

COCO = list(COCO_CLASSES)
SOME = [(90, "toothbrush"), (1, "person"), (27, "backpack")]
RESULTS = {"optimizer": {"state": {}, "param_groups": []}, "lr_scheduler": {"last_epoch": 11}, "epoch": 11}
METADATA = {"schema_version": 1, "model_family": "dinodetr", "size": "r50", "nc": 80, "names": dict(enumerate("abc"))}
FILES = {
    "released": lambda state: {"model": state, **RESULTS, "args": argparse.Namespace(lr=1e-4, dn_number=100)},
    "separate": lambda state: {"model": {name: value.clone() for name, value in state.items()}},
    "no-average": lambda state: {"model": state, "ema_model": None, **RESULTS},
    "empty-average": lambda state: {"model": state, "ema_model": {}, **RESULTS},
    "republished": lambda state: {"model": state, **METADATA},
    "wrapped": lambda state: {"model": {f"module.{name}": value for name, value in state.items()}, **METADATA},
}
LIKE_DETREX = {"shared_heads": False, "temperature": (10000.0, 10000.0), "position_shift": 0.5}


def initialise(model, content, path, classes):
    torch.save(content, path)
    return pretrained.initialise(model, load_checkpoint(path, needs=()), path, classes)


def predictions(model):
    batch = detectors.make_batch([1, 2], 8)
    return model.predict(images_of(batch), batch.sizes)


def assert_same_predictions(model, theirs, columns=slice(None)):
    for expected, got in zip(predictions(theirs), predictions(model), strict=True):
        torch.testing.assert_close(got, expected[..., columns] if expected.shape[-1] != 4 else expected)


def assert_whole(report, classes):
    assert (report.remade, report.ignored, report.absent, report.hints) == ([], [], [], [])
    assert report.found == [f"{name} ({number})" for number, name in classes]


def linear(name, out, into):
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name, width=256):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def frozen(name, width):
    return norm(name, width) | {f"{name}.running_mean": (width,), f"{name}.running_var": (width,)}


def resnet_50():
    shapes = {"conv1.weight": (64, 3, 7, 7)} | frozen("bn1", 64)
    before = 64
    for stage, (blocks, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), 1):
        for block in range(blocks):
            name, after = f"layer{stage}.{block}", 4 * width
            kernels = ((width, before, 1, 1), (width, width, 3, 3), (after, width, 1, 1))
            for number, kernel in enumerate(kernels, 1):
                shapes |= {f"{name}.conv{number}.weight": kernel} | frozen(f"{name}.bn{number}", kernel[0])
            if block == 0:
                shapes |= {f"{name}.downsample.0.weight": (after, before, 1, 1)}
                shapes |= frozen(f"{name}.downsample.1", after)
            before = after
    return {f"backbone.0.body.{name}": shape for name, shape in shapes.items()}


def deformable_attention(name, levels):
    return {
        **linear(f"{name}.sampling_offsets", 64 * levels, 256),
        **linear(f"{name}.attention_weights", 32 * levels, 256),
        **linear(f"{name}.value_proj", 256, 256),
        **linear(f"{name}.output_proj", 256, 256),
    }


def box_head(name):
    return (
        linear(f"{name}.layers.0", 256, 256) | linear(f"{name}.layers.1", 256, 256) | linear(f"{name}.layers.2", 4, 256)
    )


def released(levels) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a released file with a ResNet-50."""
    shapes = resnet_50()
    sources = [(256, 1), (512, 1), (1024, 1), (2048, 1), (2048, 3)][-levels:]
    for level, (width, side) in enumerate(sources):
        shapes |= {f"input_proj.{level}.0.weight": (256, width, side, side), f"input_proj.{level}.0.bias": (256,)}
        shapes |= norm(f"input_proj.{level}.1")
    shapes |= {"transformer.level_embed": (levels, 256), "transformer.tgt_embed.weight": (900, 256)}
    for layer in range(6):
        for part, norms in (("encoder", 2), ("decoder", 3)):
            name = f"transformer.{part}.layers.{layer}"
            shapes |= deformable_attention(f"{name}.{'self' if part == 'encoder' else 'cross'}_attn", levels)
            shapes |= linear(f"{name}.linear1", 2048, 256) | linear(f"{name}.linear2", 256, 2048)
            for number in range(1, norms + 1):
                shapes |= norm(f"{name}.norm{number}")
        attention = f"transformer.decoder.layers.{layer}.self_attn"
        shapes |= {f"{attention}.in_proj_weight": (768, 256), f"{attention}.in_proj_bias": (768,)}
        shapes |= linear(f"{attention}.out_proj", 256, 256)
        for place in ("", "transformer.decoder."):
            shapes |= linear(f"{place}class_embed.{layer}", 91, 256) | box_head(f"{place}bbox_embed.{layer}")
    shapes |= norm("transformer.decoder.norm") | norm("transformer.enc_output_norm")
    shapes |= linear("transformer.decoder.ref_point_head.layers.0", 256, 512)
    shapes |= linear("transformer.decoder.ref_point_head.layers.1", 256, 256)
    shapes |= linear("transformer.enc_output", 256, 256) | linear("transformer.enc_out_class_embed", 91, 256)
    return shapes | box_head("transformer.enc_out_bbox_embed") | {"label_enc.weight": (92, 256)}


@pytest.mark.parametrize(("preset", "levels", "keys"), [("dino-r50", 4, 626), ("dino-r50-5scale", 5, 630)])
def test_every_tensor_of_a_released_file_has_its_place(preset, levels, keys):
    shapes = released(levels)
    assert len(shapes) == keys
    with torch.device("meta"):
        own = build_model(presets.preset_named(preset).model, 91).state_dict()
    places = Counter(official_names(shapes).values())
    heads = {name: times for name, times in places.items() if name.startswith(("decoder.class_", "decoder.bbox_"))}
    assert len(heads) == 6 * 8 and set(heads.values()) == {2}
    assert all(times == 1 for name, times in places.items() if name not in heads)
    # One number each, spread over the shape.
    state = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    ours = fit_heads(from_official(state), own)
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in own.items()}


def golden_file(name):
    return goldens.model_files().get(name) or pytest.skip(f"no {name} in {goldens.GOLDEN}")


def golden_model(golden, classes):
    return build_model(goldens.model_config(golden), len(classes)).eval()


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("name", ["dino_4scale", "dino_5scale", "dn_dino_two_stage_contrastive"])
def test_recorded_official_weights(name, kind, tmp_path):
    """On all rows, and on some of them, where the rest is never proposed."""
    golden = golden_file(name)
    state = dict(golden["state_dict"])
    images = goldens.images(golden, torch.float32)
    rows = golden["meta"]["num_classes"]
    for numbers in (range(rows), [3, 1]):
        classes = [(number, f"class {number}") for number in numbers]
        if "transformer.enc_out_class_embed.bias" in state:
            others = [row for row in range(rows) if row not in numbers]
            state["transformer.enc_out_class_embed.bias"] = state["transformer.enc_out_class_embed.bias"].clone()
            state["transformer.enc_out_class_embed.bias"][others] = -1e4
        theirs = goldens.load_model({**golden, "state_dict": state}, torch.float32).eval()
        model = golden_model(golden, classes)
        assert_whole(initialise(model, FILES[kind](state), tmp_path / "o.pth", classes), classes)
        logits, boxes = theirs.predict(*images)
        got_logits, got_boxes = model.predict(*images)
        torch.testing.assert_close(got_logits, logits[..., list(numbers)])
        torch.testing.assert_close(got_boxes, boxes)


def test_the_moving_average_is_taken(tmp_path):
    plain, average = randomised("dino", 91), randomised("dino", 91, seed=2)
    propose_only(average, [number for number, _ in COCO])
    content = {"model": official(plain, "dino"), "ema_model": official(average, "dino"), **RESULTS}
    model = randomised("dino", 80, seed=1)
    report = initialise(model, content, tmp_path / "o.pth", COCO)
    assert_whole(report, COCO)
    assert str(report).startswith("found under ema_model; kept ")
    assert_same_predictions(model, average, [number for number, _ in COCO])


def test_more_labels_than_classes(tmp_path):
    """The label table has its own size officially: the rows of classes and the last, "no label", are taken."""
    state = official(randomised("dino", 91), "dino")
    state["label_enc.weight"] = torch.randn(121, 32)
    model = randomised("dino", 3, seed=1)
    assert_whole(initialise(model, {"model": state}, tmp_path / "o.pth", SOME), SOME)
    assert torch.equal(model.queries.label_enc.weight, state["label_enc.weight"][[90, 1, 27, 120]])


def test_a_head_whose_names_disagree_is_refused(tmp_path):
    state = official(randomised("dino", 91), "dino")
    state["class_embed.1.bias"] = state["class_embed.1.bias"] + 1
    with pytest.raises(ValueError, match=r"o\.pth: transformer\.decoder\.class_embed\.1\.bias is not the tensor"):
        initialise(randomised("dino", 91), {"model": state}, tmp_path / "o.pth", COCO)


@pytest.mark.parametrize("beginning", ["patch_embed.proj", "downsample_layers.0.0"], ids=["swin", "convnext"])
@pytest.mark.parametrize("place", ["backbone.0.", "backbone."], ids=["official", "detrex"])
def test_another_backbone_is_refused(place, beginning, tmp_path):
    state = {
        f"{place}{beginning}.weight": torch.zeros(192, 3, 4, 4),
        "transformer.enc_output.weight": torch.zeros(32, 32),
    }
    with pytest.raises(ValueError, match=r"it is no ResNet.* \(it has backbone.*" + beginning):
        initialise(randomised("dino", 91), {"model": state, **METADATA}, tmp_path / "swin.pth", COCO)


@pytest.mark.parametrize("classes", [COCO, SOME], ids=["all", "some"])
def test_detrex_files(classes, tmp_path):
    theirs = randomised("dino", 80, **LIKE_DETREX)
    rows = [COCO.index(entry) for entry in classes]
    propose_only(theirs, rows)
    model = randomised("dino", len(classes), seed=1, **LIKE_DETREX)
    assert_whole(initialise(model, {"model": detrex(theirs), "iteration": 90000}, tmp_path / "d.pth", classes), classes)
    assert_same_predictions(model, theirs, rows)
    labels = model.queries.label_enc.weight
    assert torch.equal(labels[:-1], theirs.queries.label_enc.weight[rows]) and not labels[-1].any()


def test_detrex_files_of_five_levels(tmp_path):
    backbone = replace(detectors.CONFIGS["dino"].backbone, outputs=(1, 2, 3, 4))
    theirs = randomised("dino", 80, **LIKE_DETREX, backbone=backbone, levels=5)
    model = randomised("dino", 80, seed=1, **LIKE_DETREX, backbone=backbone, levels=5)
    assert_whole(initialise(model, {"model": detrex(theirs)}, tmp_path / "d.pth", COCO), COCO)
    assert_same_predictions(model, theirs)


def test_detrex_heads_that_differ_need_a_flag_and_so_do_its_positions(tmp_path):
    theirs, model = randomised("dino", 80, **LIKE_DETREX), randomised("dino", 80, seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = initialise(model, {"model": detrex(theirs)}, tmp_path / "d.pth", COCO)
    heads = [name for name in before if name.startswith(("decoder.class_embed", "decoder.bbox_embed"))]
    assert report.remade == heads and all(torch.equal(model.state_dict()[name], before[name]) for name in heads)
    assert Counter(name.split(".")[1] for name in report.ignored) == {"class_embed": 6, "bbox_embed": 18}
    flags = ("--model.no-shared-heads", "--model.temperature 10000 10000 --model.position-shift 0.5")
    assert all(flag in str(report) for flag in flags)
    asked = train.parse(["--preset", "dino-r50", *" ".join(flags).split()]).model
    assert not asked.shared_heads and asked.temperature == (10000.0, 10000.0) and asked.position_shift == 0.5
    assert torch.equal(model.proposals.class_embed.weight, theirs.proposals.class_embed.weight)


def test_official_weights_by_way_of_detrex(tmp_path):
    theirs, model = randomised("dino", 80), randomised("dino", 80, seed=1)
    report = initialise(model, {"model": detrex(theirs)}, tmp_path / "d.pth", COCO)
    assert not report.remade and not report.ignored
    assert_same_predictions(model, theirs)


def test_detrex_files_of_other_classes(tmp_path):
    """Which they are nobody knows: rows are taken where there are as many."""
    theirs = randomised("dino", 5, **LIKE_DETREX)
    model = randomised("dino", 5, seed=1, **LIKE_DETREX)
    report = initialise(model, {"model": detrex(theirs)}, tmp_path / "d.pth", COCO[:5])
    assert not report.remade and not report.found
    assert_same_predictions(model, theirs)


@pytest.mark.parametrize("to", [True, False], ids=["to-one", "to-each"])
def test_one_head_and_copies_of_it_are_the_same(to, tmp_path):
    theirs = randomised("dino", 3)
    weights = theirs.state_dict()
    if to:
        weights = fit_heads(weights, randomised("dino", 3, shared_heads=False).state_dict())
        assert "decoder.bbox_embed.2.layers.0.weight" in weights
    content = {"model": weights, "classes": [list(entry) for entry in SOME]}
    model = randomised("dino", 3, seed=1, shared_heads=to)
    report = initialise(model, content, tmp_path / "c.pt", SOME)
    assert not report.remade and not report.ignored
    assert_same_predictions(model, theirs)


def test_a_head_is_one_or_none():
    """Where single tensors of heads are alike, as new biases are, they are no copies."""
    theirs = build_model(replace(detectors.CONFIGS["dino"], shared_heads=False), 3).state_dict()
    assert theirs["decoder.class_embed.0.bias"].equal(theirs["decoder.class_embed.1.bias"])
    fitted = fit_heads(theirs, randomised("dino", 3).state_dict())
    assert fitted.keys() == theirs.keys()


def test_dn_deformable_weights_for_a_dino(tmp_path):
    theirs, model = randomised("dn-deformable-detr", 91), randomised("dino", 3, seed=1)
    content = {"model": official(theirs, "dn-deformable-detr")}
    report = initialise(model, content, tmp_path / "o.pth", SOME)
    assert torch.equal(model.encoder.layers[1].ffn.linear1.weight, theirs.encoder.layers[1].ffn.linear1.weight)
    assert torch.equal(model.decoder.layers[2].norm2.weight, theirs.decoder.layers[2].norm2.weight)
    assert {name.split(".")[0] for name in report.remade} == {"decoder", "proposals", "queries"}
    assert "queries.label_enc.weight (92x31 there, 4x32 here)" in report.remade
    assert report.hints == ["its decoder layers have heads of their own, kept with --model.no-shared-heads"]
    model = randomised("dino", 3, seed=1, shared_heads=False)
    report = initialise(model, content, tmp_path / "o.pth", SOME)
    assert not report.hints and not any("_embed.0" in name for name in report.remade)
    rows = theirs.decoder.class_embed[1].weight[[90, 1, 27]]
    assert torch.equal(model.decoder.class_embed[1].weight, rows)


def test_scores_of_objects_are_no_scores_of_a_class(tmp_path):
    """A row of the encoder's class head means an object of any class in one kind of model, and a class in the other."""
    selected, objects = randomised("dino", 91), randomised("two-stage", 91)
    for theirs, name, other in ((selected, "dino", "two-stage"), (objects, "two-stage", "dino")):
        for content in (
            {"model": official(theirs, name)},
            {"model": theirs.state_dict(), "classes": [[n, str(n)] for n in range(91)],
             "config": {"model": {"proposals": "objects" if name == "two-stage" else "selected"}}},
        ):  # fmt: skip
            model = randomised(other, 2, seed=1)
            before = model.proposals.class_embed.weight.clone()
            report = initialise(model, content, tmp_path / "o.pth", [(5, "5"), (9, "9")])
            assert {"proposals.class_embed.weight", "proposals.class_embed.bias"} <= set(report.remade)
            assert torch.equal(model.proposals.class_embed.weight, before)
            assert torch.equal(
                model.proposals.bbox_embed.layers[1].weight, theirs.proposals.bbox_embed.layers[1].weight
            )


@pytest.fixture
def small_preset(monkeypatch):
    """The preset's name for a small model."""
    preset = replace(presets.dino_r50(), model=detectors.CONFIGS["dino"], precision="float32")
    monkeypatch.setitem(presets.PRESETS, "dino-r50", lambda: preset)


def test_a_released_file_is_loaded_by_its_preset(small_preset, tmp_path):
    theirs = randomised("dino", 91)
    propose_only(theirs, [number for number, _ in COCO])
    torch.save(FILES["released"](official(theirs, "dino")), tmp_path / "o.pth")
    detector = dndetr.load(tmp_path / "o.pth", "cpu", preset="dino-r50")
    assert detector.classes == COCO
    assert_same_predictions(detector.model, theirs, [number for number, _ in COCO])


def test_a_detrex_file_is_no_preset(small_preset, tmp_path):
    torch.save({"model": detrex(randomised("dino", 80, **LIKE_DETREX))}, tmp_path / "d.pth")
    with pytest.raises(ValueError, match=r"--model\.no-shared-heads.* --init") as refused:
        dndetr.load(tmp_path / "d.pth", "cpu", preset="dino-r50")
    assert "--model.temperature 10000 10000 --model.position-shift 0.5" in str(refused.value)
    assert "name another" not in str(refused.value)
