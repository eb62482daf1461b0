"""best.safetensors: the weights of best.pt, and whatever takes those takes it."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from short_runs import short_run, write_pictures

import dndetr
from dndetr import evaluate, export, health, predict, train
from dndetr.runs.checkpoint import load_checkpoint

SMALL = ["--images.recipe", "fixed", "--images.canvas", "64", "64", "--precision", "float32"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    return short_run(folder / "run", "--data", str(write_pictures(folder / "pictures")), *SMALL)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch, no_pictures):
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)


def both(folder: Path) -> tuple[dict, dict]:
    return load_checkpoint(folder / "best.pt"), load_checkpoint(folder / "best.safetensors")


@pytest.mark.parametrize("average", [True, False])
def test_it_has_what_best_pt_has(run, average):
    if not average:
        run = short_run(Path("plain"), "--optimizer.ema", "0")
    best, same = both(run)
    assert list(best) == list(same) and (best["ema"] is not None) == average
    weights = best["ema"] if average else best["model"]
    assert weights.keys() == same["model"].keys()
    for name, value in weights.items():
        assert value.dtype == same["model"][name].dtype and torch.equal(value, same["model"][name]), name
    beside = [name for name in best if name not in ("model", "ema")]
    assert {name: best[name] for name in beside} == {name: same[name] for name in beside}
    assert same["config"] == json.loads((run / "config.json").read_text())


def test_others_read_it(run):
    weights = load_file(run / "best.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in load_checkpoint(run / "best.pt")["ema"].items())


def test_it_is_loaded_alike(run):
    detectors = [dndetr.load(run / name, "cpu") for name in ("best.pt", "best.safetensors")]
    states = [detector.model.state_dict() for detector in detectors]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert detectors[0].config == detectors[1].config and detectors[0].classes == detectors[1].classes


def test_it_is_evaluated_and_used_alike(run, capsys):
    pictures = str(run.parent / "pictures" / "val" / "0.jpg")
    told = []
    for name in ("best.pt", "best.safetensors"):
        file = str(run / name)
        assert evaluate.main([file, "--device", "cpu", "--output", f"scores-{name}"]) == 0
        assert predict.main([file, pictures, "--threshold", "0", "--output", f"found-{name}"]) == 0
        told.append(capsys.readouterr().out.replace(name, "FILE"))
    assert told[0] == told[1]
    for file in ("scores-{}/metrics.json", "scores-{}/detections_val.json", "found-{}/predictions.json"):
        read = [Path(file.format(name)).read_bytes() for name in ("best.pt", "best.safetensors")]
        assert read[0] == read[1], file


def test_it_is_examined(run, capsys):
    assert health.main([str(run / "best.safetensors"), "--steps", "0", "--device", "cpu"]) == 0
    assert "1 - IoU with the original" in capsys.readouterr().out


@pytest.mark.slow
def test_it_is_exported(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)  # pytest would keep it, for seconds
    few = ["--model.encoder-layers", "0", "--model.decoder-layers", "1", "--model.queries", "5"]
    shape = ["--model.backbone.planes", "8", "8", "8", "--model.backbone.blocks", "1", "1", "1"]
    run = short_run(Path("run"), *few, *shape, *SMALL)
    assert export.main([str(run / "best.safetensors"), "--output", "model.pt2"]) == 0
    assert "the same as the model" in capsys.readouterr().out


def test_runs_start_from_it_alike_and_none_goes_on_from_it(run, capsys):
    few = ["--epochs", "1", "--batch-size", "4", "--data", str(run.parent / "pictures"), *SMALL]
    for name in ("best.pt", "best.safetensors"):
        assert train.main([*few, "--init", str(run / name), "--output", f"from-{name}"]) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "--init" in line]
        assert "and the classes cell, dust, hair" in line and "re-made" not in line and "ignored" not in line
    ends = [load_checkpoint(f"from-{name}")["model"] for name in ("best.pt", "best.safetensors")]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert train.main(["--resume", str(run / "best.safetensors")]) == 1
    error = capsys.readouterr().err
    assert "best.safetensors: this file has weights but not the state of the training" in error


def test_a_run_is_used_by_it_where_best_pt_is_gone(run):
    (Path("run")).mkdir()
    for name in ("config.json", "best.safetensors"):
        Path("run", name).write_bytes((run / name).read_bytes())
    found = dndetr.TrainedRun("run")
    assert found.classes == [(3, "cell"), (7, "dust"), (12, "hair")] and found.detector("cpu").classes == found.classes


def changed(run, **about):
    """A copy whose header says something else."""
    with safe_open(run / "best.safetensors", framework="pt") as file:
        said = json.loads(file.metadata()["dndetr"])
    save_file(load_file(run / "best.safetensors"), "x.safetensors", {"dndetr": json.dumps(said | about)})


@pytest.mark.parametrize(
    ("about", "what"),
    [
        ({"config": {"lr": 1e-4, "of_tomorrow": 1}}, "unknown fields: of_tomorrow (another version's?)"),
        ({"classes": [[1, "a"]]}, "its weights are not those of its configuration: size mismatch"),
        ({"config": "none"}, "its header should have under 'dndetr'"),
    ],
)
def test_headers_of_other_weights_are_one_line(run, about, what, capsys):
    changed(run, **about)
    assert predict.main(["x.safetensors", str(run.parent / "pictures" / "val")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: x.safetensors: ") and what in error and error.count("\n") == 1


def test_a_run_on_a_full_disk_ends_and_keeps_what_it_had(monkeypatch, capsys):
    def full(checkpoint):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dndetr.runs.checkpoint.safetensors_bytes", full)
    few = ["--epochs", "1", "--batch-size", "4", "--train-images", "4", "--val-images", "2", "--quiet"]
    assert train.main([*few, "--output", "run"]) == 1
    assert capsys.readouterr().err == "error: cannot write run/best.safetensors: No space left on device\n"
    assert not list(Path("run").glob(".*.tmp")) and load_checkpoint("run/best.pt")["metrics"]


def test_weights_of_others_are_as_before(run):
    save_file(load_file(run / "best.safetensors"), "alone.safetensors")
    with pytest.raises(ValueError, match=r"alone\.safetensors holds no configuration and classes; .* --preset"):
        dndetr.load("alone.safetensors")
