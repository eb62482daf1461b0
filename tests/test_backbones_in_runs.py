"""Runs on published backbones: trained, resumed, evaluated, exported; the folder of the run is all that is needed."""

import json
import shutil

import backbones
import numpy as np
import pytest
import torch
from PIL import Image
from short_runs import short_run

import dndetr
from dndetr import evaluate, export, health, predict, profile, train
from dndetr.data.sample import colour_map

pytest.importorskip("transformers", reason='transformers is not installed (pip install -e ".[hf]")')

SMALL = ["--model.width", "32", "--model.heads", "4", "--model.hidden", "32", "--model.decoder-layers", "2"]
COLOURS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3]}


def flags_for(folder, *more: str) -> list[str]:
    return [*SMALL, "--model.backbone.kind", "transformers", "--model.backbone.name", str(folder), *more]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Swin with colours of its own and a ConvNeXt V2, as the hub has them."""
    place = tmp_path_factory.mktemp("published")
    found = {kind: backbones.published(kind, place / kind) for kind in ("swin", "convnextv2", "dinov2")}
    (found["swin"] / "preprocessor_config.json").write_text(json.dumps(COLOURS))
    return found


@pytest.fixture(scope="module")
def runs(folders, tmp_path_factory):
    """Runs of two steps, whose backbones' folders are then gone."""
    place = tmp_path_factory.mktemp("runs")
    done = {}
    for kind in ("swin", "convnextv2"):
        copied = shutil.copytree(folders[kind], place / f"{kind}-published")
        done[kind] = short_run(place / kind, *flags_for(copied, "--model.backbone.frozen", "1"))
        shutil.rmtree(copied)
    return done


both = pytest.mark.parametrize("kind", ["swin", "convnextv2"])


@both
def test_weights_are_the_published_ones(folders, runs, kind):
    from safetensors.torch import load_file

    published = load_file(folders[kind] / "model.safetensors")
    weights = torch.load(runs[kind] / "checkpoint.pt", weights_only=True)["model"]
    frozen = next(name for name in published if "patch_embeddings" in name and name.endswith("bias"))
    ours = next(name for name in weights if name.endswith(frozen.partition("embeddings.")[2]) and "patch" in name)
    assert torch.equal(weights[ours], published[frozen])


@both
def test_the_run_is_read_without_the_folder(runs, kind, tmp_path):
    run = runs[kind]
    settings = json.loads((run / "config.json").read_text())["model"]["backbone"]["settings"]
    assert json.loads(settings)["model_type"] == kind
    detector = dndetr.load(run, "cpu")
    (prediction,) = detector.predict(np.full((90, 140, 3), 77, np.uint8), threshold=0.0)
    assert len(prediction.scores) and prediction.scores.isfinite().all()
    evaluate.main([str(run), "--output", str(tmp_path / "scores")])
    scores = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert scores["AP"] == [row["AP"] for row in rows if row["event"] == "eval"][-1]
    picture = tmp_path / "photo.png"
    Image.fromarray(np.full((90, 140, 3), 77, np.uint8)).save(picture)
    assert predict.main([str(run), str(picture), "--output", str(tmp_path / "found")]) == 0
    assert health.main([str(run), "--leak-check"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "suffix"), [("swin", ".onnx"), ("convnextv2", ".pt2")])
def test_it_exports(runs, kind, suffix, tmp_path, capsys):
    if suffix == ".onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(name, reason='pip install -e ".[onnx]"')
    assert export.main([str(runs[kind]), "--output", str(tmp_path / f"model{suffix}")]) == 0
    assert "the same as the model" in capsys.readouterr().out
    assert (tmp_path / f"model{suffix}").stat().st_size > 0


def test_export_asks_for_canvases_that_fit(runs, tmp_path, capsys):
    flags = [str(runs["swin"]), "--output", str(tmp_path / "model.pt2"), "--canvas", "130", "130"]
    assert export.main(flags) == 1
    assert "--canvas" in capsys.readouterr().err


