"""The commands on a GPU, from training to predictions, with captured steps and with eager ones."""

import json
from pathlib import Path

import pytest
import torch
from short_runs import stopped_after

import dndetr
from dndetr import evaluate, profile, train
from dndetr.training.trainer import Trainer

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
FEW = ["--batch-size", "4", "--train-images", "32", "--val-images", "6", "--log-every", "2", "--quiet"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def losses(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return torch.tensor([row["loss"] for row in rows if row["event"] == "train"])


def test_captured_and_eager_runs_learn_alike(monkeypatch):
    said = []
    monkeypatch.setattr(Trainer, "_warn", lambda self, text: said.append(text))
    same = [*FEW, "--device", DEVICE, "--epochs", "2", "--precision", "float32"]
    captured, eager = (losses(train.run([*same, "--mode", mode])) for mode in ("graph", "eager"))
    assert len(captured) == 8 and captured.isfinite().all()
    torch.testing.assert_close(captured, eager, rtol=0.02, atol=0)
    assert not said, "a shape was not captured"


@pytest.mark.parametrize("padding", ["hidden", "official"])
def test_the_gpu_trains_as_the_cpu_does(padding):
    same = [*FEW, "--epochs", "1", "--precision", "float32", "--denoising.padding", padding]
    found, expected = (losses(train.run([*same, "--device", device])) for device in (DEVICE, "cpu"))
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0)  # convolutions are TF32 there


def test_a_run_is_resumed_evaluated_profiled_and_used(capsys):
    folder = Path("run")
    with stopped_after(9):
        train.main([*FEW, "--device", DEVICE, "--epochs", "2", "--output", str(folder)])
    train.run(["--resume", str(folder), "--device", DEVICE, "--mode", "eager", "--quiet"])
    assert len(losses(folder)) == 8  # a log row every two steps
    assert evaluate.main([str(folder), "--device", DEVICE]) == 0
    detector = dndetr.load(folder, device=DEVICE)
    (prediction,) = detector.predict(torch.zeros(64, 48, 3, dtype=torch.uint8).numpy(), threshold=0.0)
    assert prediction.boxes_xyxy.shape == (len(prediction.scores), 4) and len(prediction.scores)
    capsys.readouterr()
    assert profile.main(["--steps", "2", *FEW[:-1], "--device", DEVICE]) == 0
    assert "ms/step" in capsys.readouterr().out
