"""Weights of published backbones: all of them arrive, from every kind of file, or none and one line says why."""

import json

import backbones
import pytest
import torch

from dndetr.models.build import build_backbone
from dndetr.models.weights.published import load_published
from dndetr.published_backbones import published_settings

pytest.importorskip("transformers", reason='transformers is not installed (pip install -e ".[hf]")')


def loaded(folder, kind: str, **changes):
    """Ours with the weights of a folder."""
    torch.manual_seed(1)
    config = backbones.backbone(kind, **{"settings": published_settings(folder)} | changes)
    backbone = build_backbone(config)
    return backbone, load_published(backbone, folder)


def maps_of(folder, kind: str, **changes):
    """What transformers itself makes of an image with this folder's backbone."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

    config = CONFIG_MAPPING[kind].from_pretrained(folder, **changes)
    model = MODEL_FOR_BACKBONE_MAPPING[type(config)].from_pretrained(folder, config=config).eval()
    with torch.no_grad():
        return model(image()).feature_maps


def image():
    return torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", backbones.SETTINGS)
def test_a_whole_model_gives_its_backbone(tmp_path, kind):
    """With the names that its class gives it: a prefix, a head beside it."""
    folder = backbones.published(kind, tmp_path)
    outputs = (4,) if kind in backbones.PLAIN else (2, 4)
    backbone, text = loaded(folder, kind, outputs=outputs)
    stages = {} if kind in backbones.PLAIN else {"out_features": ["stage2", "stage4"]}
    with torch.no_grad():
        found = backbone.eval()(image())
    assert all(map(torch.equal, found, maps_of(folder, kind, **stages)))
    assert f" tensors of {folder}" in text
    assert ("new: the norms of its maps" in text) == (kind in ("swin", "convnext", "convnextv2"))


def test_a_cut_backbone_takes_its_part(tmp_path):
    folder = backbones.published("swin", tmp_path)
    backbone, _ = loaded(folder, "swin", outputs=(2,))
    with torch.no_grad():
        (found,) = backbone.eval()(image())
    assert torch.equal(found, maps_of(folder, "swin", out_features=["stage2"])[0])


@pytest.fixture
def swin(tmp_path):
    return backbones.published("swin", tmp_path / "swin")


def weights_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("form", ["shards", "bin", "sharded-bin"])
def test_other_forms_of_the_same_weights(swin, form):
    expected = loaded(swin, "swin")[0].state_dict()
    weights = weights_of(swin)
    (swin / "model.safetensors").unlink()
    parts = [dict(list(weights.items())[start::2]) for start in (0, 1)]
    if form == "bin":
        torch.save(weights, swin / "pytorch_model.bin")
    else:
        from safetensors.torch import save_file

        stem, suffix = ("model", "safetensors") if form == "shards" else ("pytorch_model", "bin")
        names = [f"{stem}-0000{number}-of-00002.{suffix}" for number in (1, 2)]
        for name, part in zip(names, parts, strict=True):
            if form == "shards":
                save_file(part, swin / name, metadata={"format": "pt"})
            else:
                torch.save(part, swin / name)
        places = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        index = {"metadata": {"total_size": 0}, "weight_map": places}
        (swin / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    found = loaded(swin, "swin")[0].state_dict()
    assert all(torch.equal(expected[name], value) for name, value in found.items())


def change(swin, edit):
    from safetensors.torch import save_file

    save_file(edit(weights_of(swin)), swin / "model.safetensors", metadata={"format": "pt"})


class _Code:
    def __reduce__(self):
        return print, ("code ran",)


def _with_code(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"swin.layernorm.weight": _Code()}, folder / "pytorch_model.bin")


def _index(folder, content):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (
            lambda f: (f / "model.safetensors").unlink(),
            "has a config.json but no weights: put model.safetensors beside",
        ),
        (lambda f: (f / "model.safetensors").write_bytes(b"cut"), "its weights cannot be read"),
        (_with_code, "holds more than tensors, which would be code to run: .* save it anew"),
        (lambda f: change(f, lambda w: {k: v for k, v in w.items() if "blocks.0" not in k}), "blocks.0"),
        (
            lambda f: change(
                f, lambda w: {k: v[:3] if "patch_embeddings.projection.bias" in k else v for k, v in w.items()}
            ),
            "patch_embeddings.projection.bias are of another shape in its weights",
        ),
        (
            lambda f: change(f, lambda w: {f"other.{k}x": v for k, v in w.items()}),
            "are of another model than config.json",
        ),
        (
            lambda f: _index(f, json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})),
            "index.json names model-1.safetensors, model-2.safetensors, which is not there",
        ),
        (lambda f: _index(f, "{"), "index.json is no JSON"),
        (lambda f: _index(f, "[]"), "names no files"),
    ],
    ids=["none", "damaged", "code", "missing", "shape", "other-model", "missing-shard", "index", "empty-index"],
)
def test_anything_less_is_one_line_and_changes_nothing(swin, capsys, spoil, told):
    backbone = build_backbone(backbones.backbone("swin"))
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    spoil(swin)
    with pytest.raises((ValueError, FileNotFoundError), match=told) as error:
        load_published(backbone, swin)
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())
    assert capsys.readouterr().out == ""
