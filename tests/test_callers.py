"""Training inside somebody else's program: their thread, what they have set in torch, and folders after failures."""

import signal
import threading
from pathlib import Path

import pytest
import torch
from callers import CALLERS
from short_runs import SMALL

from dndetr import compare, evaluate, train
from dndetr.runs.checkpoint import load_checkpoint

FEW = [*SMALL, "--epochs", "1", "--batch-size", "4", "--train-images", "8", "--val-images", "6", "--quiet"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch, no_pictures):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


@pytest.mark.parametrize("output", ["run", "new/run", None])
@pytest.mark.parametrize("part", ["Trainer.prepare", "Trainer._save"])
def test_a_run_that_fails_at_its_start_leaves_no_empty_folder(monkeypatch, output, part):
    def fail(*_, **__):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(f"dndetr.training.trainer.{part}", fail)
    arguments = FEW if output is None else [*FEW, "--output", output]
    assert train.main(arguments) == 1
    assert not any(Path(".").glob("**/run")) and not any(Path("runs").glob("*")) and not Path("new").exists()


def test_a_folder_that_was_there_stays_when_a_run_fails_at_its_start(monkeypatch):
    monkeypatch.setattr("dndetr.training.trainer.Trainer.prepare", lambda _: 1 / 0)
    Path("mine").mkdir()
    with pytest.raises(ZeroDivisionError):
        train.run([*FEW, "--output", "mine"])
    assert Path("mine").is_dir()


@pytest.mark.parametrize("arguments", [[], ["--output", "run"]], ids=["numbered", "asked-for"])
def test_a_thread_can_train(arguments):
    found = []
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    thread = threading.Thread(target=lambda: found.append(train.main([*FEW, *arguments])))
    thread.start()
    thread.join()
    assert found == [0] and [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("name", ["inference", "autocast", "bfloat16", "device"])
def test_training_does_not_depend_on_what_the_caller_has_set(name):
    def weights(folder):
        return load_checkpoint(train.run([*FEW, "--precision", "float32", "--output", folder]))["model"]

    expected = weights("expected")
    with CALLERS[name]():
        found = weights("found")
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("there", [False, True])
def test_a_comparison_whose_first_run_is_refused_leaves_nothing(there):
    if there:
        Path("mine").mkdir()
    assert compare.main(["--seeds", "1", "--output", "mine", *FEW, "--data", "nowhere"]) == 1
    assert Path("mine").exists() == there and not any(Path("mine").glob("*"))


def test_commands_do_not_depend_on_what_the_caller_has_set(capsys):
    run = train.run([*FEW, "--precision", "float32"])
    for name in ("inference", "autocast", "float64", "bfloat16", "device"):
        with CALLERS[name]():
            assert evaluate.main([str(run), "--output", name]) == 0, capsys.readouterr().err
    found = {(Path(name) / "detections_val.json").read_bytes() for name in ("inference", "float64", "device")}
    assert found == {(run / "detections_val.json").read_bytes()}
