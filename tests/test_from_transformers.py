"""Training, and every other command, from a detector of transformers: its model, images and classes, what is said."""

import json
from dataclasses import replace

import pytest
import torch
import transformers_detectors as theirs
from short_runs import without_pictures, write_pictures

import dndetr
from dndetr import evaluate, export, health, predict, train
from dndetr.config import from_dict
from dndetr.hf import detector_config
from dndetr.runs.checkpoint import load_checkpoint

_FEW = ["--epochs", "1", "--batch-size", "4", "--lr", "1e-20", "--workers", "0"]
_NAMES = {"0": "N/A", "1": "dust", "2": "cell", "3": "dog", "4": "N/A"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "data")  # cell 3, dust 7, hair 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A DAB-DETR and a Deformable DETR with names for their rows, and a canvas of its own."""
    found = {}
    for name in ("dab", "deformable-two-stage"):
        found[name] = tmp_path_factory.mktemp(name) / "detector"
        theirs.VARIANTS[name]().save_pretrained(found[name])
        theirs.changed(found[name], id2label=_NAMES)
        processor = {"size": {"height": 64, "width": 96}, "image_mean": [0.5, 0.4, 0.3]}
        (found[name] / "preprocessor_config.json").write_text(json.dumps(processor))
    return found


@pytest.fixture
def trained(folders, pictures, tmp_path, capsys):
    """What a run from a detector's folder saves, and what it says."""

    def run(name, *flags):
        arguments = [*_FEW, "--data", str(pictures), "--init", str(folders[name]), "--output", str(tmp_path / "run")]
        with without_pictures():
            status = train.main([*arguments, *flags])
        out, err = capsys.readouterr()
        return (load_checkpoint(tmp_path / "run"), out) if status == 0 else (None, err)

    return run


@pytest.mark.parametrize("name", ["dab", "deformable-two-stage"])
def test_without_preset_the_model_and_images_are_the_files(name, folders, trained):
    saved, told = trained(name)
    given = load_checkpoint(folders[name])
    config, own = from_dict(saved["config"]), from_dict(given["config"])
    assert (config.model, config.images) == (own.model, own.images)
    assert config.images.canvas == (64, 96) and config.images.mean == (0.5, 0.4, 0.3)
    assert config.denoising.groups == 5 and config.preset in ("dn-detr-r50", "deformable-detr-r50")
    assert f"the model is the file's, trained as --preset {config.preset} trains" in told
    assert "embeddings of noised labels are made anew" in told and "classes made anew: hair" in told
    # Only what no class and no noise has is new; with next to no learning rate all else is as it was.
    new = {"queries.label_enc.weight", "queries.position_head"}
    for key, value in given["model"].items():
        if "class_embed" in key and not key.startswith("proposals."):
            assert saved["model"][key][:2].allclose(value[[2, 1]], rtol=0, atol=1e-12), key
        elif not key.startswith(tuple(new)) and "class_embed" not in key:
            assert saved["model"][key].allclose(value, rtol=0, atol=1e-12), key
    label_table = saved["model"]["queries.label_enc.weight"]
    assert label_table[:-1].std() > 0.5 and (name != "dab" or label_table[-1].abs().max() < 1e-12)


def test_flags_change_what_is_asked_for(trained):
    saved, told = trained("dab", "--model.queries", "9", "--denoising.groups", "2", "--images.canvas", "32", "48")
    config = from_dict(saved["config"])
    assert (config.model.queries, config.denoising.groups, config.images.canvas) == (9, 2, (32, 48))
    assert "re-made 1: queries.refpoint_embed.weight (7x4 there, 9x4 here)" in told
    assert "model.queries 7 there, 9 here" in told


def test_a_preset_of_another_model_is_said_to_be_one(trained):
    other = ["--preset", "dn-detr-r50", "--model.width", "32", "--model.heads", "4", "--model.hidden", "48"]
    backbone = ["--model.backbone.blocks", *"1211", "--model.backbone.planes", "16", "24", "32", "40"]
    backbone += ["--images.recipe", "fixed", "--images.canvas", "64", "96"]
    layers = ["--model.encoder-layers", "2", "--model.decoder-layers", "2", "--model.queries", "7"]
    saved, told = trained("dab", *other, *layers, *backbone, "--model.backbone.bottleneck", "False")
    assert from_dict(saved["config"]).model.decoder_layers == 2
    assert "model.decoder_layers 3 there, 2 here" in told and "without --preset, and these flags, it is" in told


def test_a_preset_of_another_backbone_is_an_error(trained):
    saved, told = trained("dab", "--preset", "dn-detr-r50")
    assert saved is None and "its backbone does not fit" in told and told.count("\n") == 1


def test_fit_and_overfit_take_it_too(folders, pictures, tmp_path):
    settings = {"epochs": 1, "batch_size": 4, "workers": 0, "quiet": True, "output": tmp_path / "run"}
    with without_pictures():
        run = dndetr.fit(pictures, init=folders["dab"], lr=1e-20, **settings)
    assert run.config.model == from_dict(load_checkpoint(folders["dab"])["config"]).model
    settings = {"init": str(folders["dab"]), "data": "shapes", "overfit": 3}
    assert train.parse([f"--{name}={value}" for name, value in settings.items()]).model == run.config.model


