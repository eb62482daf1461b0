"""Those who watch a run: what they are told, in which order, and what becomes of a run when they fail."""

import json
import os
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch
from watched_runs import a_run

import dndetr
from dndetr import train
from dndetr.pictures.run import Pictures
from dndetr.presets import PRESETS
from dndetr.runs.checkpoint import BestCheckpoint
from dndetr.runs.console import Console
from dndetr.runs.listener import MOMENTS, Listener, Listeners
from dndetr.runs.run_log import RunLog, read_rows
from dndetr.training.criterion import Criterion
from dndetr.training.listeners import all_listeners
from dndetr.training.loss_window import Diverged

FEW = ["--epochs", "2", "--batch-size", "4", "--train-images", "12", "--val-images", "6", "--log-every", "2"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch, no_pictures):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


class Everything(dndetr.Listener):
    """Notes all that it is told."""

    def __init__(self):
        self.told = []

    def moments(self) -> list[str]:
        return [moment for moment, *_ in self.told]

    def of(self, moment: str) -> list[tuple]:
        return [tuple(about) for name, *about in self.told if name == moment]


for name in MOMENTS:
    setattr(Everything, name, lambda self, *about, moment=name: self.told.append((moment, *about)))


def test_every_moment_of_a_run_is_told_in_order():
    watcher = Everything()
    folder = train.run([*FEW, "--quiet"], listeners=[watcher])
    assert watcher.moments()[:2] == ["run_started", "first_batch"] and watcher.moments()[-1] == "run_ended"
    # A row is told before the step that closed it; the last step of an epoch closes one as well.
    first = ["step_ended", "row_logged", "step_ended", "row_logged", "step_ended"]
    second = ["row_logged", "step_ended", "step_ended", "row_logged", "step_ended"]
    after = ["evaluated", "row_logged", "checkpoint_saved"]
    assert watcher.moments()[2:-1] == [*first, *after, *second, *after]
    ((run,),) = watcher.of("run_started")
    assert (run.folder, run.steps, run.steps_per_epoch, run.step, run.rows) == (folder, 6, 3, 0, [])
    assert run.config.epochs == 2 and run.names[0] == run.data.classes[0][1] == "circle"
    ((batch, noised),) = watcher.of("first_batch")
    assert batch.images.shape[0] == 4 and noised.boxes.shape[1] == run.config.denoising.groups
    assert [(step, images) for step, images, _ in watcher.of("step_ended")] == [(step, 4) for step in range(1, 7)]
    rows = read_rows(folder / "metrics.jsonl")
    assert [row for (row,) in watcher.of("row_logged")] == rows[:-1] and rows[-1]["event"] == "end"
    evaluations = watcher.of("evaluated")
    assert [row for row, _, _ in evaluations] == [row for row in rows if row["event"] == "eval"]
    assert evaluations[-1][1] == json.loads((folder / "detections_val.json").read_text())
    best = torch.load(folder / "best.pt", weights_only=True)
    assert evaluations[0][2] and best["metrics"]["AP"] == max(row["AP"] for row, _, _ in evaluations)
    assert watcher.of("checkpoint_saved") == [(folder / "checkpoint.pt", 3), (folder / "checkpoint.pt", 6)]
    assert watcher.of("run_ended") == [("finished", "", evaluations[-1][0])]


def test_a_run_that_is_stopped_and_resumed_says_so():
    class Stopping(Everything):
        def step_ended(self, step, images, waited):
            if step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    watcher = Stopping()
    with pytest.raises(SystemExit):
        train.run([*FEW, "--quiet", "--output", "run"], listeners=[watcher])
    ((evaluation, *_),) = watcher.of("evaluated")
    assert watcher.of("run_ended") == [("stopped", "stopped by SIGTERM after step 4", evaluation)]
    watcher = Everything()
    train.run(["--resume", "run", "--quiet"], listeners=[watcher])
    ((run,),) = watcher.of("run_started")
    assert run.step == 4 and [row["step"] for row in run.rows] == [2, 3, 3, 4]
    assert "first_batch" not in watcher.moments()
    assert [how for how, *_ in watcher.of("run_ended")] == ["finished"]


def test_a_run_that_fails_says_why(monkeypatch):
    def poisoned(self, *inputs):
        losses = forward(self, *inputs)
        return losses._replace(total=losses.total * float("nan"))

    forward, watcher = Criterion.forward, Everything()
    monkeypatch.setattr(Criterion, "forward", poisoned)
    with pytest.raises(Diverged):
        train.run([*FEW, "--quiet"], listeners=[watcher])
    ((how, reason, row),) = watcher.of("run_ended")
    assert how == "failed" and reason.startswith("Diverged: the loss is not finite at step 1") and row == {}


class Faulty:
    """Fails at all moments, and first spoils what it was given."""

    def step_ended(self, step, images, waited):
        raise ZeroDivisionError(step)

    def row_logged(self, row):
        row.clear()
        raise ConnectionError("no network\nat all")

    def evaluated(self, row, results, best):
        row["AP"] = 1.0
        raise SystemError

    def run_ended(self, how, reason, row):
        raise AssertionError