def test_colours_go_all_the_way(runs):
    config = dndetr.load(runs["swin"], "cpu").config
    assert (config.images.mean, config.images.std) == ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    detector, seen = dndetr.load(runs["swin"], "cpu"), []
    detector.infer = lambda batch: seen.append(batch) or type(detector).infer(detector, batch)
    detector.predict(np.full((90, 140, 3), 77, np.uint8))
    assert torch.equal(seen[0].colours[0], colour_map(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3)))
    assert export.describe(detector, (128, 128))["mean"] == [0.5, 0.4, 0.3]


@both
def test_a_resumed_run_ends_as_one_that_was_not_stopped(folders, tmp_path, no_pictures, kind):
    copied = shutil.copytree(folders[kind], tmp_path / "published")
    few = ["--epochs", "2", "--batch-size", "4", "--train-images", "12", "--val-images", "4", "--quiet"]
    flags = flags_for(copied, *few)
    train.run([*flags, "--output", str(tmp_path / "whole")])

    class Stopper(dndetr.Listener):
        def run_started(self, run):
            self._run = run

        def step_ended(self, step, images, waited):
            if step == 4:
                self._run.stop()

    with pytest.raises(SystemExit):
        train.run([*flags, "--output", str(tmp_path / "halves")], [Stopper()])
    shutil.rmtree(copied)
    train.run(["--resume", str(tmp_path / "halves")])
    ends = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "halves")]
    assert ends[0]["step"] == ends[1]["step"] == 6
    assert all(torch.equal(value, ends[1]["model"][name]) for name, value in ends[0]["model"].items())


def test_init_goes_over_it(runs, folders, tmp_path, no_pictures, capsys):
    weights = dndetr.load(runs["swin"], "cpu").model.state_dict()  # the moving average
    again = short_run(
        tmp_path / "again",
        *flags_for(folders["swin"], "--init", str(runs["swin"]), "--lr", "1e-30", "--model.backbone.frozen", "1"),
    )
    found = torch.load(again / "checkpoint.pt", weights_only=True)["model"]
    assert found.keys() == weights.keys()
    name = next(name for name in found if name.endswith("fc1.weight") and name.startswith("backbone."))
    torch.testing.assert_close(found[name], weights[name], rtol=1e-6, atol=1e-7)
    flags = flags_for(folders["convnextv2"], "--init", str(runs["swin"]), "--output", str(tmp_path / "none"))
    assert train.main(flags) == 1
    assert "the model's is of transformers: give a checkpoint of a detector with one like it" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_nothing_is_written_where_something_is_missing(folders, tmp_path, missing, capsys):
    copied = shutil.copytree(folders["convnextv2"], tmp_path / "published")
    (copied / missing).unlink()
    assert train.main(flags_for(copied, "--output", str(tmp_path / "run"), "--train-images", "16")) == 1
    assert str(copied) in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_images_that_do_not_fit_are_told_before_anything_is_written(tmp_path, capsys):
    folder = backbones.published("dinov2", tmp_path / "dinov2", patch_size=14, image_size=28)
    for batch in ("4", "auto"):
        flags = flags_for(folder, "--output", str(tmp_path / "run"), "--train-images", "16", "--batch-size", batch)
        assert train.main(flags) == 1
        assert "--data shapes: these images are 128x128, and this backbone needs" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_pretrained_backbone_is_not_called_untrained(folders, tmp_path, no_pictures, capsys):
    flags = flags_for(folders["convnextv2"], "--model.backbone.norm", "frozen", "--output", str(tmp_path / "run"))
    train.run([*flags, "--epochs", "1", "--train-images", "16", "--val-images", "2"])
    out = capsys.readouterr().out
    assert "training from scratch" not in out and "tensors of" in out


@pytest.mark.parametrize("kind", ["swin", "dinov2"])
def test_a_step_is_counted(folders, kind):
    flags = flags_for(folders[kind], "--batch-size", "2", "--train-images", "16")
    text = profile.profile(["--count", "--canvas", "128x128", *flags])
    assert "backbone" in text
    with pytest.raises(ValueError, match=r"--canvas 120x130: .* multiples of 16: give --canvas 128x144"):
        profile.profile(["--count", "--canvas", "120x130", *flags])
