"""Files of the original Swin code: whole detectors, classifiers, timm's, and what is refused for what it is."""

import re
from dataclasses import replace

import backbones
import detectors
import pytest
import torch
from detrex_files import detrex
from official_files import official, propose_only, randomised
from original_swin import original_maps, original_swin
from short_runs import short_run, without_pictures

import dndetr
from dndetr import presets, train
from dndetr.models.build import build_backbone, build_model
from dndetr.models.weights.backbone_match import demand_whole_backbone
from dndetr.models.weights.official import COCO_CLASSES
from dndetr.models.weights.official_swin import from_official_swin
from dndetr.models.weights.pretrained import initialise
from dndetr.models.weights.swin_kind import swin_kind
from dndetr.ops import images_of
from dndetr.runs.checkpoint import load_checkpoint

pytest.importorskip("transformers", reason='transformers is not installed (pip install -e ".[hf]")')

COCO = list(COCO_CLASSES)
SOME = [(90, "toothbrush"), (1, "person")]
CLASSES = [(1, "a"), (2, "b")]
WHOLE = {"backbone": backbones.backbone("swin")}


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def official_dino(model) -> dict:
    """A whole detector's file."""
    state = {name: x for name, x in official(model, "dino").items() if not name.startswith("backbone.")}
    return state | under("backbone.0.", original_swin(model.backbone))


def save(state, path):
    """As torch.save or, by the ending, as safetensors, of which the republished ones have no more than the tensors."""
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({name: value.clone().contiguous() for name, value in state.items()}, path)
    else:
        torch.save({"model": state, "epoch": 11}, path)
    return path


def started(model, path, classes):
    return initialise(model, load_checkpoint(path, needs=()), path, classes)


def predictions(model):
    batch = detectors.make_batch([1, 2], 8)
    return model.predict(images_of(batch), batch.sizes)


def assert_same_predictions(model, theirs, columns):
    for expected, got in zip(predictions(theirs), predictions(model), strict=True):
        torch.testing.assert_close(got, expected[..., columns] if expected.shape[-1] != 4 else expected)


def assert_same_swin(model, theirs):
    """All that maps depend on, to the bit."""
    own, found = theirs.state_dict(), model.state_dict()
    assert own.keys() == found.keys()
    for name, value in own.items():
        assert torch.equal(value, found[name]) or name.removeprefix("model.") in model.idle, name


def block(name, width, heads, window):
    shapes = {f"{name}.attn.relative_position_bias_table": ((2 * window - 1) ** 2, heads)}
    shapes |= {f"{name}.attn.relative_position_index": (window**2, window**2)}
    for part, out, into in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4)):
        shapes |= {f"{name}.{part}.weight": (out * width, into * width), f"{name}.{part}.bias": (out * width,)}
    return shapes | {f"{name}.{norm}.{leaf}": (width,) for norm in ("norm1", "norm2") for leaf in ("weight", "bias")}


