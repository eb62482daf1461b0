"""Those who watch a run: what they are told, in which order, and what becomes of a run when they fail."""

import json
import os
import re
import signal
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
from short_runs import SMALL
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

FEW = [*SMALL, "--epochs", "2", "--batch-size", "4", "--train-images", "12", "--val-images", "6", "--log-every", "2"]


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
    after = ["row_logged", "evaluated", "checkpoint_saved"]
    assert watcher.moments()[2:-1] == [*first, *after, *second, *after]
    ((run,),) = watcher.of("run_started")
    assert (run.folder, run.steps, run.steps_per_epoch, run.step, run.rows) == (folder, 6, 3, 0, [])
    assert run.config.epochs == 2 and run.names[0] == run.classes[0][1] == "circle"
    ((batch, noised),) = watcher.of("first_batch")
    assert len(batch.pixels) == 4 and noised.boxes.shape[1] == run.config.denoising.groups
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


def test_all_that_can_be_raised_is_caught(tmp_path, capsys):
    class Unspeakable(RuntimeError):
        def __str__(self):
            raise ValueError("no words")

    class Raising:
        def __init__(self, error):
            self.error = error

        def row_logged(self, row):
            raise self.error

        run_ended = row_logged

    errors = [Unspeakable(), SystemExit(3), ValueError("caf\udce9"), MemoryError()]
    run = train.run([*FEW, "--quiet", "--output", "run"], listeners=[Raising(error) for error in errors])
    said = [row["message"] for row in read_rows(run / "metrics.jsonl") if row["event"] == "warning"]
    found = ["(Unspeakable)", "(SystemExit: 3)", "(ValueError: caf\udce9)", "(MemoryError)"]
    assert len(said) == 4 and all(text in message for text, message in zip(found, said, strict=True))
    assert read_rows(run / "metrics.jsonl")[-1]["event"] == "end", "nothing comes after the end"
    assert capsys.readouterr().err == ""


def test_who_fails_at_the_end_is_named_on_stderr(tmp_path, capsys):
    class Late:
        def run_ended(self, how, reason, row):
            raise OSError("no\nroom")

    watcher = Everything()
    everyone = Listeners([RunLog()], [Late(), watcher])
    everyone.tell("run_started", a_run(tmp_path, warn=lambda text: everyone.warn(0, text)))
    everyone.end("failed", "ValueError", {})
    assert capsys.readouterr().err == "warning: listener Late failed in run_ended (OSError: no room)\n"
    assert watcher.of("run_ended") == [("failed", "ValueError", {})] and not (tmp_path / "metrics.jsonl").exists()
    everyone.warn(0, "after all")
    assert capsys.readouterr().err == "warning: after all\n"


def test_everyone_hears_everything_in_one_order_and_no_warning_is_answered(tmp_path):
    class Talking(Everything):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def run_started(self, run):
            self.run = run
            self.told.append(("run_started", run))
            run.warn(f"{self.name} is here")

        def row_logged(self, row):
            self.told.append(("row_logged", row))
            self.run.warn(ValueError(f"{self.name} heard of step {row['step']}"))

    first, second = Talking("a"), Talking("b")
    log = RunLog()
    everyone = Listeners([log], [first, second])
    everyone.tell("run_started", a_run(tmp_path, warn=lambda text: everyone.warn(7, text)))
    everyone.tell("row_logged", {"event": "train", "step": 2})
    said = ["a is here", "b is here", None, "a heard of step 2", "b heard of step 2"]
    assert [row.get("message") for row in read_rows(log.path)] == said
    for listener in (first, second):
        assert listener.moments() == ["run_started", *["row_logged"] * 5]
        assert [row for (row,) in listener.of("row_logged")] == read_rows(log.path)


def test_what_a_thread_says_is_told_by_the_trainers_own(tmp_path):
    class Where(Everything):
        def row_logged(self, row):
            self.told.append(("row_logged", row["event"], threading.get_ident()))

    watcher = Where()
    everyone = Listeners([RunLog()], [watcher])
    everyone.tell("run_started", a_run(tmp_path, warn=lambda text: everyone.warn(1, text)))
    thread = threading.Thread(target=watcher.of("run_started")[0][0].warn, args=["from a thread"])
    thread.start()
    thread.join()
    assert watcher.of("row_logged") == []
    everyone.tell("row_logged", {"event": "train", "step": 2})
    assert watcher.of("row_logged") == [(event, threading.get_ident()) for event in ("warning", "train")]


def test_a_log_that_cannot_be_written_ends_the_run_whoever_made_the_row(tmp_path, monkeypatch):
    class Talking(Everything):
        def step_ended(self, step, images, waited):
            self.told[0][1].warn("hm")

    def full(self, row):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunLog, "row_logged", full)
    everyone = Listeners([RunLog()], [Talking()])
    everyone.tell("run_started", a_run(tmp_path, warn=lambda text: everyone.warn(1, text)))
    with pytest.raises(OSError, match="No space left"):
        everyone.tell("step_ended", 1, 4, 0.0)


def test_a_run_can_be_asked_to_end():
    class Content(Everything):
        def row_logged(self, row):
            if row["step"] >= 2:
                self.of("run_started")[0][0].stop()

    watcher = Content()
    with pytest.raises(SystemExit) as end:
        train.run([*FEW, "--quiet", "--output", "run"], listeners=[watcher])
    assert end.value.code == 128 + signal.SIGTERM
    assert [how for how, *_ in watcher.of("run_ended")] == ["stopped"]
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 2
    assert train.main(["--resume", "run", "--quiet"]) == 0


def test_what_is_given_is_for_keeping():
    class Spoiling(Everything):
        def first_batch(self, batch, noised):
            batch.pixels.zero_()
            noised.boxes.zero_()

        def checkpoint_saved(self, path, step):
            kept.append((step, self.of("run_started")[0][0].weights()["ema"]))

    kept: list[tuple[int, dict]] = []
    plain = train.run([*FEW, "--quiet", "--output", "plain"])
    spoiled = train.run([*FEW, "--quiet", "--output", "spoiled"], listeners=[Spoiling()])
    ends = [torch.load(folder / "checkpoint.pt", weights_only=True)["ema"] for folder in (plain, spoiled)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert [step for step, _ in kept] == [3, 6]
    assert all(torch.equal(value, kept[1][1][name]) for name, value in ends[0].items())
    assert not torch.equal(kept[0][1]["decoder.class_embed.0.bias"], kept[1][1]["decoder.class_embed.0.bias"])


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


class Number:
    step_ended = 5


class Coroutine:
    async def evaluated(self, row, results, best):
        pass


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (Everything, "Everything'> is no listener: give an object with one of run_started, first_batch"),
        (print, "<built-in function print> is no listener"),
        (Number(), "is no listener"),
        (Coroutine(), "evaluated is a coroutine, which nobody would run: leave out async"),
    ],
    ids=["class", "function", "number", "coroutine"],
)
def test_what_is_no_listener_is_refused_before_anything_is_written(tmp_path, wrong, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        train.run([*FEW, "--quiet"], listeners=[wrong])
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
    assert told["evaluated"] == ["DetectionsFile", "BestCheckpoint", "Own"]
    assert told["run_ended"] == ["Pictures", "RunLog", "Console"]
    assert told["step_ended"] == ["Console"] and told["first_batch"] == ["Pictures"]


def test_every_moment_is_documented(root):
    page = (Path(root) / "docs" / "listeners.md").read_text()
    assert [moment for moment in MOMENTS if f"`{moment}(" not in page] == []
