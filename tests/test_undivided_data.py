"""Data without a val split through the commands: a run divides it, and what is asked of it later does too."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from short_runs import short_run, write_pictures

from dndetr import check_data, compare, evaluate, export, health, train
from dndetr.detector import load
from dndetr.runs.checkpoint import load_checkpoint

FIXED = ["--images.recipe", "fixed", "--images.canvas", "64", "64"]
DIVIDED = ["--val-share", "0.25", "--split-file", "split.json"]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with a train split alone."""
    folder = write_pictures(tmp_path_factory.mktemp("data") / "set")
    (folder / "annotations" / "instances_val.json").unlink()
    shutil.rmtree(folder / "val")
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory, whole) -> Path:
    """Where a run was made from relative paths."""
    folder = tmp_path_factory.mktemp("start")
    shutil.copytree(whole, folder / "set")
    before = os.getcwd()
    os.chdir(folder)
    try:
        short_run(Path("run"), "--data", "set", *DIVIDED, *FIXED)
    finally:
        os.chdir(before)
    return folder


def evaluated(path: Path) -> list[int]:
    return sorted({row["image_id"] for row in json.loads(path.read_text())})


def test_a_run_remembers_its_division(start):
    config = load_checkpoint(start / "run")["config"]
    assert (config["val_share"], config["split_file"]) == (0.25, str(start / "split.json"))
    sides = json.loads((start / "split.json").read_text())
    ids = [10 + int(Path(name).stem) for name in sides["val"]]
    assert (len(sides["train"]), len(sides["val"])) == (6, 2)
    assert evaluated(start / "run" / "detections_val.json") == ids


def test_commands_use_the_division_of_the_run(start, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = start / "run"
    assert evaluate.main([str(run), "--device", "cpu", "--output", "out"]) == 0
    assert evaluated(Path("out/detections_val.json")) == evaluated(run / "detections_val.json")
    assert evaluate.main([str(run), "--device", "cpu", "--split", "train", "--output", "train"]) == 0
    assert not set(evaluated(Path("train/detections_train.json"))) & set(evaluated(run / "detections_val.json"))
    assert health.main([str(run), "--steps", "0", "--device", "cpu"]) == 0
    first = json.loads((start / "split.json").read_text())["val"][0]
    assert export._validation_image(load(run, "cpu").config) == start / "set" / "train" / first


@pytest.mark.slow
def test_an_export_uses_the_division_of_the_run(start, tmp_path):
    assert export.main([str(start / "run"), "--output", str(tmp_path / "model.pt2")]) == 0


def test_other_data_is_not_divided_as_that_of_the_run(start, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    other = write_pictures(tmp_path / "other")
    flags = [str(start / "run"), "--device", "cpu", "--data", str(other)]
    assert evaluate.main([*flags, "--output", "out"]) == 0
    assert evaluated(Path("out/detections_val.json")) == list(range(10, 16))
    assert health.main([*flags, "--steps", "0"]) == 0


def test_other_data_is_divided_when_asked(start, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [str(start / "run"), "--device", "cpu"]
    assert evaluate.main([*flags, "--data", str(whole)]) == 1
    assert "to set a fifth of the training images apart give --val-share 0.2" in capsys.readouterr().err
    assert evaluate.main([*flags, "--data", str(whole), *DIVIDED, "--output", "out"]) == 0
    assert evaluated(Path("out/detections_val.json")) == evaluated(start / "run" / "detections_val.json")
    assert Path("split.json").read_text() == (start / "split.json").read_text()
    assert health.main([*flags, "--data", str(whole), *DIVIDED, "--steps", "0"]) == 0
    capsys.readouterr()
    for module in (evaluate, health):
        assert module.main([*flags, "--val-share", "0.5"]) == 1
        said = "--val-share 0.5: give --data DIR too, since the run's own data is divided already"
        assert said in capsys.readouterr().err


def test_a_division_that_is_gone_is_asked_for(start, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(start / "run", tmp_path / "run")
    (start / "split.json").rename(start / "moved.json")
    try:
        for module in (evaluate, health):
            assert module.main(["run", "--device", "cpu"]) == 1
            said = f"error: {start / 'split.json'}: no such file, and it says what this run validates on; put it back"
            assert said in capsys.readouterr().err
        assert not (start / "split.json").exists()
        assert train.main(["--resume", "run", "--quiet", "--split-file", str(start / "moved.json")]) == 0
    finally:
        (start / "moved.json").rename(start / "split.json")


def test_the_check_divides(whole, tmp_path, capsys):
    assert check_data.main([str(whole)]) == 1
    assert "to set a fifth of the training images apart give --val-share 0.2" in capsys.readouterr().out
    assert check_data.main([str(whole), "--val-share", "0.25", "--split-file", str(tmp_path / "split.json")]) == 0
    out = capsys.readouterr().out
    assert "25% of the images are for validation" in out and "train: 6 images" in out and "val: 2 images" in out
    assert len(json.loads((tmp_path / "split.json").read_text())["val"]) == 2
    assert check_data.main([str(whole), "--val-share", "25"]) == 1
    assert "--val-share 25.0: give a share between 0 and 1" in capsys.readouterr().err


def test_the_check_tells_problems_of_an_undivided_set_once(whole, tmp_path, capsys):
    folder = shutil.copytree(whole, tmp_path / "set")
    path = folder / "annotations" / "instances_train.json"
    document = json.loads(path.read_text())
    document["annotations"][0]["category_id"] = 99
    path.write_text(json.dumps(document))
    assert check_data.main([str(folder), "--val-share", "0.25"]) == 1
    out, error = capsys.readouterr()
    assert out.count("problem: ") == 1 and ": 1 problem (unknown category 1)" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "both", "--val-share", "0.2"], "both: there is a val split already; leave out --val-share"),
        (["--data", "set", "--val-share", "1.5"], "--val-share 1.5: give a share between 0 and 1, such as 0.2"),
        (["--data", "set", "--split-file", "no.json"], "no.json: no such file; to have it made give --val-share 0.2"),
        (["--data", "shapes", "--val-share", "0.2"], "--data shapes: give data of yours, since this has a val split"),
    ],
)
def test_flags_that_cannot_be_met_stop_training(whole, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("set").symlink_to(whole)
    write_pictures(Path("both"))
    assert train.main([*flags, *FIXED, "--quiet"]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both", "set"]


def test_a_comparison_finds_the_file_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags in (["--split-file", "s.json"], ["--split-file=s.json"], ["--split_file", "s.json"]):
        plan = compare.make_plan(
            compare.Arguments(), ["--preset", "small", "--data", "set", "--val-share", ".2", *flags]
        )
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "elsewhere")
        config = train.parse(plan.arguments("0", 1))
        assert (config.split_file, config.val_share) == (str(tmp_path / "s.json"), 0.2)
        monkeypatch.chdir(tmp_path)
