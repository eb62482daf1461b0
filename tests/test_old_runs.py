"""Runs of earlier versions, stopped on their way: they go on, and are evaluated, used and exported, as they were there.

Each archive in ``fixtures`` holds ``run``, and in ``expected`` what the version that made it got: ``resumed.jsonl``,
the log after resuming; ``evaluated.json`` and ``detections.json`` of ``evaluate run``; ``predicted.json`` of ``predict
run shapes/val --threshold 0.05`` on the images of ``shapes --train 1 --val 2``.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dndetr import evaluate, export, predict, train
from dndetr.runs.run_log import read_rows
from dndetr.shapes import write_shapes

ARCHIVES = sorted((Path(__file__).parent / "fixtures").glob("run-*.tar.xz"))
CLOSE = {"rtol": 2e-3, "atol": 2e-3}  # other processors round otherwise, and training amplifies it


@pytest.fixture(params=ARCHIVES, ids=lambda path: path.name)
def expected(request, tmp_path, monkeypatch) -> Path:
    """What is expected of ``run`` in the current folder."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    shutil.unpack_archive(request.param, tmp_path)
    return tmp_path / "expected"


def numbers(row: dict) -> torch.Tensor:
    """Every number of a row that does not depend on the clock."""
    timing = {"seconds", "images_per_second", "data_wait"}
    known = {name: value for name, value in row.items() if isinstance(value, int | float) and name not in timing}
    return torch.tensor([*known.values()], dtype=torch.float64)


def detected(found: list[dict]) -> torch.Tensor:
    """Score and box of the best detections, by image."""
    ranked = sorted(found, key=lambda entry: (entry["image_id"], -entry["score"]))
    return torch.tensor([[entry["score"], *(side / 128 for side in entry["bbox"])] for entry in ranked])[:10]


def test_there_is_one():
    assert ARCHIVES and all(path.stat().st_size < 300_000 for path in ARCHIVES)


def test_it_goes_on(expected):
    saved = torch.load("run/checkpoint.pt", weights_only=True)
    assert saved["window"]["ids"], "it was stopped between two rows of its log"
    train.run(["--resume", "run", "--quiet", "--device", "cpu"])
    found, wanted = read_rows("run/metrics.jsonl"), read_rows(expected / "resumed.jsonl")
    assert [list(row) for row in found] == [list(row) for row in wanted]
    for row, other in zip(found, wanted, strict=True):
        assert (row["event"], row["step"]) == (other["event"], other["step"])
        torch.testing.assert_close(numbers(row), numbers(other), **CLOSE)
    for name in ("best.pt", "curves.png", "denoising.json", "predictions.png"):
        assert Path("run", name).exists()


def test_it_is_evaluated(expected):
    assert evaluate.main(["run", "--device", "cpu", "--output", "evaluation"]) == 0
    wanted = json.loads((expected / "evaluated.json").read_text())
    found = json.loads(Path("evaluation/metrics.json").read_text())
    assert found.keys() == wanted.keys() | {"calibration"} and found["AP50"] == pytest.approx(wanted["AP50"], abs=5e-3)
    files = (Path("evaluation/detections_val.json"), expected / "detections.json")
    pairs = [json.loads(path.read_text()) for path in files]
    assert len(pairs[0]) == len(pairs[1])
    torch.testing.assert_close(*map(detected, pairs), **CLOSE)


def test_it_is_used(expected):
    write_shapes(Path("shapes"), train=1, val=2)
    assert predict.main(["run", "shapes/val", "--threshold", "0.05", "--device", "cpu", "--output", "pictures"]) == 0
    found = json.loads(Path("pictures/predictions.json").read_text())
    wanted = json.loads((expected / "predicted.json").read_text())
    assert found["classes"] == wanted["classes"]
    for image, other in zip(found["images"], wanted["images"], strict=True):
        assert image["file"] == other["file"] and len(image["detections"]) == len(other["detections"])
        (best, *_), (wanted_best, *_) = image["detections"], other["detections"]
        assert best["name"] == wanted_best["name"] and best["score"] == pytest.approx(wanted_best["score"], abs=2e-3)


def test_it_is_exported(expected, capsys):
    assert export.main(["run", "--output", "model.pt2"]) == 0
    assert "the same as the model" in capsys.readouterr().out and Path("model.pt2").stat().st_size > 10_000


def test_other_runs_may_start_from_it(expected):
    few = ["--epochs", "1", "--batch-size", "4", "--train-images", "4", "--val-images", "2", "--quiet"]
    shape = ["--model.backbone.planes", "8", "8", "8", "--model.backbone.blocks", "1", "1", "1"]
    assert train.main([*few, *shape, "--init", "run", "--output", "other"]) == 0
