"""What a backbone's name means: short names, folders, the hub; and what is wrong with it, in one line."""

import json
import sys
from dataclasses import replace

import backbones
import pytest

from dndetr import train
from dndetr.config import Config, ImagesConfig
from dndetr.model_config import BackboneConfig, ModelConfig
from dndetr.published_backbones import (
    HUB_IDS,
    published_colours,
    published_folder,
    published_settings,
    with_published_backbone,
)
from dndetr.transformers_installed import require_transformers


def config_of(name="", **changes):
    backbone = BackboneConfig(kind="transformers", name=str(name), **changes)
    return replace(Config(data="shapes"), model=replace(ModelConfig(), backbone=backbone))


@pytest.fixture
def folder(tmp_path):
    """A folder with a configuration, as far as a name needs one."""
    pytest.importorskip("transformers", reason='transformers is not installed (pip install -e ".[hf]")')
    place = tmp_path / "swin"
    place.mkdir()
    values = {"model_type": "swin", **backbones.SETTINGS["swin"], "id2label": {"0": "cat"}, "drop_path_rate": 0.3}
    (place / "config.json").write_text(json.dumps(values))
    return place


def test_a_folder_fills_in_the_settings(folder):
    config, where, lines = with_published_backbone(config_of(folder), set())
    settings = json.loads(config.model.backbone.settings)
    assert (where, lines) == (folder, [])
    assert settings["model_type"] == "swin" and settings["embed_dim"] == 8 and settings["drop_path_rate"] == 0.3
    assert settings["mlp_ratio"] == 4.0  # what the file leaves to transformers' own defaults is said, too
    assert not settings.keys() & {"id2label", "architectures", "out_indices", "dtype"}
    assert config == replace(config_of(folder), model=config.model)


def test_our_resnet_is_left_alone():
    config = Config()
    assert with_published_backbone(config, {"model.backbone.depth"}) == (config, None, [])


COLOURS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1]}


def test_colours_are_those_that_it_was_trained_with(folder):
    (folder / "preprocessor_config.json").write_text(json.dumps(COLOURS))
    config, _, (line,) = with_published_backbone(config_of(folder), set())
    assert (config.images.mean, config.images.std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    assert line.endswith("--images.mean 0.5 0.4 0.3 --images.std 0.2 0.2 0.1, and so is this run")


@pytest.mark.parametrize("given", ["images.mean", "images.std"])
def test_colours_that_are_given_win(folder, given):
    (folder / "preprocessor_config.json").write_text(json.dumps(COLOURS))
    config, _, lines = with_published_backbone(config_of(folder), {given})
    assert config.images == ImagesConfig() and len(lines) == 1 and lines[0].endswith("those that are given")


@pytest.mark.parametrize("content", [{}, {**COLOURS, "do_normalize": False}, [], None])
def test_preprocessors_without_colours(folder, content):
    if content is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(content))
    assert published_colours(folder) is None


@pytest.mark.parametrize(
    "wrong",
    [{"image_mean": [0.5, 0.5]}, {"image_std": [0.2, 0.2, 0]}, {"image_mean": "x"}, {"image_std": None}],
)
def test_colours_that_are_none(folder, wrong):
    (folder / "preprocessor_config.json").write_text(json.dumps({**COLOURS, **wrong}))
    with pytest.raises(ValueError, match=r"preprocessor_config.json: image_(mean|std) is .*, not three numbers"):
        published_colours(folder)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "config.json is no JSON"),
        ("[]", "config.json names no model_type"),
        ('{"hidden_size": 3}', "config.json names no model_type"),
        ('{"model_type": "llama"}', "llama is no backbone, such as one of swin-tiny"),
        ('{"model_type": "detr", "backbone_config": {}}', "detr is a detector; take its backbone alone"),
        (
            '{"model_type": "timm_backbone", "backbone": "resnet18"}',
            "this backbone is timm's .*; take one of transformers",
        ),
        ('{"model_type": "swin", "embed_dim": "wide"}', "no swin is like this"),
    ],
)
def test_configurations_of_something_else(folder, content, told):
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=told) as error:
        published_settings(folder)
    assert "\n" not in str(error.value)


