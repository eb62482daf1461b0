"""What a run was given as a path holds wherever the run is used later."""

import json
from pathlib import Path

import pytest
import torch
from short_runs import short_run, stopped_after, write_pictures

from dndetr import compare, evaluate, export, health, train
from dndetr.config import Config, from_dict, to_dict
from dndetr.detector import load
from dndetr.runs.checkpoint import load_checkpoint
from dndetr.runs.paths import remembered

SMALL = ["--images.recipe", "fixed", "--images.canvas", "64", "64", "--model.decoder-layers", "1"]
FEW = ["--epochs", "2", "--batch-size", "4", "--quiet"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on a folder that was given relatively."""
    torch.set_num_threads(1)
    start = tmp_path_factory.mktemp("start")
    write_pictures(start / "set")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(start)
        short_run(Path("weights"), "--data", "set", *SMALL)
        short_run(Path("run"), "--data", "set", "--init", "weights/best.pt", *SMALL)
    return start / "run"


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """The run, in a folder that is not its own; a test may move the data to ``moved`` and write another checkpoint."""
    monkeypatch.chdir(tmp_path)
    checkpoint = (trained / "checkpoint.pt").read_bytes()
    yield trained
    (trained / "checkpoint.pt").write_bytes(checkpoint)
    if (tmp_path / "moved").exists():
        (tmp_path / "moved").rename(trained.parent / "set")


def test_paths_are_absolute_in_what_a_run_keeps(run):
    start = run.parent
    written = json.loads((run / "config.json").read_text())
    assert written == load_checkpoint(run)["config"] == load_checkpoint(run / "best.pt")["config"]
    assert (written["data"], written["init"]) == (str(start / "set"), str(start / "weights/best.pt"))
    assert written["given"]["data"] == "set" and load(run, "cpu").config.data_name == "set"
    config = from_dict(written)
    assert remembered(config) == config and to_dict(config) == written


def test_a_run_is_used_from_anywhere(run, capsys):
    assert evaluate.main([str(run), "--device", "cpu"]) == 0
    assert health.main([str(run), "--steps", "0", "--device", "cpu"]) == 0
    assert export.main([str(run), "--output", "model.pt2"]) == 0


def test_moved_data_is_asked_for(run, capsys):
    moved = Path("moved").absolute()
    (run.parent / "set").rename(moved)
    for module in (evaluate, health):
        assert module.main([str(run), "--device", "cpu"]) == 1
        error = capsys.readouterr().err
        assert (
            f"{run.parent / 'set'}: no such folder; if the run's data set has moved, say where it is: --data DIR"
            in error
        )
        assert error.count("\n") == 1
    assert export.main([str(run), "--output", "model.pt2"]) == 1
    assert "give another image to compare on: --image FILE" in capsys.readouterr().err
    assert evaluate.main([str(run), "--device", "cpu", "--data", "moved"]) == 0


def test_a_stopped_run_goes_on_elsewhere(tmp_path, monkeypatch, no_pictures, capsys):
    torch.set_num_threads(1)
    write_pictures(tmp_path / "start/set")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "start")
    with stopped_after(1):
        train.main(["--data", "set", *SMALL, *FEW, "--output", "run"])
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "start/set").rename("moved")
    assert train.main(["--resume", "../start/run", "--quiet"]) == 1
    assert "has moved, say where it is: --data DIR" in capsys.readouterr().err
    assert train.main(["--resume", "../start/run", "--quiet", "--data", "moved"]) == 0
    kept = load_checkpoint(tmp_path / "start/run")["config"]
    assert (kept["data"], kept["given"]["data"]) == (str(Path("moved").absolute()), "moved")


def test_a_run_with_relative_paths_works_where_it_was_started(run, monkeypatch, capsys):
    """As older versions wrote them."""
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    del checkpoint["config"]["given"]
    checkpoint["config"] |= {"data": "set", "output": "run", "init": "weights/best.pt"}
    torch.save(checkpoint, run / "checkpoint.pt")
    assert evaluate.main([str(run), "--device", "cpu"]) == 1
    assert "set: no such folder; if the run's data set has moved" in capsys.readouterr().err
    monkeypatch.chdir(run.parent)
    assert evaluate.main([str(run), "--device", "cpu"]) == 0


def test_a_comparison_finds_its_paths_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--preset", "small", "--data", "set", "--init=w.pth", "--optimizer.drops", "0.5", "0.8"]
    plan = compare.make_plan(compare.Arguments(), flags)
    here = plan.arguments("0", 1)
    assert here[: len(flags)] == flags
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = train.parse(plan.arguments("0", 1))
    assert (config.data, config.init) == (str(tmp_path / "set"), str(tmp_path / "w.pth"))
    assert config.optimizer.drops == (0.5, 0.8)
    older = compare.Plan("lr", ["1", "2"], 0, 1, ["--data", "set"])
    assert older.arguments("1", 0)[:2] == ["--data", "set"]


def test_built_in_data_is_no_path():
    assert remembered(Config(data="shapes")) == Config(data="shapes")