def released(width, depths, window) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the backbone in a released DINO file."""
    shapes = {"patch_embed.proj.weight": (width, 3, 4, 4)}
    shapes |= dict.fromkeys(["patch_embed.proj.bias", "patch_embed.norm.weight", "patch_embed.norm.bias"], (width,))
    for stage, depth in enumerate(depths):
        here = width * 2**stage
        for number in range(depth):
            shapes |= block(f"layers.{stage}.blocks.{number}", here, here // 32, window)
        if stage < 3:
            shapes |= {f"layers.{stage}.downsample.reduction.weight": (2 * here, 4 * here)}
            shapes |= {f"layers.{stage}.downsample.norm.{leaf}": (4 * here,) for leaf in ("weight", "bias")}
            shapes |= {f"norm{stage + 1}.{leaf}": (2 * here,) for leaf in ("weight", "bias")}
    return shapes


def spread(shapes):
    """Tensors of one number each, spread over their shapes, as our backbone's."""
    state = {f"backbone.{name}": torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    return from_official_swin(state)


def test_every_tensor_of_the_released_swin_has_its_place():
    shapes = released(192, (2, 2, 18, 2), 12)
    assert len(shapes) == 4 + 24 * 14 + 3 * 3 + 3 * 2
    with torch.device("meta"):
        backbone = build_backbone(presets.preset_named("dino-swin-l").model.backbone)
    own = {f"backbone.{name}": x.shape for name, x in backbone.state_dict().items()}
    idle = {f"backbone.model.{name}" for name in backbone.idle}
    assert {name: value.shape for name, value in spread(shapes).items()} | {name: own[name] for name in idle} == own


def test_the_original_computes_the_same_maps():
    """Windows of 7 on 24x32 to 3x4 pixels: all are padded, and shifted ones have seams."""
    backbone = randomised("dino", 2, backbone=backbones.backbone("swin", outputs=(1, 2, 3, 4))).backbone
    state = original_swin(backbone)
    fresh = build_backbone(backbones.backbone("swin", outputs=(1, 2, 3, 4))).eval()
    ours = {n.removeprefix("backbone."): x for n, x in from_official_swin(under("backbone.", state)).items()}
    found = fresh.load_state_dict(ours, strict=False)
    assert not found.unexpected_keys and {name.removeprefix("model.") for name in found.missing_keys} == fresh.idle
    images = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps, expected = fresh(images), original_maps(state, images, (1, 2, 3, 4))
    for got, wanted in zip(maps, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("classes", [COCO, SOME], ids=["all", "some"])
@pytest.mark.parametrize("file", ["o.pth", "o.safetensors"])
def test_a_whole_detector(file, classes, tmp_path):
    theirs, model = randomised("dino", 91, **WHOLE), randomised("dino", len(classes), seed=1, **WHOLE)
    columns = [number for number, _ in classes]
    propose_only(theirs, columns)
    report = started(model, save(official_dino(theirs), tmp_path / file), classes)
    assert (report.remade, report.ignored, report.absent, report.hints) == ([], [], [], [])
    assert report.found == [f"{name} ({number})" for number, name in classes]
    assert_same_swin(model.backbone, theirs.backbone)
    assert_same_predictions(model, theirs, columns)


def test_a_whole_detector_inside_of_another_module(tmp_path):
    theirs, model = randomised("dino", 91, **WHOLE), randomised("dino", 2, seed=1, **WHOLE)
    report = started(model, save(under("model.", official_dino(theirs)), tmp_path / "o.pth"), SOME)
    assert report.removed == ["model", "model"] and not report.remade and not report.ignored
    assert_same_swin(model.backbone, theirs.backbone)


def test_a_whole_detector_of_detrex(tmp_path):
    theirs, model = randomised("dino", 80, **WHOLE), randomised("dino", 80, seed=1, **WHOLE)
    resnet = randomised("dino", 80).backbone
    swin, theirs.backbone = theirs.backbone, resnet
    state = {name: x for name, x in detrex(theirs).items() if not name.startswith("backbone.")}
    theirs.backbone = swin
    report = started(model, save(state | under("backbone.", original_swin(swin)), tmp_path / "d.pth"), COCO)
    assert not report.remade and not report.ignored
    assert_same_swin(model.backbone, theirs.backbone)
    assert_same_predictions(model, theirs, slice(None))


@pytest.fixture
def small_preset(monkeypatch):
    """The preset, of a small model, whose published backbone cannot be had."""
    backbone = replace(backbones.backbone("swin"), name="swin-large")
    model = replace(detectors.CONFIGS["dino"], backbone=backbone)
    preset = replace(presets.dino_swin_l(), model=model, precision="float32")
    monkeypatch.setitem(presets.PRESETS, "dino-swin-l", lambda: preset)
    monkeypatch.setattr("dndetr.published_backbones.published_folder", lambda name: pytest.fail(f"{name} is asked for"))
    return model


def test_a_whole_detector_by_its_preset(small_preset, tmp_path):
    theirs = build_model(small_preset, 91)
    columns = [number for number, _ in COCO]
    propose_only(theirs, columns)
    detector = dndetr.load(save(official_dino(theirs), tmp_path / "o.pth"), "cpu", preset="dino-swin-l")
    assert detector.classes == COCO
    assert_same_predictions(detector.model, theirs.eval(), columns)


def test_a_run_from_a_whole_detector(small_preset, tmp_path):
    theirs = build_model(small_preset, 91)
    file = save(official_dino(theirs), tmp_path / "o.pth")
    flags = ["--preset", "dino-swin-l", "--data", "shapes", "--init", str(file), "--lr", "1e-30", "--device", "cpu"]
    run = short_run(tmp_path / "run", *flags, "--workers", "0", "--max-steps-per-epoch", "1")
    found = torch.load(run / "checkpoint.pt", weights_only=True)
    assert found["step"] == 1
    for name in (
        "model.swin.encoder.layers.2.blocks.0.attention.k_proj.weight",
        "model.hidden_states_norms.stage2.bias",
    ):
        torch.testing.assert_close(found["model"][f"backbone.{name}"], theirs.state_dict()[f"backbone.{name}"])


def test_a_run_does_not_start_from_a_random_backbone(small_preset, tmp_path, capsys):
    state = build_model(small_preset, 91).state_dict()
    torch.save({name: x for name, x in state.items() if not name.startswith("backbone.")}, tmp_path / "half.pt")
    flags = ["--preset", "dino-swin-l", "--data", "shapes", "--init", str(tmp_path / "half.pt"), "--workers", "0"]
    few = ["--batch-size", "4", "--train-images", "8", "--val-images", "6", "--output", str(tmp_path / "run")]
    with without_pictures():
        assert train.main([*flags, *few]) == 1
    assert "half.pt has no backbone: give one, --model.backbone.name swin-large" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def classifier(backbone, late=False):
    place = "head.fc" if late else "head"
    head = {f"{place}.weight": torch.ones(22, 64), f"{place}.bias": torch.ones(22)}
    return original_swin(backbone, norms=False, late=late) | head


@pytest.mark.parametrize("late", [False, True], ids=["microsoft", "timm"])
@pytest.mark.parametrize("file", ["c.pth", "c.safetensors"])
def test_classifiers(file, late, tmp_path):
    theirs, model = (randomised("dino", 2, seed=seed, **WHOLE) for seed in (0, 1))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    report = started(model, save(classifier(theirs.backbone, late), tmp_path / file), CLASSES)
    norms = [name for name in before if "hidden_states_norms" in name]
    others = [name for name in before if not name.startswith("backbone.")]
    assert (sorted(report.remade), report.ignored, report.removed) == (sorted(norms + others), [], [])
    assert "backbone.model.hidden_states_norms (6)" in str(report)
    for name, value in model.state_dict().items():
        expected = before[name] if name in norms + others else theirs.state_dict()[name]
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("prefix", ["backbone.", "backbone.bottom_up.", "module.encoder."])
def test_backbones_are_found_in_other_models(prefix, tmp_path):
    """Those of Mask R-CNN, detectron2 or masked training, which have norms of other maps, and parts of their own."""
    outputs = backbones.backbone("swin", outputs=(1, 2, 3, 4))
    theirs, model = randomised("dino", 2, backbone=outputs, levels=5), randomised("dino", 2, seed=1, **WHOLE)
    state = under(prefix, original_swin(theirs.backbone)) | {"rpn_head.rpn_conv.weight": torch.ones(2)}
    report = started(model, save(state, tmp_path / "m.pth"), CLASSES)
    assert all(
        torch.equal(x, model.state_dict()[name]) for name, x in theirs.state_dict().items() if ".swin.enc" in name
    )
    norm = "backbone.model.hidden_states_norms.stage1"
    assert sorted(report.ignored) == [f"{norm}.bias", f"{norm}.weight", "rpn_head.rpn_conv.weight"]
    assert not any(name.startswith("backbone.") for name in report.remade)


def test_stages_beyond_the_model_are_not_needed(tmp_path):
    short = {"backbone": backbones.backbone("swin", outputs=(2, 3))}
    theirs, model = randomised("dino", 2, **WHOLE), randomised("dino", 2, seed=1, **short)
    report = started(model, save(original_swin(theirs.backbone), tmp_path / "s.pth"), CLASSES)
    assert not any(name.startswith("backbone.") for name in report.remade)
    assert all(torch.equal(x, theirs.backbone.state_dict()[name]) for name, x in model.backbone.state_dict().items())


def swin(**changes):
    settings = {**backbones.SETTINGS["swin"], **changes}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backbones.SETTINGS, "swin", settings)
        return backbones.backbone("swin")


MINE = "a Swin of width 8, 1 2 1 1 blocks and 1 2 2 4 heads with windows of 7"
BUT = f"but the model's is {MINE}: give a checkpoint .*, choose the file's with --model.backbone.name FOLDER"
RESNET = detectors.CONFIGS["dino"].backbone
OTHERS = {
    "wider": (swin(embed_dim=16), WHOLE["backbone"], f"a Swin of width 16, 1 2 1 1 blocks .*, {BUT}"),
    "deeper": (swin(depths=[1, 2, 3, 1]), WHOLE["backbone"], f"a Swin of width 8, 1 2 3 1 blocks .*, {BUT}"),
    "shallower": (swin(depths=[1, 1, 1, 1]), WHOLE["backbone"], f"a Swin of width 8, 1 1 1 1 blocks .*, {BUT}"),
    "windows": (swin(window_size=4), WHOLE["backbone"], f"a Swin of width 8, .* with windows of 4, {BUT}"),
    "heads": (swin(num_heads=[2, 2, 2, 4]), WHOLE["backbone"], f"a Swin of .* 2 2 2 4 heads .*, {BUT}"),
    "for a resnet": (
        WHOLE["backbone"],
        RESNET,
        f"{MINE}, but the model's is a ResNet of .*: choose .* --model.backbone.kind tr",
    ),
    "for a convnext": (
        WHOLE["backbone"],
        backbones.backbone("convnextv2"),
        f"{MINE}, but the model's is of transformers: give a",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_swin_is_refused_for_what_it_is(kind, tmp_path):
    """In files of classifiers and, where the model has no Swin at all, of detectors."""
    there, here, message = OTHERS[kind]
    model = build_model(replace(detectors.CONFIGS["dino"], backbone=here), 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole = official_dino(randomised("dino", 91, backbone=there)) if kind.startswith("for") else None
    file = save(whole or classifier(build_backbone(there)), tmp_path / "s.pth")
    with pytest.raises(ValueError, match=rf"s\.pth: its backbone does not fit: .*; it seems to be {message}"):
        started(model, file, SOME)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_resnet_for_a_swin_is_refused(tmp_path):
    file = save(official(randomised("dino", 91), "dino"), tmp_path / "r.pth")
    message = rf"seems to be a ResNet of .*, but the model's is {MINE}: .*, name a preset with a ResNet, or leave out"
    with pytest.raises(ValueError, match=message):
        started(randomised("dino", 2, **WHOLE), file, SOME)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {name: x for name, x in state.items() if "layers.1.blocks.1.mlp" not in name},
        lambda state: {name: x for name, x in state.items() if not name.startswith("layers.2.downsample")},
        lambda state: state | {"layers.0.blocks.0.attn.qkv.bias": torch.ones(25)},
        lambda state: state | {"layers.0.blocks.0.attn.qkv.bias": torch.tensor(1.0)},
        lambda state: state | {"absolute_pos_embed": torch.ones(1, 8, 56, 56)},
    ],
    ids=["no-mlp", "no-merging", "uneven", "scalar", "absolute"],
)
def test_a_swin_that_is_not_whole_is_refused(change, tmp_path):
    model = build_model(replace(detectors.CONFIGS["dino"], **WHOLE), 2)
    file = save(change(original_swin(build_backbone(WHOLE["backbone"]))), tmp_path / "s.pth")
    with pytest.raises(
        ValueError, match=rf"s\.pth: .*; it seems to be {MINE}, not whole or changed: give another file"
    ):
        started(model, file, CLASSES)


@pytest.mark.parametrize(
    ("letter", "flag", "shape"),
    [
        ("T", "swin-tiny", (96, (2, 2, 6, 2), 7)),
        ("S", "swin-small", (96, (2, 2, 18, 2), 7)),
        ("B", "swin-base", (128, (2, 2, 18, 2), 7)),
        ("B", "microsoft/swin-base-patch4-window12-384-in22k", (128, (2, 2, 18, 2), 12)),
        ("L", "microsoft/swin-large-patch4-window7-224-in22k", (192, (2, 2, 18, 2), 7)),
        ("L", "swin-large", (192, (2, 2, 18, 2), 12)),
    ],
)
def test_published_sizes_have_names_to_type(letter, flag, shape):
    there = spread(released(*shape))
    kind = swin_kind({name.removeprefix("backbone."): x.shape for name, x in there.items()})
    assert str(kind) == f"Swin-{letter} with windows of {shape[2]}" and kind.flag == f"--model.backbone.name {flag}"
    mine = spread(released(64, (2, 2, 2, 2), 7))
    with pytest.raises(ValueError, match=rf"a Swin-{letter} .*choose the file's with {re.escape(kind.flag)}, or leave"):
        demand_whole_backbone(mine, there, "s.pth")
    demand_whole_backbone(there, there, "s.pth")


DEEPER = {
    "swinv2": {"depths": [1, 2, 2, 1]},
    "convnextv2": {"depths": [1, 1, 2, 1]},
    "focalnet": {"depths": [1, 2, 1, 1]},
    "pvt_v2": {"depths": [2, 2, 2, 2]},
    "dinov2": {"num_hidden_layers": 3},
    "dinov3_vit": {"num_hidden_layers": 3},
}


@pytest.mark.parametrize("kind", DEEPER)
def test_half_of_a_deeper_backbone_of_transformers_is_refused(kind, tmp_path, monkeypatch):
    """It has all that the model has, and what it has more would be left out without a word."""
    model = build_model(backbones.detector(kind), 2)
    whole = {"model": model.state_dict()}
    assert not initialise(model, whole, "w.pt", CLASSES).remade
    monkeypatch.setitem(backbones.SETTINGS, kind, {**backbones.SETTINGS[kind], **DEEPER[kind]})
    deeper = {"model": build_model(backbones.detector(kind), 2).state_dict()}
    with pytest.raises(ValueError, match=r"w\.pt: its backbone does not fit: the model has no backbone\.model\."):
        initialise(model, deeper, "w.pt", CLASSES)
