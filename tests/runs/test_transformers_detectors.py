"""Detectors of transformers, read by us: the same outputs to the last digits of float32, and one line for others."""

import json
import re
import shutil

import pytest
import torch
import transformers_detectors as theirs
from safetensors.torch import load_file, save_file

from dndetr import hub
from dndetr.config import from_dict
from dndetr.detector import load
from dndetr.models.weights.transformers_detectors import to_detector
from dndetr.runs.checkpoint import load_checkpoint
from dndetr.runs.detector_folder import is_of_transformers


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of each variant, saved when it is first asked for, and the model itself."""
    known = {}

    def folder(variant: str):
        if variant not in known:
            model = theirs.VARIANTS[variant]()
            path = tmp_path_factory.mktemp(variant)
            model.save_pretrained(path)
            known[variant] = path, model
        return known[variant]

    return folder


@pytest.fixture
def copied(saved, tmp_path):
    """A folder of one's own, to be changed."""

    def folder(variant: str):
        path, model = saved(variant)
        return shutil.copytree(path, tmp_path / "detector"), model

    return folder


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
        drawn = {n: 0.3 * torch.randn_like(v) for n, v in tensors.items() if n.startswith(("class", "bbox"))}
        return tensors | drawn

    theirs.changed(path, each_its_own)
    model = theirs.transformers.DeformableDetrForObjectDetection.from_pretrained(path).eval()
    assert not model.class_embed[0].weight.equal(model.class_embed[1].weight)
    demand_equal(path, model)


@pytest.mark.parametrize("variant", ["dab", "deformable"])
def test_timm_names_and_dc5(variant, tmp_path):
    """What the published files have: timm's ResNet-50, under torchvision's names, in DC5 dilated."""
    backbone = theirs.resnet(kind="bottleneck", depths=[3, 4, 6, 3], hidden_sizes=[256, 512, 1024, 2048])
    model = theirs.dab(backbone) if variant == "dab" else theirs.deformable(1, 1, backbone)
    theirs.dilated(model).save_pretrained(tmp_path)
    ours = load_checkpoint(tmp_path)["model"]
    kept = ("model.backbone.conv_encoder.model.", "model.backbone.conv_encoder.model._backbone.")[variant == "dab"]

    def as_timm(tensors):
        others = {name: value for name, value in tensors.items() if "conv_encoder" not in name}
        names = {name: name.removeprefix("backbone.") for name in ours if name.startswith("backbone.")}
        timm = {kept + rest: ours[name] for name, rest in names.items()}
        counters = {kept + "bn1.num_batches_tracked": torch.tensor(7)}
        return others | timm | counters

    theirs.changed(tmp_path, as_timm, backbone_config=None, use_timm_backbone=True, backbone="resnet50", dilation=True)
    demand_equal(tmp_path, model)
    config = from_dict(load_checkpoint(tmp_path)["config"])
    assert config.model.backbone.depth == 50 and config.model.backbone.dilation
    as_now = {"model_type": "timm_backbone", "backbone": "resnet50.tv_in1k", "output_stride": 16, "out_indices": [4]}
    theirs.changed(tmp_path, backbone_config=as_now, dilation=False)
    assert from_dict(load_checkpoint(tmp_path)["config"]) == config


@pytest.mark.parametrize(
    ("settings", "model"),
    [
        ({"num_feature_levels": 1, "backbone": "resnet101"}, (101, (4,))),
        ({"num_feature_levels": 4}, (50, (2, 3, 4))),
        ({"num_feature_levels": 4, "backbone": "resnet18.a1_in1k"}, (18, (2, 3, 4))),
    ],
)
def test_timm_backbones_that_old_files_only_name(settings, model):
    from dndetr.hf.detector_config import from_transformers

    config, classes = from_transformers({"model_type": "deformable_detr", "num_labels": 3, **settings}, {})
    assert (config.model.backbone.depth, config.model.backbone.outputs) == model
    assert (config.preset, config.denoising.groups, len(classes)) == ("dn-deformable-detr-r50", 0, 3)


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
    with pytest.raises(OSError, match=r"no folder somebody/dab-detr, the hub cannot be reached.*config\.json"):
        load("somebody/dab-detr", "cpu")
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match="pip install huggingface_hub"):
        load("somebody/dab-detr", "cpu")


@pytest.mark.parametrize("name", ["runs/small-1", "a.pt", "owner/model.safetensors", "a/b/c", "/a/b", "plain", "../x"])
def test_what_is_no_name_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert not hub.is_hub_name(name)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(name)


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if name not in key}


def with_tensor(name, value):
    return lambda tensors: tensors | {name: value if isinstance(value, torch.Tensor) else value(tensors[name])}


