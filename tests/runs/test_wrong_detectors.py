"""Folders of transformers that are no detectors of a kind that is read, or not whole: one line for each."""

import pytest
import torch
import transformers_detectors as theirs
from safetensors.torch import load_file

from dndetr.detector import load
from dndetr.hub import is_of_transformers


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
        (dict, {"model_type": "swin"}, "other backbones go with --model.backbone.kind transformers"),
    ],
)
def test_files_that_do_not_fit_are_told_in_one_line(weights, config, told, copied):
    path, _ = copied("dab")
    theirs.changed(path, weights, **config)
    with pytest.raises(ValueError, match=told) as error:
        load(path, "cpu")
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["dndetr.safetensors", "training_args.bin"])
def test_files_of_other_content_in_such_a_folder_are_told(name, copied):
    path, _ = copied("dab")
    torch.save({"model": {"a": torch.ones(1)}, "epoch": 3}, path / name)
    with pytest.raises(
        ValueError, match="has a dict under 'model', where transformers has tensors alone: give"
    ) as error:
        load(path / name, "cpu")
    assert "\n" not in str(error.value)


def test_what_is_missing_of_such_backbones_is_told(copied):
    path, _ = copied("deformable-swin")
    theirs.changed(path, without("layers.2.blocks.1.layernorm_after.bias"))
    with pytest.raises(ValueError, match=r"weights lack .*layers\.2\.blocks\.1\.layernorm_after\.bias"):
        load(path, "cpu")


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