def test_data_are_asked_for(folders, capsys):
    assert train.main(["--init", str(folders["dab"])]) == 1
    assert f"--init {folders['dab']} needs data: --data DIR" in capsys.readouterr().err


def test_broken_files_are_told_before_anything_is_written(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "yolos"}')
    assert train.main(["--init", "broken", "--data", "shapes"]) == 1
    assert "broken is a model of the kind yolos" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_the_other_commands_take_it(folders, pictures, tmp_path, capsys):
    """Those that evaluate look its classes up by name."""
    path = folders["dab"]
    cells = write_pictures(tmp_path / "cells", classes=((3, "cell"), (7, "dust")))
    assert evaluate.main([str(path), "--data", str(cells), "--output", str(tmp_path / "evaluated")]) == 0
    assert json.loads((tmp_path / "evaluated" / "metrics.json").read_text())["classes"].keys() == {"cell", "dust"}
    photos = str(pictures / "val")
    assert predict.main([str(path / "model.safetensors"), photos, "--output", str(tmp_path / "predicted")]) == 0
    for command in (evaluate, health):
        capsys.readouterr()
        assert command.main([str(path)]) == 1
        error = capsys.readouterr().err
        assert f"{path} needs data: --data DIR" in error and error.count("\n") == 1


def test_health_knows_classes_by_their_names(pictures, tmp_path, monkeypatch, capsys):
    """Their numbers are rows there, and category ids in the data."""
    recipe = replace(detector_config.dn_detr_r50(), batch_size=4)  # there are few pictures
    monkeypatch.setattr(detector_config, "dn_detr_r50", lambda: recipe)
    for names, status in ((("cell", "dust", "hair"), 0), (("dust", "cell", "hair"), 1)):
        folder = tmp_path / names[0]
        theirs.dab(num_labels=3).save_pretrained(folder)
        theirs.changed(folder, id2label={str(row): name for row, name in enumerate(names)})
        (folder / "preprocessor_config.json").write_text('{"size": {"height": 64, "width": 96}}')
        arguments = [
            "--data",
            str(pictures),
            "--steps",
            "0",
            "--workers",
            "0",
            "--output",
            str(tmp_path / f"of-{names[0]}"),
        ]
        assert health.main([str(folder), *arguments]) == status
    assert "are not those that" in capsys.readouterr().err


@pytest.mark.slow
def test_it_is_exported_too(folders, pictures, tmp_path, capsys):
    photo = ["--image", str(pictures / "val" / "0.jpg")]
    assert export.main([str(folders["dab"]), "--output", str(tmp_path / "model.pt2"), *photo]) == 0
    assert "the same as the model" in capsys.readouterr().out


def test_rows_without_names_are_taken_in_their_order(tmp_path, capsys):
    theirs.dab(num_labels=3).save_pretrained(tmp_path / "detector")
    data = write_pictures(tmp_path / "data")
    (tmp_path / "detector" / "preprocessor_config.json").write_text('{"size": {"height": 64, "width": 96}}')
    with without_pictures():
        assert (
            train.main(
                [*_FEW, "--data", str(data), "--init", str(tmp_path / "detector"), "--output", str(tmp_path / "run")]
            )
            == 0
        )
    assert "its classes have no names, so they are taken in their order" in capsys.readouterr().out
    given, saved = (load_checkpoint(tmp_path / name)["model"] for name in ("detector", "run"))
    assert saved["decoder.class_embed.weight"].allclose(given["decoder.class_embed.weight"], rtol=0, atol=1e-12)


def test_a_resnets_folder_gives_a_backbone(tmp_path, capsys):
    config = theirs.resnet(kind="bottleneck")
    torch.manual_seed(0)
    theirs.randomised(theirs.transformers.ResNetForImageClassification(config)).save_pretrained(tmp_path / "resnet")
    weights = load_checkpoint(tmp_path / "resnet", needs=())
    assert "resnet.embedder.embedder.convolution.weight" in weights
    theirs.changed(tmp_path / "resnet", downsample_in_bottleneck=True)
    with pytest.raises(ValueError, match="downsample_in_bottleneck true has no counterpart"):
        load_checkpoint(tmp_path / "resnet", needs=())


def test_a_hub_name_is_remembered_as_one(folders, pictures, tmp_path, monkeypatch, capsys):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(folders["dab"]))
    with without_pictures():
        assert train.main([*_FEW, "--data", str(pictures), "--init", "owner/detector", "--output", "run"]) == 0
    assert "--init owner/detector: the model is the file's" in capsys.readouterr().out
    assert load_checkpoint("run")["config"]["init"] == "owner/detector"
    cells = write_pictures(tmp_path / "cells", classes=((3, "cell"), (7, "dust")))
    assert evaluate.main(["owner/detector", "--data", str(cells)]) == 0
    assert (tmp_path / "runs" / "detector-val-1" / "metrics.json").exists() and not (tmp_path / "owner").exists()