def test_a_folder_without_configuration(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config.json: give a folder that save_pretrained"):
        published_folder(str(tmp_path))


@pytest.mark.parametrize("name", ["swin-huge", "./nowhere", "/nowhere/at/all", "a/b/c", "file.pt"])
def test_unknown_names_are_told_what_there_is(name):
    with pytest.raises(ValueError, match=r"give one of swin-tiny, .*; or any hub id, .*; or a folder with config.json"):
        published_folder(name)


class Hub:
    """Stands in for huggingface_hub: answers as it does, into a folder, and keeps what it was asked for."""

    def __init__(self, monkeypatch, folder, files=(), error=None):
        self.asked, self.folder, self.files, self.error = [], folder, files, error
        hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
        monkeypatch.setattr(hub, "snapshot_download", self)

    def __call__(self, hub_id, allow_patterns):
        self.asked.append((hub_id, allow_patterns))
        if self.error is not None:
            raise self.error
        for name in self.files:
            if any(name.startswith(pattern.partition("*")[0]) for pattern in allow_patterns):
                (self.folder / name).write_text("{}")
        return str(self.folder)


@pytest.mark.parametrize("name", ["swin-tiny", "somebody/swin.of-theirs_2"])
def test_names_are_fetched(monkeypatch, tmp_path, name):
    hub = Hub(monkeypatch, tmp_path, ["config.json", "preprocessor_config.json", "model.safetensors"])
    assert published_folder(name) == tmp_path
    assert [hub_id for hub_id, _ in hub.asked] == [HUB_IDS.get(name, name)]


def test_pickles_are_fetched_where_there_is_nothing_better(monkeypatch, tmp_path):
    hub = Hub(monkeypatch, tmp_path, ["config.json", "pytorch_model.bin"])
    assert published_folder("swin-tiny") == tmp_path
    first, second = (patterns for _, patterns in hub.asked)
    assert "model*.safetensors" in first and "pytorch_model*.bin" in second


def _hub_error(kind: str):
    from huggingface_hub import errors

    error = getattr(errors, kind)
    return error.__new__(error)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("GatedRepoError", "given to those who have accepted its licence .*DINOv3.* then type hf auth login; or fetch"),
        ("RepositoryNotFoundError", "the hub has no such model"),
        ("LocalEntryNotFoundError", "the hub cannot be reached, and it was not fetched before: fetch config.json"),
        ("OfflineModeIsEnabled", "could not be fetched"),
    ],
)
def test_what_the_hub_refuses_is_one_line(monkeypatch, tmp_path, kind, told):
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    Hub(monkeypatch, tmp_path, error=_hub_error(kind))
    with pytest.raises((OSError, ValueError), match=told) as error:
        published_folder("dinov3-vits16")
    assert str(error.value).startswith(HUB_IDS["dinov3-vits16"]) and "\n" not in str(error.value)


def test_what_is_on_the_hub_need_not_be_a_model_of_transformers(monkeypatch, tmp_path):
    Hub(monkeypatch, tmp_path, ["model.safetensors"])
    with pytest.raises(OSError, match=r"somebody/something has no config.json, so it is no model of transformers"):
        published_folder("somebody/something")


def test_without_the_library_of_the_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install huggingface_hub; or fetch .* and give their folder"):
        published_folder("swin-tiny")


def test_without_transformers(monkeypatch, folder):
    def missing(feature):
        raise ImportError(f"{feature} needs transformers, which is not installed: pip install")

    monkeypatch.setattr("dndetr.published_backbones.require_transformers", missing)
    with pytest.raises(ImportError, match=r"--model.backbone.kind transformers needs transformers, .*: pip install"):
        with_published_backbone(config_of(folder), set())
    assert require_transformers is not missing


def test_settings_of_our_resnet_are_no_settings_of_it(folder):
    given = {"model.backbone.depth", "model.backbone.stem", "model.backbone.norm", "model.backbone.planes"}
    told = r"--model.backbone.depth, --model.backbone.stem: these describe our ResNet; leave them out with --model"
    with pytest.raises(ValueError, match=told):
        with_published_backbone(config_of(folder, depth=18, stem="small"), given)
    with_published_backbone(config_of(folder, depth=18), set())  # a preset's


def test_flags_are_errors_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--model.backbone.kind", "transformers", "--model.backbone.name", "swin-huge"]
    assert train.main(flags) == 1
    assert capsys.readouterr().err.startswith("error: --model.backbone.name swin-huge: give one of swin-tiny")
    assert not list(tmp_path.iterdir())