def test_a_listener_that_fails_is_named_once_and_changes_nothing(capsys):
    plain = train.run([*FEW, "--quiet", "--output", "plain"])
    capsys.readouterr()
    watcher = Everything()
    watched = train.run([*FEW, "--output", "watched"], listeners=[Faulty(), watcher])
    message = "listener Faulty failed in step_ended (ZeroDivisionError: 1); training goes on, and its further errors "
    message += "are not shown"
    out, error = capsys.readouterr()
    assert out.count("Faulty") == 1 and f"warning: {message}" in out and error == ""
    logs = [read_rows(folder / "metrics.jsonl") for folder in (plain, watched)]
    assert logs[1].pop(0) == {"event": "warning", "step": 1, "message": message}
    timing = dict.fromkeys(("seconds", "images_per_second", "data_wait"))
    assert [row | timing for row in logs[0]] == [row | timing for row in logs[1]]
    assert [row for (row,) in watcher.of("row_logged")] == read_rows(watched / "metrics.jsonl")[:-1]
    ends = [torch.load(folder / "checkpoint.pt", weights_only=True)["ema"] for folder in (plain, watched)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert {path.name for path in plain.iterdir()} == {path.name for path in watched.iterdir()}


def test_looking_at_the_model_changes_nothing():
    class Looking(Everything):
        def step_ended(self, step, images, waited):
            ((run,),) = self.of("run_started")
            ((batch, noised),) = self.of("first_batch")
            boxes = run.infer(batch, noised).boxes
            assert boxes.shape[2] == run.config.model.queries + noised.boxes.shape[1] * noised.boxes.shape[2]
            assert run.weights()["step"] == step
            self.told.append(("looked", step))

    flags = [*FEW, "--quiet", "--optimizer.ema", "0", "--model.backbone.norm", "batch"]
    watcher = Looking()
    folders = [train.run([*flags, "--output", "plain"]), train.run([*flags, "--output", "looked"], listeners=[watcher])]
    assert len(watcher.of("looked")) == 6
    plain, looked = (torch.load(folder / "checkpoint.pt", weights_only=True)["model"] for folder in folders)
    assert all(torch.equal(value, looked[name]) for name, value in plain.items())


@pytest.mark.parametrize(("kind", "moment"), [(RunLog, "row_logged"), (BestCheckpoint, "evaluated")])
def test_the_log_and_the_checkpoint_are_the_product(monkeypatch, capsys, kind, moment):
    def full(self, *about):
        raise OSError(28, "No space left on device")

    watcher = Everything()
    with monkeypatch.context() as broken, pytest.raises(OSError, match="No space left"):
        broken.setattr(kind, moment, full)
        train.run([*FEW, "--quiet", "--output", "run"], listeners=[watcher])
    assert watcher.of("run_ended")[0][0] == "failed"
    assert train.main(["--resume", "run", "--quiet"]) == 0
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 6


def test_watchers_are_told_that_the_last_files_failed(tmp_path):
    class Pictures(Listener):
        def run_ended(self, how, reason, row):
            raise OSError("no room for pictures")

    watcher = Everything()
    log = RunLog()
    everyone = Listeners([Pictures(), log], [watcher])
    everyone.end("finished", "", {})
    assert watcher.told == [], "nothing had started"
    everyone.tell("run_started", a_run(tmp_path))
    with pytest.raises(OSError, match="no room"):
        everyone.end("finished", "", {})
    assert watcher.of("run_ended") == [("failed", "OSError: no room for pictures", {})]
    assert not log.path.exists(), "a run without its pictures has not ended"


@pytest.mark.parametrize(
    ("wrong", "named"), [(Everything, "test_listener.Everything'>"), (print, "<built-in function print>")]
)
def test_what_is_no_listener_is_refused_before_anything_is_written(tmp_path, wrong, named):
    with pytest.raises(ValueError, match="is no listener: give an object with one of run_started, first_batch") as told:
        train.run([*FEW, "--quiet"], listeners=[wrong])
    assert named in str(told.value)
    assert not any(tmp_path.iterdir())


def test_files_come_before_watchers_and_early_warnings_last():
    class Own:
        def evaluated(self, row, results, best):
            pass

    with mock.patch("dndetr.training.listeners.Pictures", Pictures):  # which the other tests here leave out
        everyone = all_listeners(PRESETS["tiny"](), Console(quiet=True), [Own()])
    told = {
        moment: [type(listener).__name__ for listener, _ in everyone._files[moment] + everyone._watchers[moment]]
        for moment in MOMENTS
    }
    assert told["row_logged"] == ["RunLog", "Console", "EarlyWarnings"]
    assert told["evaluated"] == ["DetectionsFile", "BestCheckpoint", "Console", "Own"]
    assert told["run_ended"] == ["Pictures", "RunLog", "Console"]
    assert told["step_ended"] == ["Console"] and told["first_batch"] == ["Pictures"]


def test_every_moment_is_documented(root):
    page = (Path(root) / "docs" / "listeners.md").read_text()
    assert [moment for moment in MOMENTS if f"`{moment}(" not in page] == []