@pytest.mark.parametrize(
    ("weights", "config", "told"),
    [
        (
            without("layers.1.cross_attn.cross_attn_value_proj.bias"),
            {},
            "weights lack model.decoder.layers.1.cross_attn",
        ),
        (without("layers.0.self_attn.k_proj.weight"), {}, "lack a part of encoder.layers.0.self_attn.q, k and v_proj"),
        (
            without("stages.2.layers.0.layer.1.convolution"),
            {},
            r"weights lack model\.backbone\.conv_encoder\.model\.enc",
        ),
        (without("bbox_predictor"), {}, "weights lack bbox_predictor.layers.0.weight"),
        (with_tensor("model.decoder.layers.7.x", torch.ones(1)), {}, "config.json does not speak"),
        (
            with_tensor("model.decoder.layernorm.bias", torch.ones(9)),
            {},
            "layernorm.bias is 9, and 32 by its config.json",
        ),
        (
            with_tensor("model.decoder.layernorm.bias", lambda x: x * torch.nan),
            {},
            "layernorm.bias has NaN or infinite",
        ),
        (with_tensor("model.decoder.bbox_embed.layers.0.bias", torch.ones(32)), {}, "under the head's other name"),
        (dict, {"decoder_layers": 2}, "model.decoder.layers.2.*its config.json does not speak"),
        (dict, {"hidden_size": 64}, "is .* by its config.json"),
        (dict, {"id2label": {"0": "cat", "1": "dog"}}, "id2label has 2 classes, and class_embed.weight 5 rows"),
        (dict, {"id2label": {"1": "cat", "2": "dog"}}, "id2label has the rows 1, 2: they count from 0"),
        (dict, {"keep_query_pos": True}, r"keep_query_pos true has no counterpart here \(only false\)"),
        (dict, {"normalize_before": True}, "normalize_before true"),
        (dict, {"sine_position_embedding_scale": 3.0}, "sine_position_embedding_scale 3.0"),
        (dict, {"activation_function": "silu"}, "activation_function silu has no counterpart"),
        (dict, {"decoder_ffn_dim": 64}, "encoder_ffn_dim 48 and decoder_ffn_dim 64: here both are the same"),
        (dict, {"decoder_attention_heads": 8}, "encoder_attention_heads 4 and decoder_attention_heads 8"),
        (dict, {"hidden_size": 36, "decoder_attention_heads": 8, "encoder_attention_heads": 8}, "width 36"),
        (dict, {"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet50d"}}, "timm's resnet50d"),
        (
            dict,
            {"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet18", "output_stride": 16}},
            "dilates resnet18 in another way",
        ),
        (dict, {"model_type": "conditional_detr"}, r"of the kind conditional_detr.*dndetr\.denoise\(model\) trains it"),
        (dict, {"model_type": "rt_detr"}, r"of the kind rt_detr.*dndetr\.accelerate\(model\)"),
        (dict, {"model_type": "detr"}, "of the kind detr, and of transformers dab-detr and deformable_detr"),
        (dict, {"model_type": "llama"}, "of the kind llama"),
        (dict, {"model_type": "swin"}, "backbones go with --model.backbone.kind transformers"),
    ],
)
def test_files_that_do_not_fit_are_told_in_one_line(weights, config, told, copied):
    path, _ = copied("dab")
    theirs.changed(path, weights, **config)
    with pytest.raises(ValueError, match=told) as error:
        load(path, "cpu")
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"config.json": "{"}, "config.json cannot be read as JSON"),
        ({"config.json": "[1]"}, "no checkpoint at"),
        ({"preprocessor_config.json": "nothing"}, "preprocessor_config.json cannot be read as JSON"),
        ({"preprocessor_config.json": '{"resample": 3}'}, "resample 3 has no counterpart"),
        ({"preprocessor_config.json": '{"size": {"max_height": 9, "max_width": 9}}'}, "size .* has no counterpart"),
        ({"model.safetensors": None}, "has config.json, but no weights: model.safetensors or pytorch_model.bin"),
        ({"model.safetensors": b"nonsense"}, "cannot be read"),
        (
            {"model.safetensors": None, "model.safetensors.index.json": '{"weight_map": {"a": "b.safetensors"}}'},
            "names b.safetensors, which is not in its folder",
        ),
        (
            {"model.safetensors": None, "model.safetensors.index.json": '{"weight_map": {"a": "../b.safetensors"}}'},
            "names ../b.safetensors, which is not in its folder",
        ),
        ({"model.safetensors": None, "model.safetensors.index.json": "{}"}, "has no weight_map"),
    ],
)
def test_broken_and_missing_files_are_told_in_one_line(files, told, copied):
    path, _ = copied("dab")
    for name, content in files.items():
        if content is None:
            (path / name).unlink()
        else:
            (path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises((ValueError, FileNotFoundError), match=told) as error:
        load(path, "cpu")
    assert "\n" not in str(error.value)


class Runs:
    def __reduce__(self):
        return print, ("it ran",)


def test_pickled_code_does_not_run(copied, capsys):
    path, _ = copied("dab")
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    torch.save({"weights": tensors, "more": Runs()}, path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="without running its code"):
        load(path, "cpu")
    assert "it ran" not in capsys.readouterr().out


def test_runs_and_plain_files_are_not_taken_for_theirs(tmp_path):
    (tmp_path / "config.json").write_text('{"preset": "tiny"}')
    (tmp_path / "weights.pt").touch()
    assert not is_of_transformers(tmp_path) and not is_of_transformers(tmp_path / "weights.pt")
